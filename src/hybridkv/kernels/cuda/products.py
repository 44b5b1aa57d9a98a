"""A matrix times one token's vector, as one Triton kernel that reads the matrix before it has the vector.

A decode step reads every weight once, and loses time where nothing is read: between two kernels, and until the bytes of
the second come. Weights are written by no kernel of a step. So a program asks for all of its rows' bytes, which it
holds in registers, and only then waits for the kernel before it, which makes the vector; and a SwiGLU behind a product
is done by the program that owns both of its numbers. Arithmetic is float32. Several tokens' rows are torch's business.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridkv.kernels.cuda.layers import swiglu
from hybridkv.kernels.cuda.overlap import overlapping, overlaps

WARPS = 4
SHORT_ROW = 3072
"""Elements of a matrix row up to which a program takes two, so that it has enough to ask for."""
MOST_INPUTS = 16384
"""Elements of a matrix row that the registers of a program hold with room to spare."""


class Tiling(NamedTuple):
    """Of a matrix: rows of a program, and elements of a row that it takes at a time, how many times."""

    OUT: int
    IN: int
    PIECES: int


def tiling_of(n_in: int) -> Tiling:
    """Choose the fastest on an H100 of some ten tilings, at the widths of 4B and 35B-A3B models."""
    outs, most = (2, 512) if n_in <= SHORT_ROW else (1, 1024)
    inputs = min(most, triton.next_power_of_2(n_in))
    return Tiling(outs, inputs, triton.cdiv(n_in, inputs))


@triton.jit(do_not_specialize=["n_out"])
def _product(x, weight, out, n_in, n_out, SWIGLU: tl.constexpr, PIECES: tl.constexpr, IN: tl.constexpr,
             OUT: tl.constexpr, OVERLAPS: tl.constexpr):  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()
    outs = tl.program_id(0) * OUT + tl.arange(0, OUT)
    cols = tl.arange(0, IN)[None, :]
    rows = weight + outs[:, None].to(tl.int64) * n_in + cols
    ups = rows + n_out.to(tl.int64) * n_in
    held = ()
    for piece in tl.static_range(PIECES):
        inside = (outs < n_out)[:, None] & (piece * IN + cols < n_in)
        held = held + (tl.load(rows + piece * IN, mask=inside, other=0.0, eviction_policy="evict_first"),)
        if SWIGLU:
            held = held + (tl.load(ups + piece * IN, mask=inside, other=0.0, eviction_policy="evict_first"),)
    if OVERLAPS:
        gdc_wait()
    # Each matrix row's threads read the vector for themselves: handing it round would take two barriers.
    everywhere = cols + tl.zeros((OUT, 1), tl.int32)
    total = tl.zeros((OUT, IN), tl.float32)
    total_up = tl.zeros((OUT, IN), tl.float32)
    for piece in tl.static_range(PIECES):
        at = piece * IN + everywhere
        value = tl.load(x + at, mask=at < n_in, other=0.0).to(tl.float32)
        if SWIGLU:
            total += value * held[2 * piece].to(tl.float32)
            total_up += value * held[2 * piece + 1].to(tl.float32)
        else:
            total += value * held[piece].to(tl.float32)
    result = tl.sum(total, 1)
    if SWIGLU:
        result *= tl.sigmoid(result) * tl.sum(total_up, 1)
    tl.store(out + outs, result.to(out.dtype.element_ty), mask=outs < n_out)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows by a matrix.

    Parameters
    ----------
    x
        Any float dtype, `[N, in]`.
    weight
        In x's dtype, `[out, in]`.

    Returns
    -------
    Tensor
        In x's dtype, `[N, out]`.
    """
    return one_row(x, weight) if _takes(x, weight) else F.linear(x, weight)


def multiply_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `silu(gate) * up` of rows `[N, in]` times joined matrices `[gate | up, in]`; `[N, out]` in x's dtype."""
    return one_row(x, weight, gated=True) if _takes(x, weight) else swiglu(F.linear(x, weight))


def one_row(x: Tensor, weight: Tensor, *, gated: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Compute `multiply` for one row `[1, in]`, or with `gated` `multiply_swiglu`.

    In x's dtype, or another if one is given; the matrix may have a dtype of its own.
    """
    assert x.shape == (1, weight.shape[1]) and x.is_contiguous() and weight.is_contiguous(), (x.shape, weight.shape)
    n_in, n_out = weight.shape[1], weight.shape[0] // (2 if gated else 1)
    tiling = tiling_of(n_in)
    out = torch.empty((1, n_out), dtype=x.dtype if dtype is None else dtype, device=x.device)
    _product[(triton.cdiv(n_out, tiling.OUT),)](
        x, weight, out, n_in, n_out, SWIGLU=gated, **tiling._asdict(), num_warps=WARPS, **overlapping(x.device)
    )
    return out


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Check whether the kernel is the faster one: one row, and a device on which it can begin before its turn."""
    return len(x) == 1 and overlaps(x.device) and weight.shape[1] <= MOST_INPUTS and weight.is_contiguous()
