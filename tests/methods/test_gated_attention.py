"""Gated Attention: examples for tests/test_reweighting.py."""

from hf_attentiondrop import GatedAttentionConfig


EXAMPLES = {"gate_alone": GatedAttentionConfig(), "gate_paper": GatedAttentionConfig(init="paper")}
