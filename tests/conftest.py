"""What every test shares: one thread per process, a fixed seed, no way to the Hub, and Triton kernels run on a processor."""

import os

import pytest
import torch


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Before any import of Triton, which reads this as it defines kernels.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
