"""The learned sink: examples for tests/test_reweighting.py."""

from hf_attentiondrop import AttentionSinkConfig


EXAMPLES = {"sink": AttentionSinkConfig(init=-0.5)}
