"""DropConnect: the masks of one layer, which layers of a model it acts on, and what must stay as it was."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from hf_attentiondrop import apply_dropconnect, dropconnect_of
from hf_attentiondrop.functional.dropconnect import drop_weights
from hf_attentiondrop.training.dropconnect import DropConnectLayer, dropconnect_card


IDS = torch.arange(24).view(2, 12)
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def llama(**kwargs: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **kwargs}, intermediate_size=32))


def gpt2() -> GPT2LMHeadModel:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, **off))


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(**SMALL, intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def dropping(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, DropConnectLayer)}


def step(model: nn.Module, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a training step, with masks that the seed determines."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    parameters = {name.removeprefix("_orig_mod."): parameter for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    return loss.detach(), copy.deepcopy(gradients)


def assert_same_step(first: tuple[Tensor, dict[str, Tensor]], second: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], msg=lambda text, name=name: f"{name}: {text}")


# One layer


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6)], ids=["Linear", "Conv1D"])
def test_forward_and_gradient_are_those_of_the_definition(make: Callable[[], nn.Module]) -> None:
    layer, p = make().double(), 0.4
    nn.init.normal_(layer.bias)
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (layer.weight, layer.bias))
    first, second = (torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6).requires_grad_() for _ in range(2))
    apply_dropconnect(layer, p)
    torch.manual_seed(3)
    output = layer(first)
    torch.manual_seed(3)
    mask = (torch.rand(weight.shape) >= p).double()
    dropped = mask * weight / (1 - p)
    expected = second @ (dropped if isinstance(layer, Conv1D) else dropped.T) + bias
    assert 0 < mask.sum() < mask.numel()
    torch.testing.assert_close(output, expected)
    seen = torch.autograd.grad(output.square().sum(), (first, layer.weight, layer.bias))
    right = torch.autograd.grad(expected.square().sum(), (second, weight, bias))
    torch.testing.assert_close(seen, right)
    assert (seen[1][mask == 0] == 0).all()


def test_gradients_are_numerically_right() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def function(weight: Tensor) -> Tensor:
        torch.manual_seed(1)
        return drop_weights(weight, 0.3)

    assert torch.autograd.gradcheck(function, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.75])
def test_rate_and_mean(p: float, dtype: torch.dtype) -> None:
    """Random numbers in bfloat16 are multiples of 1/256: p = 0.001 would become 0.004."""
    weight = torch.ones(1000, 1000, dtype=dtype)
    dropped = drop_weights(weight, torch.tensor(p, dtype=torch.float64))
    assert dropped.dtype == dtype
    deviation = (p * (1 - p) / weight.numel()) ** 0.5
    assert abs((dropped == 0).double().mean().item() - p) < 5 * deviation
    assert abs(dropped.double().mean().item() - 1) < 5 * deviation / (1 - p) + torch.finfo(dtype).eps
    torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / (1 - p)], dtype=dtype))


def test_weights_are_dropped_independently_of_each_other_and_of_other_calls() -> None:
    weight = torch.ones(400, 400)
    first, second = ((drop_weights(weight, 0.5) == 0).double() - 0.5 for _ in range(2))
    bound = 5 * 0.25 / weight.numel() ** 0.5
    assert abs((first * second).mean()) < bound
    assert abs((first[1:] * first[:-1]).mean()) < bound
    assert abs((first[:, 1:] * first[:, :-1]).mean()) < bound
    assert first.mean(0).abs().max() < 5 * 0.5 / 400**0.5 and first.mean(1).abs().max() < 5 * 0.5 / 400**0.5


def test_at_zero_nothing_changes() -> None:
    weight = torch.randn(3, 4)
    assert torch.equal(drop_weights(weight, torch.zeros(())), weight)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_p_out_of_range(p: float) -> None:
    with pytest.raises(ValueError, match=rf"`p` must be a number in \[0, 1\), got {p}"):
        apply_dropconnect(nn.Linear(2, 2), p)
    with pytest.raises(ValueError, match=rf"`p` must be a number in \[0, 1\), got {p}"):
        drop_weights(torch.ones(2), p)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"p": "0.1"}, ValueError, "`p` must be a number in .* got '0.1'"),
        ({"target_modules": "*query"}, ValueError, "regular expression for whole names, or a list of names, got"),
        ({"target_modules": "query"}, ValueError, "A string is a regular expression for whole names"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_dropconnect(bert(), **{"p": 0.1, **arguments})
    with pytest.raises(TypeError, match="`model` must be a torch.nn.Module, got str"):
        apply_dropconnect("bert", 0.1)


# A model


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_training_drops_and_evaluation_is_unchanged(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    plain = copy.deepcopy(model)
    apply_dropconnect(model, p=0.3)
    assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(IDS).logits, plain.eval()(IDS).logits)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_by_default_every_linear_layer_but_the_output_embeddings(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    apply_dropconnect(model, p=0.3)
    assert dropping(model) == linear - {head}
    apply_dropconnect(model, p=0.3, target_modules="all-linear")
    assert dropping(model) == linear - {head}


def test_layer_that_shares_its_weight_with_an_embedding_is_left_out() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8))
    model[2].weight = model[0].weight
    apply_dropconnect(model, p=0.3)
    assert dropping(model) == {"1"}


def test_named_output_embeddings_drop_while_the_tied_input_embeddings_do_not() -> None:
    model = llama(tie_word_embeddings=True).train()
    apply_dropconnect(model, p=0.5, target_modules=["lm_head"])
    assert torch.equal(model.model(IDS)[0], model.model(IDS)[0])
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert_same_step(step(model, 1), step(model, 1))


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj"], {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
        (["proj"], None),
        (["model.layers.1.mlp.up_proj", "lm_head"], {"model.layers.1.mlp.up_proj", "lm_head"}),
        (r".*\.0\.self_attn\.[qk]_proj", {f"model.layers.0.self_attn.{name}_proj" for name in "qk"}),
        ("q_proj", None),
        (["q_proj", "nothing"], None),
        (["self_attn"], None),
        ([], None),
    ],
)
def test_target_modules_select_as_in_peft(target_modules: str | list[str], expected: set[str] | None) -> None:
    model = llama()
    if expected is None:
        with pytest.raises(ValueError, match="target_modules"):
            apply_dropconnect(model, p=0.1, target_modules=target_modules)
        assert dropping(model) == set()
    else:
        apply_dropconnect(model, p=0.1, target_modules=target_modules)
        assert dropping(model) == expected
        adapted = get_peft_model(llama(), LoraConfig(target_modules=target_modules)).targeted_module_names
        assert set(adapted) == expected


def test_unknown_name_is_named_with_those_there_are() -> None:
    message = "'query' matches no linear layer of LlamaForCausalLM, .* down_proj, gate_proj, k_proj, lm_head"
    with pytest.raises(ValueError, match=message):
        apply_dropconnect(llama(), p=0.1, target_modules=["q_proj", "query"])


def test_later_call_replaces_the_earlier_one() -> None:
    model = llama()
    assert dropconnect_of(model) is None
    apply_dropconnect(model, p=0.1)
    assert dropconnect_of(model) == 0.1
    apply_dropconnect(model, p=0.2, target_modules=["q_proj"])
    assert dropconnect_of(model) == 0.2 and len(dropping(model)) == 2
    apply_dropconnect(model, p=0.0)
    assert dropconnect_of(model) is None
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert "dropconnect_p" not in vars(model.model.layers[0].self_attn.q_proj)
    assert torch.equal(model.train()(IDS).logits, model(IDS).logits)


def test_card_has_the_rate_and_the_paper() -> None:
    card = dropconnect_card(0.2)
    assert card.settings == {"p": 0.2} and card.name == "DropConnect" and "wan2013dropconnect" in card.citation


# What cannot take it


def test_models_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="Sequential has none: DropConnect would have no effect"):
        apply_dropconnect(nn.Sequential(nn.Conv2d(1, 1, 1)), p=0.1)


def test_layers_that_compute_differently() -> None:
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    for layer in (parametrized, nn.MultiheadAttention(4, 1)):
        with pytest.raises(ValueError, match="Expected a plain nn.Linear or Conv1D, .* is a (Parametr|NonDyn)"):
            apply_dropconnect(nn.Sequential(layer), p=0.1)


def test_quantized_models() -> None:
    model = llama()
    model.is_quantized = True
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantized"):
        apply_dropconnect(model, p=0.1)


def test_replaced_forward_would_hide_it() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = nn.Sequential(nn.Linear(2, 2))
    add_hook_to_module(model[0], ModelHook())
    with pytest.raises(ValueError, match="that of 0 was replaced"):
        apply_dropconnect(model, p=0.1)
    assert dropconnect_of(model) is None


def test_layer_that_was_parametrized_afterwards_is_not_left_dropping() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    apply_dropconnect(model, p=0.1)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="0 is a ParametrizedDropConnectLinear"):
        apply_dropconnect(model, p=0.0)


# What must work with it


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_checkpoint_is_that_of_the_plain_model(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = build()
    plain = copy.deepcopy(model)
    apply_dropconnect(model, p=0.3)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path / "dropping")
    plain.save_pretrained(tmp_path / "plain")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "dropping" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    reloaded = type(model).from_pretrained(tmp_path / "dropping")
    assert dropconnect_of(reloaded) is None
    assert torch.equal(reloaded(IDS).logits, plain.eval()(IDS).logits)
    model.load_state_dict(reloaded.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_have_a_p_for_themselves(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = llama().train()
    apply_dropconnect(model, p=0.3)
    other = copied(model)
    assert_same_step(step(model, 5), step(other, 5))
    apply_dropconnect(other, p=0.6)
    assert (dropconnect_of(model), dropconnect_of(other)) == (0.3, 0.6)


def test_casting_leaves_p_exact() -> None:
    model = llama()
    apply_dropconnect(model, p=0.1)
    assert dropconnect_of(model.to(torch.bfloat16)) == 0.1
    assert model.train()(IDS).logits.dtype == torch.bfloat16


def test_autocast() -> None:
    layer = nn.Linear(64, 64)
    apply_dropconnect(layer, p=0.5)
    x = torch.randn(2, 64)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.02, rtol=0.02)
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_masks(use_reentrant: bool) -> None:
    model = llama().train()
    apply_dropconnect(model, p=0.4)
    expected = step(model, 2)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_step(step(model, 2), expected)


def test_layer_compiles_once_for_every_p() -> None:
    torch._dynamo.reset()
    counters.clear()
    layer = nn.Linear(8, 8)
    apply_dropconnect(layer, p=0.1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for p in (0.2, 0.5):
        apply_dropconnect(compiled, p)
        torch.manual_seed(0)
        output = compiled(torch.ones(1, 8))
        torch.manual_seed(0)
        torch.testing.assert_close(output, layer(torch.ones(1, 8)))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_model_compiles_once_for_every_p() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = llama(num_hidden_layers=1).train()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_step(step(compiled, 4), step(reference, 4))
    graphs = counters["stats"]["unique_graphs"]
    for p in (0.2, 0.3, 0.7):
        apply_dropconnect(compiled, p)
        apply_dropconnect(reference, p)
        assert_same_step(step(compiled, 4), step(reference, 4))
        assert counters["stats"]["unique_graphs"] == graphs + 1
    apply_dropconnect(compiled, p=0.1, target_modules=r"model\.layers\.0\..*_proj")
    assert len(dropping(model)) == 7
    assert_same_step(step(compiled.eval(), 4), step(reference.eval(), 4))


def lora(model: PreTrainedModel) -> peft.PeftModel:
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted


def test_lora_drops_frozen_and_adapter_weights(tmp_path: Path) -> None:
    model = lora(llama()).train()
    plain = copy.deepcopy(model)
    apply_dropconnect(model, p=0.4)
    inside = {"base_layer", "lora_A.default", "lora_B.default"}
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {f"{q_proj}.{name}" for name in inside} <= dropping(model)
    assert "base_model.model.lm_head" not in dropping(model)
    _, gradients = step(model, 1)
    assert gradients and all("lora_" in name for name in gradients)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload()
    merged = plain.merge_and_unload().state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in model.base_model.model.state_dict().items())
    peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")


@pytest.mark.parametrize("target_modules", [["q_proj"], r"model\.layers\.\d\.self_attn\.q_proj"])
def test_name_of_an_adapted_layer_selects_its_base_weight_and_its_adapters(target_modules: str | list[str]) -> None:
    model = lora(llama())
    apply_dropconnect(model, p=0.4, target_modules=target_modules)
    assert {name.partition("q_proj.")[2] for name in dropping(model)} == {
        "base_layer",
        "lora_A.default",
        "lora_B.default",
    }
    apply_dropconnect(model, p=0.4, target_modules=r".*\.lora_A\.default")
    assert len(dropping(model)) == 2


def test_adapters_on_a_model_that_drops_already() -> None:
    model = llama().train()
    apply_dropconnect(model, p=0.4)
    model = lora(model).train()
    assert dropconnect_of(model) == 0.4
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    apply_dropconnect(model, p=0.0)
    assert dropping(model) == set()


def _distributed_step(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(llama().train())
    apply_dropconnect(model, p=0.4, target_modules=r"model\.layers\..*")
    torch.save((dropping(model), step(model, rank)), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_average_gradients_of_different_masks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_distributed_step, (str(tmp_path),), nprocs=2)
    names, results = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    torch.manual_seed(0)
    model = llama().train()
    apply_dropconnect(model, p=0.4, target_modules=r"model\.layers\..*")
    assert names[0] == names[1] == {f"module.{name}" for name in dropping(model)}
    alone = [step(model, rank) for rank in range(2)]
    assert not torch.equal(alone[0][0], alone[1][0])
    for name in alone[0][1]:
        mean = (alone[0][1][name] + alone[1][1][name]) / 2
        for _, gradients in results:
            torch.testing.assert_close(gradients[f"module.{name}"], mean)


def test_reloads_through_the_auto_class(tmp_path: Path) -> None:
    model = llama()
    apply_dropconnect(model, p=0.3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert F.mse_loss(loaded(IDS).logits, model.eval()(IDS).logits) == 0
