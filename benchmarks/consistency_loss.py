"""Memory and time of the consistency loss compared to a plain implementation, forward and backward.

    python benchmarks/consistency_loss.py
    python benchmarks/consistency_loss.py --device cuda

The logits of both passes exist before the measurement, which covers the loss and the gradient of the logits.
Memory: the rise of resident memory (on a GPU, allocated memory) above that with the logits, each case in a new
process. Time: medians of runs that alternate between the two implementations.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import alternating_milliseconds, hardware, measure_memory, peak_megabytes
from torch import Tensor
from torch.nn.functional import kl_div

from hf_attentiondrop.training.losses import DIVERGENCES, consistency_loss


DTYPES = ("float32", "bfloat16")


def plain_loss(logits: Tensor, weights: Tensor, divergence: str) -> Tensor:
    """Computes the loss in the usual way."""

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    log_p, log_q = logits.float().log_softmax(-1).chunk(2)
    if divergence == "kl":
        items = kl(log_p, log_q)
    elif divergence == "symmetric_kl":
        items = 0.5 * (kl(log_p, log_q) + kl(log_q, log_p))
    else:
        log_m = (0.5 * (log_p.exp() + log_q.exp())).log()
        items = 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))
    return (items * weights).sum() / weights.sum()


FORMS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {"lean": consistency_loss, "plain": plain_loss}


def make_inputs(items: int, classes: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(2 * items, classes, dtype=getattr(torch, dtype), device=device, requires_grad=True)
    return logits, torch.ones(items, device=device)


def step(form: str, logits: Tensor, weights: Tensor, divergence: str) -> None:
    FORMS[form](logits, weights, divergence).backward()


def peak_of_step(form: str, items: int, classes: int, dtype: str, divergence: str, device: str) -> float:
    """Returns the extra peak memory of one step."""
    step(form, *make_inputs(2, 100, dtype, device), divergence)  # initializes lazy state
    logits, weights = make_inputs(items, classes, dtype, device)
    return peak_megabytes(lambda: step(form, logits, weights, divergence), device)


def median_milliseconds(
    items: int, classes: int, dtype: str, divergence: str, device: str, repeats: int
) -> dict[str, float]:
    """Returns the median step time of each implementation."""
    logits, weights = make_inputs(items, classes, dtype, device)

    def step_of(form: str) -> None:
        logits.grad = None
        step(form, logits, weights, divergence)

    times = alternating_milliseconds({form: partial(step_of, form) for form in FORMS}, repeats, device)
    return {form: statistics.median(values) for form, values in times.items()}


def write_table(results: dict, folder: Path) -> None:
    setup = results["setup"]
    lines = [
        f"# Consistency loss: logits [2·{setup['items']}, {setup['classes']}], forward and backward",
        "",
        f"`{setup['command']}` on {setup['hardware']}, torch {setup['torch']}, {setup['threads']} thread(s). "
        "Extra peak memory in MB (10⁶ bytes), gradient of the logits included; median time in ms of "
        f"{setup['repeats']} alternating runs.",
        "",
        "| divergence | logits | lean MB | plain MB | lean ms | plain ms |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for case in results["cases"]:
        lean, plain = case["lean"], case["plain"]
        lines.append(
            f"| {case['divergence']} | {case['dtype']} | {lean['peak_mb']:.0f} | {plain['peak_mb']:.0f} "
            f"| {lean['median_ms']:.0f} | {plain['median_ms']:.0f} |"
        )
    folder.mkdir(parents=True, exist_ok=True)
    name = "consistency_loss" if setup["device"] == "cpu" else f"consistency_loss_{setup['device']}"
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=512, help="items of one pass")
    parser.add_argument("--classes", type=int, default=32000)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--divergences", nargs="+", default=tuple(DIVERGENCES), choices=tuple(DIVERGENCES))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = (arguments.items, arguments.classes)
    cases = [
        {"divergence": divergence, "dtype": dtype}
        for dtype in arguments.dtypes
        for divergence in arguments.divergences
    ]
    # Measure memory first: children would inherit free memory from a process that has done large work.
    for case in cases:
        for form in FORMS:
            settings = (form, *sizes, case["dtype"], case["divergence"], arguments.device)
            case[form] = {"peak_mb": measure_memory(peak_of_step, settings, arguments.device)}
    for case in cases:
        settings = (case["dtype"], case["divergence"], arguments.device, arguments.repeats)
        for form, median in median_milliseconds(*sizes, *settings).items():
            case[form]["median_ms"] = median
        print(case, flush=True)
    options = {name: getattr(arguments, name) for name in ("items", "classes", "repeats", "device", "threads")}
    setup = {
        "command": " ".join(
            ["python benchmarks/consistency_loss.py", *(f"--{name} {value}" for name, value in options.items())]
        ),
        "hardware": hardware(arguments.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **options,
    }
    write_table({"setup": setup, "cases": cases}, arguments.output)


if __name__ == "__main__":
    main()
