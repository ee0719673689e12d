"""The launch configurations: those for the CPU are run, the others go through accelerate's own reader and launcher."""

import json
import math
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from .recipe_runs import NAMES, RECIPES, ROOT, launch


FOLDER = RECIPES / "accelerate_configs"
TYPES = {
    "cpu_2_processes": DistributedType.MULTI_GPU,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def test_every_configuration_is_listed() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_the_configuration(name: str) -> None:
    # The reader refuses keys that accelerate does not know.
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == TYPES[name]
    assert config.num_processes > 1


def launcher_environment(name: str) -> dict[str, str]:
    """What accelerate's launcher would hand to the processes of a recipe."""
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "recipe.py"])
    arguments, config, _ = _validate_launch_command(arguments)
    if not arguments.use_deepspeed:
        return prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    return prepare_deepspeed_cmd_env(arguments)[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        (
            "fsdp2",
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            },
        ),
        (
            "deepspeed_zero3",
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
            },
        ),
    ],
)
def test_launcher_sets_what_the_configuration_says(name: str, expected: dict[str, str]) -> None:
    environment = launcher_environment(name)
    assert {key: environment.get(key) for key in expected} == expected


@pytest.mark.slow
def test_two_cpu_processes_train_together(tmp_path: Path) -> None:
    config = FOLDER / "cpu_2_processes.yaml"
    result = launch("--config_file", config, "--module", "tests.recipe_processes", tmp_path, cwd=ROOT)
    for name in NAMES:
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        # Two steps of four samples on each of two processes.
        assert metrics["epoch"] == pytest.approx(2 / math.ceil(metrics["train_samples"] / 8), rel=0.01)
        assert metrics["train_loss"] > 0 and metrics["eval_loss"] > 0
        # Of language it cuts blocks, which are not as many as the texts.
        assert name == "causal_lm" or metrics["eval_samples"] == 6
        assert result.stdout.count(str(tmp_path / name / "metrics.json")) == 1
        assert load_file(tmp_path / name / "model.safetensors")
    printed = re.findall(r"^training +2 steps in .* on 2 processes$", result.stdout, re.MULTILINE)
    assert len(printed) == len(NAMES)
