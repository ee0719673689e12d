"""The learned sink: the settings that it is tested with, in tests/test_reweighting.py."""

from hf_attentiondrop import AttentionSinkConfig


EXAMPLES = {"sink": AttentionSinkConfig(init=-0.5)}
