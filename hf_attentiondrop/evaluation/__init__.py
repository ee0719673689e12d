"""What is measured on a model: calibration, robustness, and how it attends."""
