"""LoRA adapters for the language modeling recipe."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedModel

from hf_attentiondrop.methods import LEARNED_METHODS

from .arguments import ModelArguments, check_path


@dataclass
class LoraArguments:
    _argument_group_name = "LoRA"
    _needing: ClassVar = {"use_peft": ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")}

    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters instead of the weights of the model."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, divided by the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout probability of the inputs of the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt, or all-linear; by default those that PEFT chooses for the model."
        },
    )


def check_base(arguments: ModelArguments, attention: dict[str, Any]) -> None:
    """Checks that there is a base model, and that it has the learned attention weights that the adapter trains.

    Raises:
        ValueError: if either is missing.
        FileNotFoundError: if the base is a local path and nothing is there.
    """
    if not arguments.model_name_or_path:
        raise ValueError("--use_peft adapts a pretrained model: add --model_name_or_path.")
    check_path("--model_name_or_path", arguments.model_name_or_path)
    method = attention["attn_implementation"]
    if (
        method in LEARNED_METHODS
        and not AutoConfig.from_pretrained(arguments.model_name_or_path).attention_reweighting
    ):
        raise ValueError(
            f"--use_peft trains the learned weights of {method} together with the adapter, but "
            f"{arguments.model_name_or_path} has none, so PEFT would load the adapter without them. Save a base that "
            "has them first: "
            f'AutoModelForCausalLM.from_pretrained("{arguments.model_name_or_path}", '
            f'attn_implementation="{method}").save_pretrained("base").'
        )


def add_adapters(model: PreTrainedModel, arguments: LoraArguments) -> PeftModel:
    """Freezes the model and adds LoRA adapters; learned attention weights are trained with them."""
    modules = arguments.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        # PEFT knows this name as a text only.
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        modules_to_save=["reweighting"] if model.config.attention_reweighting else None,
    )
    return get_peft_model(model, config)
