"""Synthetic runs of a study for the tests."""

import numpy as np

from hf_attentiondrop.compare.results import Question, Run


WEIRD = "a|b <script>alert(1)</script> `c` *d* $e$ über\n日本"
LOG = "10%\r100%\n\x1b[31mRuntimeError\x1b[0m: <b>out of</b> | memory ```\n"


def question(**changes: object) -> Question:
    values: dict = {
        "title": "Digits with 20 % label noise",
        "metrics": {"test_accuracy": "higher", "test_expected_calibration_error": "lower"},
        "reference": "dropout",
        "methods": ["dropout", "hard", "blur", WEIRD],
        "command": "hf-attentiondrop compare digits.yaml",
    }
    return Question(**{**values, **changes})


def run(method: str = "dropout", seed: int = 0, accuracy: float = 0.9, **changes: object) -> Run:
    values: dict = {
        "phase": "test",
        "trial": 0,
        "state": "complete",
        "arguments": {"seed": seed, "output_dir": f"runs/{seed}", "method": method},
        "metrics": {"test_accuracy": accuracy, "test_expected_calibration_error": 1 - accuracy},
        "seconds": 60.0,
        "peak_memory_mb": 800.0,
        "versions": {"torch": "2.15.0"},
        "commit": "abc123",
        "hardware": "2 cores",
    }
    return Run(method=method, seed=seed, **{**values, **changes})


def study(seeds: int, methods: tuple[str, ...] = ("dropout", "hard", "blur", WEIRD)) -> list[Run]:
    """Test runs in which the second method is better, the third alike, and the fourth slightly worse."""
    generator = np.random.default_rng(0)
    shared = generator.normal(0.9, 0.01, seeds)
    effects = (0.0, 0.03, 0.001, -0.006)
    return [
        run(method, seed, float(shared[seed] + effect + generator.normal(0, 0.003)), seconds=60.0 + 30 * rank)
        for rank, (method, effect) in enumerate(zip(methods, effects, strict=False))
        for seed in range(seeds)
    ]
