"""Time and memory of the attention functions relative to stock SDPA, forward and backward.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --dtype bfloat16
    python benchmarks/attention.py --cases bert-128 vit-197 --methods blur

Times are ratios to SDPA with the same mask, in alternating runs: medians, with quartiles in the JSON file. Memory is
the increase of the peak during one step, on CPU in a new process. Eager attention is skipped if its weights would not
fit in memory.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import alternating_milliseconds, hardware, measure_memory, peak_megabytes, ratio_to
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_attentiondrop import AffineScaledConfig, AttentionDropConfig
from hf_attentiondrop.integration.functions import attention_drop_forward, reweighted_attention_forward


@dataclass(frozen=True)
class Case:
    """Shapes and mask of an attention call: `(B, H, N, D)`, with `Hkv` key and value heads."""

    batch_size: int
    heads: int
    length: int
    head_dim: int = 64
    kv_heads: int = 0
    mask: str = "none"
    has_new_mask: bool = False  # at every step, as in a model of a single layer

    def visible(self) -> Tensor | None:
        """`(B|1, 1, N, N)`; `None` if SDPA needs no mask."""
        if self.mask in ("none", "causal"):
            return None
        positions = torch.arange(self.length)
        if self.mask == "padded":
            lengths = torch.linspace(self.length / 2, self.length, self.batch_size).long()
            keep = positions < lengths[:, None]
            return keep[:, None, None].expand(-1, 1, self.length, -1).contiguous()
        causal = positions[:, None] >= positions
        if self.mask == "packed":
            documents = positions // math.ceil(self.length / 4)
            return (causal & (documents[:, None] == documents))[None, None]
        return (causal & (positions[:, None] - positions < self.length // 4))[None, None]


CASES = {
    "bert-128": Case(8, 12, 128),
    "bert-128 padded": Case(8, 12, 128, mask="padded"),
    "bert-128 padded, new mask": Case(8, 12, 128, mask="padded", has_new_mask=True),
    "vit-197": Case(8, 12, 197),
    "bert-512": Case(2, 12, 512),
    "encoder-1024": Case(2, 8, 1024),
    "encoder-1024 padded": Case(2, 8, 1024, mask="padded"),
    "encoder-1024 padded, new mask": Case(2, 8, 1024, mask="padded", has_new_mask=True),
    "causal-1024": Case(2, 8, 1024, mask="causal"),
    "causal-1024 GQA": Case(2, 8, 1024, kv_heads=2, mask="causal"),
    "packed-1024": Case(2, 8, 1024, mask="packed"),
    "window-1024": Case(2, 8, 1024, mask="window"),
    "causal-4096": Case(1, 8, 4096, mask="causal"),
    "encoder-4096": Case(1, 8, 4096),
    "causal-16384": Case(1, 2, 16384, mask="causal"),
}
GROWTH = {f"growth-{length}": Case(1, 2, length, mask="causal") for length in (1024, 2048, 4096, 8192)}


@dataclass(frozen=True)
class Method:
    """How an attention module calls attention.

    Args:
        attend: the attention function.
        implementation: its name in Transformers.
        entries: entries of the model config.
        has_states: whether the function takes the hidden states.
    """

    attend: Callable[..., tuple[Tensor, Tensor | None]]
    implementation: str
    entries: dict[str, Any] = field(default_factory=dict)
    has_states: bool = False


def drop(**settings: Any) -> Method:
    """A perturbation with these settings."""
    return Method(attention_drop_forward, "attentiondrop", {"attention_drop": AttentionDropConfig(**settings)})


def reweighting(implementation: str, config: Any) -> Method:
    """A learned reweighting."""
    return Method(reweighted_attention_forward, implementation, {"attention_reweighting": config}, has_states=True)


SDPA = Method(sdpa_attention_forward, "sdpa")
METHODS = {
    "eager": Method(eager_attention_forward, "eager"),
    "hard": drop(variant="hard"),
    "hard, zero": drop(variant="hard", fill="zero"),
    "blur": drop(variant="blur"),
    "dropkey": drop(variant="dropkey"),
    "dropkey, column": drop(variant="dropkey", axis="column"),
    "drophead": drop(variant="drophead"),
    "affine": reweighting("affine_scaled", AffineScaledConfig()),
}
# Eager attention holds several matrices of this size.
MOST_WEIGHTS = 2**27


def attention_module(case: Case, implementation: str, entries: dict[str, Any]) -> nn.Module:
    """An attention module of a model, in training mode."""
    hidden_size = case.heads * case.head_dim
    config = LlamaConfig(
        hidden_size=hidden_size,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads or case.heads,
        num_hidden_layers=1,
        intermediate_size=hidden_size,
        vocab_size=8,
    )
    for name, value in entries.items():
        setattr(config, name, value)
    return LlamaModel._from_config(config, attn_implementation=implementation).layers[0].self_attn.train()


def make_step(method: str, case: Case, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Forward and backward of an attention call by one method."""
    torch.manual_seed(0)
    visible, kv_heads = case.visible(), case.kv_heads or case.heads
    # Memory layout of models: all heads of a token are contiguous.
    shapes = [(case.batch_size, case.length, heads, case.head_dim) for heads in (case.heads, kv_heads, kv_heads)]
    qkv = [torch.randn(shape, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for shape in shapes]
    leaves = list(qkv)
    mask = None if visible is None else visible.to(device)
    options: dict[str, Any] = {"is_causal": case.mask == "causal"}
    settings = {"sdpa": SDPA, **METHODS}[method]
    module = attention_module(case, settings.implementation, settings.entries).to(device, dtype)
    if settings.has_states:
        states = torch.randn(case.batch_size, case.length, case.heads * case.head_dim, dtype=dtype, device=device)
        leaves.append(states.requires_grad_())
        options["reweighting_states"] = states
    if method == "eager":
        if case.mask == "causal":
            mask = torch.ones(case.length, case.length, dtype=torch.bool, device=device).tril()[None, None]
        if mask is not None:
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)
    # As in a model, the gradient of the output comes from later layers, and neither tensor outlives its use.
    direction = torch.randn(case.batch_size, case.length, case.heads, case.head_dim, dtype=dtype, device=device)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        call_mask = mask.clone() if case.has_new_mask else mask
        output, _ = settings.attend(module, *qkv, call_mask, scaling=case.head_dim**-0.5, dropout=0.0, **options)
        loss = (output * direction).sum()
        del output
        loss.backward()

    return step


