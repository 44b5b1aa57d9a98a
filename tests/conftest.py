"""What every test runs under: no hub, quiet Transformers, few threads, and cache memory full of 0xFF."""

from __future__ import annotations

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    # Triton decides on its import whether its interpreter runs kernels, and so do these modules. Afterwards nothing
    # is offered on the CPU that would run in it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import hybridkv.kernels.cuda.delta
        import hybridkv.kernels.cuda.experts
        import hybridkv.kernels.cuda.launch
        import hybridkv.kernels.cuda.layers
        import hybridkv.kernels.cuda.store  # noqa: F401

from transformers.utils import logging

from hybridkv.cache import planes

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh cache memory holds 0xFF: NaN as a float16 or float32 scale, so that reading it cannot go unnoticed."""

    def allocate(shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.full(shape, 0xFF, dtype=torch.uint8, device=device)

    monkeypatch.setattr(planes, "allocate", allocate)
