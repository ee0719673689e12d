"""A script that a study can run many times within a second: its metrics are a formula of its arguments."""

import argparse
import json
import math
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--x", type=float, default=0.0, help="best at 0.3")
    parser.add_argument("--size", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="+", default=[])
    modes = ["plain", "fail", "kill", "silent", "diverge", "empty", "environment", "refuse"]
    parser.add_argument("--mode", choices=modes, default="plain")
    parser.add_argument("--gate", type=Path, help="wait until this file exists")
    parser.add_argument("--fast", action="store_true")
    arguments = parser.parse_args()

    if starts := os.environ.get("TINY_STARTS"):
        with open(starts, "a") as file:
            file.write(f"{arguments.output_dir.parent.name}/{arguments.output_dir.name}\n")
    # The recipes refuse a folder that is not empty, too.
    arguments.output_dir.mkdir()
    (arguments.output_dir / "half").touch()
    while arguments.gate and not arguments.gate.exists():
        time.sleep(0.02)
    if arguments.mode == "refuse":
        parser.error("--mode: refused, " + "as it is on this long list, " * 30)
    if arguments.mode == "fail":
        raise RuntimeError("out of ideas")
    if arguments.mode == "kill":
        os.kill(os.getpid(), 9)
    if arguments.mode == "diverge":
        print(*(f"step {step}" for step in range(30)), sep="\n")
    score = math.nan if arguments.mode == "diverge" else arguments.seed - (arguments.x - 0.3) ** 2 * arguments.size
    metrics = {"versions": {"tiny": "1.0"}, "is_tiny": True, "layers": arguments.layers}
    if arguments.mode == "environment":
        names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
        metrics["environment"] = {name: int(os.environ[name]) for name in names if os.environ.get(name)}
    if arguments.mode != "empty":
        metrics |= {"eval_score": score, "test_score": score, "calibration": {"error": 0.1 * arguments.seed}}
    if arguments.mode != "silent":
        (arguments.output_dir / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
