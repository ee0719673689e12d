"""Measurements on a model: calibration, adversarial robustness, attention statistics and gradient noise."""
