"""A process of `test_launch_configurations.py`: trains every recipe for two steps.

accelerate launch --config_file recipes/accelerate_configs/cpu_2_processes.yaml --module tests.recipe_processes folder
"""

import sys
from pathlib import Path

import pytest

from .recipe_runs import NAMES, SMALL, load


FLAGS = ["--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "4", "--max_eval_samples", "6"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in NAMES:
        with pytest.MonkeyPatch.context() as monkeypatch:
            load(name, monkeypatch).main([*SMALL[name], *FLAGS, "--output_dir", str(folder / name)])
