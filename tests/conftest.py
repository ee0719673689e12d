"""What every test shares: one thread per process, a fixed seed, no way to the Hub, and Triton without a GPU."""

import os

import pytest
import torch


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads this as it defines kernels, the first of them when something imports it.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without a GPU: its graphs as they are, and with derivatives, which it refuses there."""
    from torch.nn.attention import flex_attention as flex

    from hf_attentiondrop.functional import hard_flex

    if not torch.cuda.is_available():
        compiled = torch.compile(flex.flex_attention, fullgraph=True, backend="aot_eager", recompile_limit=64)
        monkeypatch.setattr(hard_flex, "_compiled_flex_attention", lambda: compiled)
        monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
