"""Affine-Scaled Attention: examples for tests/test_reweighting.py."""

from hf_attentiondrop import AffineScaledConfig


EXAMPLES = {
    "default": AffineScaledConfig(),
    "keys": AffineScaledConfig(bias_length="keys", momentum=0.5),
    "sigmoid": AffineScaledConfig(activation="sigmoid"),
    "paper": AffineScaledConfig(init="paper"),
    "gate": AffineScaledConfig(activation="sigmoid", init="paper", bias_length="keys", gate=True),
}
