"""Where the Triton kernels are tested: on a CUDA device, or without one in Triton's interpreter; see conftest.py."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
INTERPRETED = not ON_CUDA and find_spec("triton") is not None


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers on that device, the same at each call."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)
