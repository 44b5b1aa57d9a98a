"""The orthonormal Walsh-Hadamard rotation that spreads outliers before a row is quantized.

Owns the transform and its block size rule; knows nothing of formats or caches. K and Q are rotated after
RoPE (the scores do not change, so nothing is undone); V is rotated before the store and the attention output
is rotated back, which is the same transform because it is its own inverse.

Source: `-khad`/`-vhad` of ik_llama.cpp (1/sqrt(2) per stage); block rule widened to every multiple of 16.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hybridkv.errors import UsageError

MIN_BLOCK = 16


def rotation_block(head_dim: int) -> int:
    """Return the size of the blocks that are mixed: the largest power of two that divides `head_dim`.

    Raises
    ------
    UsageError
        If `head_dim` is not a multiple of 16: smaller blocks would mix too little to help.
    """
    block = head_dim & -head_dim
    if head_dim <= 0 or block < MIN_BLOCK:
        raise UsageError(
            f"Hadamard rotation of head dim {head_dim}; allowed: multiples of {MIN_BLOCK}",
            hint="leave -khad and -vhad out for this model",
        )
    return block


def rotate(x: Tensor) -> Tensor:
    """Rotate the last dimension, block by block.

    Parameters
    ----------
    x
        Any float dtype, `[..., D]` with D a multiple of 16.

    Returns
    -------
    Tensor
        float32, same shape. Applying it twice gives `x` back.
    """
    head_dim = x.shape[-1]
    block = rotation_block(head_dim)
    matrix = _hadamard(block, x.device)
    blocks = x.float().reshape(*x.shape[:-1], head_dim // block, block)
    return (blocks @ matrix).reshape(x.shape)


@lru_cache(maxsize=32)
def _hadamard(size: int, device: torch.device) -> Tensor:
    """Build Sylvester's Hadamard matrix of `size` rows over sqrt(size), float32: symmetric and orthonormal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix / math.sqrt(size)).to(device=device, dtype=torch.float32)
