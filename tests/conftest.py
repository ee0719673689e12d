"""Shared by all tests: one thread per process, a fixed seed, no access to the Hub, and Triton without a GPU."""

import gc
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from .recipe_runs import ROOT, launch, run_shortly


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads this when it defines kernels, the first of them on import.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests as slow if their file has a `quick` mark that does not name them."""
    for item in items:
        quick = item.get_closest_marker("quick")
        if quick is not None and item.name not in quick.args:
            item.add_marker("slow")


@pytest.fixture(scope="module", autouse=True)
def fast_garbage_collection() -> None:
    """Leaves out what lives already: the Trainer collects garbage after each training, and walks a million objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Otherwise Triton's bindings report leaks when the process ends.


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from recipe name to the folder of one short run, shared by all tests that only read it."""
    return cache(lambda name: run_shortly(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of `two_processes.py`, launched on two CPU processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--module", "tests.two_processes"]
    launch(*options, folder, cwd=ROOT)
    return folder


@pytest.fixture
def flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without a GPU: uncompiled graphs, with the derivatives that it does not support on CPU."""
    from torch.nn.attention import flex_attention as flex

    from hf_attentiondrop.functional import bit_mask

    if not torch.cuda.is_available():
        compiled = cache(partial(bit_mask.compile_for_many_calls, fullgraph=True, backend="aot_eager"))
        monkeypatch.setattr(bit_mask, "_compile", compiled)
        monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blockwise attention at any length, with blocks so small that the short sequences of the tests need several."""
    from hf_attentiondrop.functional.blockwise import blocks
    from hf_attentiondrop.methods import long_sequences

    monkeypatch.setattr(long_sequences, "FEW_SCORES", 0)
    monkeypatch.setattr(blocks, "QUERIES_PER_BLOCK", 4)
    monkeypatch.setattr(blocks, "SCORES_PER_BLOCK", 2 * 4 * 9)
