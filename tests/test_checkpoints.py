"""A checkpoint trained with AttentionDrop loads like any other, also in processes without the package."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

import hf_attentiondrop
from hf_attentiondrop import AttentionDropConfig

from .models import build, inputs


FAMILIES = ["bert", "vit", "marian", "llama"]
WITHOUT_THE_PLUGIN = """
import sys
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    class_name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model, info = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.config._attn_implementation == "sdpa", model.config._attn_implementation
    with torch.no_grad():
        logits = model.eval()(**load_file(folder + "/inputs.safetensors")).logits
    save_file({"logits": logits.contiguous()}, folder + "/logits.safetensors")
assert "hf_attentiondrop" not in sys.modules
"""


@pytest.fixture(scope="module")
def stock_logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns logits of trained models in this process, and after loading in one process without the package."""
    folders, logits = {}, {}
    for family in FAMILIES:
        torch.manual_seed(0)
        drop = AttentionDropConfig(variant="blur", layers=[0])
        model, batch = build(family, attention_drop=drop), inputs(family)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(**batch).loss.backward()
        optimizer.step()
        folders[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(folders[family])
        assert (folders[family] / "model.safetensors").exists()
        save_file(batch, folders[family] / "inputs.safetensors")
        with torch.no_grad():
            logits[family] = model.eval()(**batch).logits
    subprocess.run([sys.executable, "-c", WITHOUT_THE_PLUGIN, *folders.values()], check=True, timeout=300)
    return {
        family: (logits[family], load_file(folders[family] / "logits.safetensors")["logits"]) for family in FAMILIES
    }


@pytest.mark.xdist_group("checkpoints")
@pytest.mark.parametrize("family", FAMILIES)
def test_inference_without_the_plugin_is_bit_identical(
    family: str, stock_logits: dict[str, tuple[Tensor, Tensor]]
) -> None:
    here, stock = stock_logits[family]
    assert torch.equal(stock, here)


def test_the_configuration_is_restored_but_does_not_select_the_implementation(tmp_path: Path) -> None:
    drop = AttentionDropConfig(p=0.25, layers=[1])
    build("bert", attention_drop=drop).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attention_drop == drop
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert stock.config._attn_implementation == "sdpa" and not hf_attentiondrop.report(stock).active
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="attentiondrop")
    assert [row.applied for row in hf_attentiondrop.report(again).rows] == ["", "hard p=0.25 k=5 fill=mask"]


def test_a_lora_adapter_trains_under_perturbation_and_comes_back(tmp_path: Path) -> None:
    base, batch = build("llama", dropout=False, attention_drop={"p": 0.5}), inputs("llama")
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, adapter).train()
    hf_attentiondrop.configure(model, {"variant": "blur"})
    model(**batch).loss.backward()
    assert {row.calls for row in hf_attentiondrop.report(model).rows} == {1}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        trained = model.eval()(**batch).logits
        stock = PeftModel.from_pretrained(build("llama", attn_implementation="sdpa"), tmp_path)(**batch).logits
    assert torch.equal(trained, stock)


def test_saving_does_not_write_module_states(tmp_path: Path) -> None:
    model = build("bert")
    model.train()(**inputs("bert"))
    model.save_pretrained(tmp_path)
    stock = build("bert", attn_implementation="sdpa")
    assert load_file(tmp_path / "model.safetensors").keys() == stock.state_dict().keys()
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
