"""A decoder layer's work between its matrix products, each in one launch: Triton kernels and how they are called.

A layer of Transformers' own code launches some sixty kernels for a token; the launches, not the bytes, are its time.
Every kernel here takes rows `[N, width]` whose last dim is contiguous, so that slices of one joined projection can be
given as they are. Arithmetic is float32, results are in the dtype of what they go into.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridkv.kernels.cuda.activations import Act, activate
from hybridkv.kernels.cuda.overlap import begin, overlapping

ELEMENTS = 1024
"""Elements per program of an elementwise kernel."""

WATCHED = 4096
"""Elements that one program looks through for non-finite values."""


@triton.jit
def _add_norm(x, delta, weight, out, x_stride, delta_stride, delta_part, out_stride, width, eps, offset, scale,
              PARTS: tl.constexpr, OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    begin(OVERLAPS)
    at = x + row * x_stride + cols
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            of_part = delta + part * delta_part + row * delta_stride + cols
            added += tl.load(of_part, mask=inside, other=0.0).to(tl.float32)
        value += added * scale
        rounded = value.to(x.dtype.element_ty)  # the residual is what later layers read
        tl.store(at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    value *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(out + row * out_stride + cols, value.to(out.dtype.element_ty), mask=inside)


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add `delta * scale` to `x` in place, if there is one, and return RMSNorm of the sum.

    Parameters
    ----------
    x, delta
        Any float dtype, `[N, width]`; delta may be in parts that are still to be added, `[parts, N, width]`.
    weight
        `[width]`; `weight + offset` multiplies.
    dtype
        Of the result; x's by default.

    Returns
    -------
    Tensor
        `[N, width]`, contiguous.
    """
    out = torch.empty(x.shape, dtype=x.dtype if dtype is None else dtype, device=x.device)
    n_rows, width = x.shape
    block = triton.next_power_of_2(width)
    parts = x[None, :0] if delta is None else delta.reshape(-1, n_rows, width)
    _add_norm[(n_rows,)](
        x, parts, weight, out, x.stride(0), parts.stride(1), parts.stride(0), out.stride(0), width, eps, offset, scale,
        PARTS=0 if delta is None else len(parts), BLOCK=block, num_warps=_warps(block), **overlapping(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _activated(x, out, x_stride, out_stride, width, factor, ACT: tl.constexpr, OVERLAPS: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    begin(OVERLAPS)
    value = activate(tl.load(x + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32), ACT)
    if ACT != "relu2":
        value *= tl.load(x + row * x_stride + width + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + cols, (value * factor).to(out.dtype.element_ty), mask=inside)


def activated(x: Tensor, act: Act, *, factor: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Compute `act(gate) * up * factor` of joined rows `[N, gate | up]`, or `relu(x)^2 * factor` of rows `[N, width]`.

    Parameters
    ----------
    dtype
        Of the result; x's by default.

    Returns
    -------
    Tensor
        `[N, width]`, contiguous.
    """
    n_rows, width = x.shape[0], x.shape[1] if act == "relu2" else x.shape[1] // 2
    out = torch.empty((n_rows, width), dtype=x.dtype if dtype is None else dtype, device=x.device)
    _activated[(n_rows, triton.cdiv(width, ELEMENTS))](
        x, out, x.stride(0), out.stride(0), width, factor, ACT=act, BLOCK=ELEMENTS, **overlapping(x.device)
    )
    return out


def swiglu(both: Tensor, *, factor: float = 1.0) -> Tensor:
    """Compute `silu(gate) * up * factor` of joined rows `[N, gate | up]`; `[N, width]` in their dtype."""
    return activated(both, "silu", factor=factor)


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _norm_rope(x, weight, positions, frequencies, out, x_row, x_head, out_row, out_head, head_dim, rotated, eps, offset,
               magnitude, NORM: tl.constexpr, NEIGHBOURS: tl.constexpr, OVERLAPS: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, BLOCK)
    inside = dims < head_dim
    half = rotated // 2
    turned = dims < rotated
    # The other of the two dims that turn together; itself where nothing turns.
    if NEIGHBOURS:
        first, index = dims % 2 == 0, dims // 2
        partner = tl.where(turned, tl.where(first, dims + 1, dims - 1), dims)
    else:
        first, index = dims < half, tl.where(dims < half, dims, dims - half)
        partner = tl.where(turned, tl.where(first, dims + half, dims - half), dims)
    source = x + row * x_row + head * x_head
    begin(OVERLAPS)
    value = tl.load(source + dims, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(value * value, 0) / head_dim + eps)
        value *= scale * (tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32) + offset)
        other *= scale * (tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32) + offset)
    frequency = tl.load(frequencies + index, mask=turned, other=0.0).to(tl.float32)
    angle = tl.load(positions + row).to(tl.float32) * frequency
    value = value * tl.cos(angle) + tl.where(first, -other, other) * tl.sin(angle)
    value = tl.where(turned, value * magnitude, value)
    tl.store(out + row * out_row + head * out_head + dims, value.to(out.dtype.element_ty), mask=inside)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    positions: Tensor,
    frequencies: Tensor,
    *,
    offset: float = 0.0,
    pairs: Literal["halves", "neighbours"] = "halves",
    magnitude: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Apply RMSNorm to every head, and RoPE to its first `2 * len(frequencies)` dims.

    Parameters
    ----------
    x
        Any float dtype, `[N, heads, D]`, the last dim contiguous.
    weight
        `[D]`; `weight + offset` multiplies. None for no norm.
    positions
        int64 `[N]`.
    frequencies
        float32 `[rotated / 2]`: radians per position; none for no RoPE.
    pairs
        Which dims turn together: i and i + rotated / 2, or 2 i and 2 i + 1.
    magnitude
        Factor on cosines and sines.
    dtype
        Of the result; x's by default.

    Returns
    -------
    Tensor
        `[N, heads, D]`, contiguous.
    """
    assert positions.is_contiguous() and frequencies.is_contiguous()
    n_rows, n_heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype if dtype is None else dtype, device=x.device)
    _norm_rope[(n_rows, n_heads)](
        x, x if weight is None else weight, positions, frequencies, out, x.stride(0), x.stride(1), out.stride(0),
        out.stride(1), head_dim, 2 * len(frequencies), eps, offset, magnitude, NORM=weight is not None,
        NEIGHBOURS=pairs == "neighbours", BLOCK=triton.next_power_of_2(head_dim), num_warps=2, **overlapping(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _gate(x, gate, out, x_row, x_head, gate_row, gate_head, n_heads, head_dim,
          OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, BLOCK)
    inside = dims < head_dim
    begin(OVERLAPS)
    value = tl.load(x + row * x_row + head * x_head + dims, mask=inside, other=0.0).to(tl.float32)
    weight = tl.sigmoid(tl.load(gate + row * gate_row + head * gate_head + dims, mask=inside, other=0.0).to(tl.float32))
    to = out + (row * n_heads + head) * head_dim + dims
    tl.store(to, (value * weight).to(out.dtype.element_ty), mask=inside)


def gate_heads(x: Tensor, gate: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Compute `x * sigmoid(gate)`, both `[N, heads, D]` with the last dim contiguous.

    The result is `[N, heads * D]` in the gate's dtype, or in another if one is given.
    """
    n_rows, n_heads, head_dim = x.shape
    out = torch.empty((n_rows, n_heads * head_dim), dtype=gate.dtype if dtype is None else dtype, device=gate.device)
    _gate[(n_rows, n_heads)](
        x, gate, out, x.stride(0), x.stride(1), gate.stride(0), gate.stride(1), n_heads, head_dim,
        BLOCK=triton.next_power_of_2(head_dim), num_warps=2, **overlapping(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _regroup(x, out, x_row, out_row, n_heads, WIDTHS: tl.constexpr, STARTS: tl.constexpr, STEPS: tl.constexpr,
             OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    to = out + row * out_row
    begin(OVERLAPS)
    for part in tl.static_range(len(WIDTHS)):
        inside = cols < WIDTHS[part]
        value = tl.load(x + row * x_row + STARTS[part] + head * STEPS[part] + cols, mask=inside)
        tl.store(to + head * WIDTHS[part] + cols, value, mask=inside)
        to += n_heads * WIDTHS[part]


def regroup_heads(x: Tensor, n_heads: int, groups: Sequence[Sequence[int]]) -> Tensor:
    """Reorder rows that go head by head to rows that go part by part.

    Parameters
    ----------
    x
        Any dtype, `[N, width]`, the last dim contiguous: one group after the other, each with all of its heads, each
        head with all of its parts.
    groups
        The widths of a head's parts in each group.

    Returns
    -------
    Tensor
        `[N, width]`, contiguous: one part after the other, each with all of its heads.
    """
    widths = [width for group in groups for width in group]
    starts, steps, start = [], [], 0
    for group in groups:
        starts += [start + sum(group[:i]) for i in range(len(group))]
        steps += [sum(group)] * len(group)
        start += n_heads * sum(group)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _regroup[(len(x), n_heads)](
        x, out, x.stride(0), out.stride(0), n_heads, WIDTHS=tuple(widths), STARTS=tuple(starts), STEPS=tuple(steps),
        BLOCK=triton.next_power_of_2(max(widths)), **overlapping(x.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_out", "n_q", "n_kv", "n_v"], do_not_specialize_on_alignment=["health"])
def _watch(out, q, k, v, health, n_out, n_q, n_kv, n_v, OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):
    which = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    begin(OVERLAPS)
    if which == 0:
        value = tl.load(out + at, mask=at < n_out, other=0.0).to(tl.float32)
    elif which == 1:
        value = tl.load(q + at, mask=at < n_q, other=0.0).to(tl.float32)
    elif which == 2:
        value = tl.load(k + at, mask=at < n_kv, other=0.0).to(tl.float32)
    else:
        value = tl.load(v + at, mask=at < n_v, other=0.0).to(tl.float32)
    bad = tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), 0)  # a comparison with NaN is false
    tl.store(health + tl.where(which == 0, 0, 1), 1, mask=bad > 0)


def watch_finite(out: Tensor, q: Tensor, k: Tensor, v: Tensor, health: Tensor) -> None:
    """Set `health[0]` if anything in `out` is not finite, `health[1]` if anything in q, k or v is not.

    Nothing is asked of the device. The tensors are of any float dtype and shape.

    Parameters
    ----------
    health
        int32 `[2]`.
    """
    flat = [x.contiguous() for x in (out, q, k, v)]
    sizes = [x.numel() for x in flat]
    grid = (triton.cdiv(max(sizes), WATCHED), 4)
    _watch[grid](*flat, health, *sizes, BLOCK=WATCHED, num_warps=8, **overlapping(out.device))


def _warps(block: int) -> int:
    return min(16, max(1, block // 256))
