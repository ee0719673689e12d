"""Time and memory of whole training steps and of evaluation, relative to the same model with stock SDPA.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --layers 12 --batch_size 32 --dtype bfloat16

A step is forward, backward and an AdamW update, with the consistency term through the Trainer. Models have their
original widths; `--layers` and `--batch_size` scale them to the machine. Methods with the consistency term have no
dropout, because a shared trunk needs lower layers without it, and are compared to SDPA without dropout. Times are
medians and quartiles of ratios to SDPA in alternating runs. Memory is the peak of building a model and running its
first two steps, on CPU in a new process.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from measuring import alternating_milliseconds, hardware, measure_memory, peak_megabytes, ratio_to
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_attentiondrop import (
    AffineScaledConfig,
    AttentionDropConfig,
    AttentionDropTrainer,
    AttentionDropTrainingArguments,
)


class Method(NamedTuple):
    """A row of the table.

    Args:
        implementation: the `attn_implementation`.
        entries: config entries, from the number of layers per stack and whether the model has a decoder besides its
            encoder.
        consistency: settings of the consistency term; empty for a step without it.
        reference: the method of which times and memory are multiples. Without dropout, the method has none either.
    """

    implementation: str
    entries: Callable[[int, bool], dict[str, Any]] = lambda layers, has_two_stacks: {}
    consistency: dict[str, Any] = {}  # noqa: RUF012  # Never changed.
    reference: str = "sdpa"


NO_DROPOUT = "sdpa, no dropout"


def dropping(variant: str) -> Method:
    return Method("attentiondrop", lambda *_: {"attention_drop": AttentionDropConfig(variant=variant)})


def upper_half(layers: int, has_two_stacks: bool) -> dict[str, Any]:
    """Hard masking in the upper half of the layers; of an encoder and a decoder, in the upper half of the decoder."""
    kinds = {"attentions": ["decoder_self"]} if has_two_stacks else {}
    return {"attention_drop": AttentionDropConfig(layers=list(range(layers // 2, layers)), **kinds)}


def term(entries: Callable[[int, bool], dict[str, Any]], **settings: Any) -> Method:
    return Method("attentiondrop", entries, {"consistency_weight": 1.0, **settings}, NO_DROPOUT)


METHODS = {
    "sdpa": Method("sdpa"),
    "hard": dropping("hard"),
    "blur": dropping("blur"),
    "affine": Method("affine_scaled", lambda *_: {"attention_reweighting": AffineScaledConfig()}),
    NO_DROPOUT: Method("sdpa", reference=NO_DROPOUT),
    "consistency": term(dropping("hard").entries),
    "consistency, 1/2 of the rows": term(dropping("hard").entries, consistency_fraction=0.5),
    "consistency, 1/4 of the rows": term(dropping("hard").entries, consistency_fraction=0.25),
    "consistency, upper half": term(upper_half),
    "consistency, upper half, shared trunk": term(upper_half, consistency_shared_trunk=True),
}


def tokens(batch_size: int, length: int, size: int = 1000) -> torch.Tensor:
    return torch.randint(5, size, (batch_size, length))


def bert(layers: int, batch_size: int) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """BERT-base on texts of 128 tokens, a quarter of them padding."""
    mask = torch.ones(batch_size, 128, dtype=torch.long)
    mask[: batch_size // 2, 64:] = 0
    batch = {"input_ids": tokens(batch_size, 128), "attention_mask": mask, "labels": torch.zeros(batch_size).long()}
    return BertForSequenceClassification, BertConfig(num_hidden_layers=layers), batch


def vit(layers: int, batch_size: int) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """ViT-B/16 on images of 224 pixels, 197 tokens."""
    batch = {"pixel_values": torch.randn(batch_size, 3, 224, 224), "labels": torch.zeros(batch_size).long()}
    return ViTForImageClassification, ViTConfig(num_hidden_layers=layers), batch


def marian(layers: int, batch_size: int) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Marian at its usual width on pairs of 64 tokens."""
    config = MarianConfig(
        vocab_size=8000,
        d_model=512,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return MarianMTModel, config, {"input_ids": tokens(batch_size, 64), "labels": tokens(batch_size, 64)}


def llama(layers: int, batch_size: int) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A LLaMA with the width of a 160M-parameter model and grouped queries, on blocks of 256 tokens."""
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=3072,
    )
    block = tokens(batch_size, 256)
    return LlamaForCausalLM, config, {"input_ids": block, "labels": block}


MODELS = {"bert-base": bert, "vit-b-16": vit, "marian": marian, "llama-160m": llama}


def build(name: str, method: str, arguments: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model_class, config, batch = MODELS[name](arguments.layers, arguments.batch_size)
    if METHODS[method].reference == NO_DROPOUT:
        config.update({key: 0.0 for key, value in vars(config).items() if "dropout" in key and value})
    entries = METHODS[method].entries(arguments.layers, config.is_encoder_decoder)
    for key, value in entries.items():
        setattr(config, key, value)
    dtype = getattr(torch, arguments.dtype)
    model = model_class._from_config(config, attn_implementation=METHODS[method].implementation).to(
        arguments.device, dtype
    )
    batch = {key: value.to(arguments.device) for key, value in batch.items()}
    return model, {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def training_step(name: str, method: str, arguments: argparse.Namespace) -> Callable[[], None]:
    model, batch = build(name, method, arguments)
    optimizer = torch.optim.AdamW(model.train().parameters())
    settings = METHODS[method].consistency
    if settings:
        options = AttentionDropTrainingArguments(
            tempfile.mkdtemp(), use_cpu=arguments.device == "cpu", report_to="none", **settings
        )
        trainer = AttentionDropTrainer(model=model, args=options)
        trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        if settings:
            trainer.training_step(model, dict(batch))
        else:
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def evaluation_step(name: str, method: str, arguments: argparse.Namespace) -> Callable[[], None]:
    model, batch = build(name, method, arguments)
    model.eval()

    @torch.no_grad()
    def step() -> None:
        model(**batch)

    return step


def memory(name: str, method: str, arguments: argparse.Namespace) -> float:
    """Returns the peak memory of building a model and of two steps; the second one includes the optimizer states."""
    torch.set_num_threads(arguments.threads)

    def steps() -> None:
        step = training_step(name, method, arguments)
        step()
        step()

    return peak_megabytes(steps, arguments.device)


def table(results: dict[str, Any]) -> str:
    setup = results["setup"]
    versions = f"torch {setup['torch']}, transformers {setup['transformers']}"
    lines = [
        "# Training steps and evaluation of whole models",
        "",
        f"`{setup['command']}` on {setup['hardware']}, {setup['threads']} thread(s), {setup['dtype']}; {versions}.",
        "",
        f"Models at their usual width with {setup['layers']} layers per stack and {setup['batch_size']} samples per "
        "batch. Step time and peak memory relative to SDPA on the same model (1.00 = no "
        "overhead), those with the consistency term to SDPA without dropout; the upper half of Marian is that of its "
        f"decoder. Times are medians of {setup['repeats']} alternating runs, with quartiles.",
        "",
        "| model | method | training step | training memory | evaluation |",
        "|---|---|---:|---:|---:|",
    ]
    for name, rows in results["models"].items():
        for method, row in rows.items():
            training, evaluation = (
                f"{row[kind]['ratio']:.2f} [{row[kind]['low']:.2f}, {row[kind]['high']:.2f}]"
                for kind in ("training", "evaluation")
            )
            share = row["peak_mb"] / rows[METHODS[method].reference]["peak_mb"]
            lines.append(f"| {name} | {method} | {training} | {share:.2f} | {evaluation} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    wanted = {*arguments.methods, *(METHODS[method].reference for method in arguments.methods)}
    device, methods = arguments.device, [method for method in METHODS if method in wanted]

    # Measure memory first: children would inherit free memory from a process that has done large work.
    models: dict[str, dict[str, Any]] = {
        name: {method: {"peak_mb": measure_memory(memory, (name, method, arguments), device)} for method in methods}
        for name in arguments.models
    }
    options = {
        name: getattr(arguments, name) for name in ("layers", "batch_size", "repeats", "dtype", "device", "threads")
    }
    setup = {
        "command": " ".join(["python benchmarks/train_step.py", *(f"--{k} {v}" for k, v in options.items())]),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **options,
    }
    results: dict[str, Any] = {"setup": setup, "models": {}}
    path = arguments.output / ("train_step" if device == "cpu" else f"train_step_{device}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, rows in models.items():
        for kind, make in (("training", training_step), ("evaluation", evaluation_step)):
            steps = {method: make(name, method, arguments) for method in methods}
            times = alternating_milliseconds(steps, arguments.repeats, device)
            for method in methods:
                rows[method][kind] = ratio_to(times, method, METHODS[method].reference)
        print(name, {method: f"{row['training']['ratio']:.2f}" for method, row in rows.items()}, flush=True)
        # After each model, because all of them take long.
        results["models"][name] = rows
        path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