def memory(method: str, case: Case, dtype: torch.dtype, device: str, threads: int) -> float:
    """Extra peak memory of a step, gradients included."""
    torch.set_num_threads(threads)
    if device == "cpu":
        make_step(method, Case(1, 2, 8, mask=case.mask), dtype, device)()  # loads lazily loaded libraries
    return peak_megabytes(make_step(method, case, dtype, device), device)


def fits(method: str, case: Case) -> bool:
    return method != "eager" or case.batch_size * case.heads * case.length**2 <= MOST_WEIGHTS


def growth(cases: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Exponents of time and memory in the length, by least squares over the logarithms."""
    lengths = torch.tensor([math.log(GROWTH[name].length) for name in cases], dtype=torch.float64)
    methods = set.intersection(*(set(rows) for rows in cases.values()))
    exponents: dict[str, dict[str, float]] = {}
    for method in sorted(methods):
        exponents[method] = {}
        for measure_name in ("median_ms", "peak_mb"):
            values = torch.tensor([math.log(rows[method][measure_name]) for rows in cases.values()]).double()
            centred = lengths - lengths.mean()
            exponents[method][measure_name] = ((centred * values).sum() / centred.square().sum()).item()
    return exponents


def table(results: dict[str, Any]) -> str:
    setup = results["setup"]
    methods = ["sdpa", *setup["methods"]]

    def cell(row: dict[str, float] | None) -> str:
        return "-" if row is None else f"{row['ratio']:.2f} ({row['peak_mb']:.0f})"

    lines = [
        "# Attention, forward and backward",
        "",
        f"`{setup['command']}` on {setup['hardware']}, {setup['threads']} thread(s), {setup['dtype']}; torch "
        f"{setup['torch']}, transformers {setup['transformers']}.",
        "",
        "Time relative to SDPA with the same mask (1.00 = no overhead), median of "
        f"{setup['repeats']} alternating runs; in parentheses the extra peak memory in MB (10⁶ bytes), including "
        "gradients. A dash means that the weights would not fit in memory. Methods analyze a mask once, because the "
        "layers of a model share it; rows with a new mask at every step include the analysis in every step.",
        "",
        "| case | B, H, N, D | SDPA ms | " + " | ".join(methods) + " |",
        "|---|---|---:|" + "---:|" * len(methods),
    ]
    for name, rows in results["cases"].items():
        case = {**CASES, **GROWTH}[name]
        shape = f"{case.batch_size}, {case.heads}, {case.length}, {case.head_dim}"
        cells = " | ".join(cell(rows.get(method)) for method in methods)
        lines.append(f"| {name} | {shape} | {rows['sdpa']['median_ms']:.1f} | {cells} |")
    if results["growth"]:
        lines += [
            "",
            "Exponents of time and of memory in the length, from the rows named growth (1 is linear, 2 quadratic):",
            "",
            "| method | time | memory |",
            "|---|---:|---:|",
        ]
        lines += [
            f"| {method} | {exponents['median_ms']:.2f} | {exponents['peak_mb']:.2f} |"
            for method, exponents in results["growth"].items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {**CASES, **GROWTH}
    parser.add_argument("--cases", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    dtype, device = getattr(torch, arguments.dtype), arguments.device
    methods = {name: ["sdpa", *(m for m in arguments.methods if fits(m, known[name]))] for name in arguments.cases}
    # Memory first: forked processes would inherit the free memory of a process that has run large steps.
    peaks = {
        (name, method): measure_memory(memory, (method, known[name], dtype, device, arguments.threads), device)
        for name in arguments.cases
        for method in methods[name]
    }
    cases = {}
    for name in arguments.cases:
        steps = {method: make_step(method, known[name], dtype, device) for method in methods[name]}
        times = alternating_milliseconds(steps, arguments.repeats, device)
        cases[name] = {
            method: {**ratio_to(times, method, "sdpa"), "peak_mb": peaks[name, method]} for method in methods[name]
        }
        print(name, {method: f"{row['ratio']:.2f}" for method, row in cases[name].items()}, flush=True)
    grown = {name: rows for name, rows in cases.items() if name in GROWTH}
    options = {name: getattr(arguments, name) for name in ("repeats", "dtype", "device", "threads")}
    setup = {
        "command": " ".join(["python benchmarks/attention.py", *(f"--{k} {v}" for k, v in options.items())]),
        "hardware": hardware(arguments.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "methods": arguments.methods,
        **options,
    }
    results = {"setup": setup, "cases": cases, "growth": growth(grown) if len(grown) > 1 else {}}
    name = "attention" if arguments.device == "cpu" else f"attention_{arguments.device}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / f"{name}.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
