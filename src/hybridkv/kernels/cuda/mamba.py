"""State spaces of Mamba-1 and Mamba-2, from the short convolution's output to the output's product: Triton kernels.

One token of Mamba-2 is a launch that reads and writes each state once. A prompt is one too: a program walks over a
sequence's tokens chunk by chunk, a few columns of one head's state in registers, and within a chunk every token reads
the others by a product of matrices. Mamba-1's decay is of its own for every number of the state, so that no products
are left: a program walks from token to token. States are float32, updated in place.

Source: "Transformers are SSMs", arXiv 2405.21060, and "Mamba", arXiv 2312.00752.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridkv.kernels.cuda.activations import softplus
from hybridkv.kernels.cuda.overlap import begin, overlapping

_STATE_NUMBERS = 8192
"""Of a head's state that a program of one token holds."""

_CHANNELS = 32


@dataclass(frozen=True, slots=True)
class Mamba2Shape:
    """Sizes of one layer: heads, the groups that share B and C, and the dims of a head's state."""

    n_heads: int
    n_groups: int
    head_dim: int
    state_dim: int

    @property
    def inner(self) -> int:
        """Values of all heads."""
        return self.n_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.n_groups * self.state_dim


@triton.jit
def _mamba2_step(mixed, dt, rate, bias, skip, state, out, mixed_row, dt_row, n_heads, n_groups, head_dim, state_dim,
                 WIDE_N: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):  # fmt: skip
    head, seq = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (n_heads // n_groups)
    n, p = tl.arange(0, WIDE_N), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_n, in_p = n < state_dim, p < head_dim
    both = in_n[:, None] & in_p[None, :]
    at = state + (seq * n_heads + head) * state_dim * head_dim + n[:, None] * head_dim + p[None, :]
    row = mixed + seq * mixed_row
    groups = row + n_heads * head_dim + group * state_dim
    begin(OVERLAPS)
    memory = tl.load(at, mask=both, other=0.0)
    x = tl.load(row + head * head_dim + p, mask=in_p, other=0.0).to(tl.float32)
    b = tl.load(groups + n, mask=in_n, other=0.0).to(tl.float32)
    c = tl.load(groups + n_groups * state_dim + n, mask=in_n, other=0.0).to(tl.float32)
    step = softplus(tl.load(dt + seq * dt_row + head).to(tl.float32) + tl.load(bias + head))
    memory = memory * tl.exp(tl.load(rate + head) * step) + b[:, None] * (x * step)[None, :]
    tl.store(at, memory, mask=both)
    result = tl.sum(memory * c[:, None], 0) + x * tl.load(skip + head)
    tl.store(out + (seq * n_heads + head) * head_dim + p, result, mask=in_p)


def mamba2_step(
    mixed: Tensor, dt: Tensor, rate: Tensor, bias: Tensor, skip: Tensor, state: Tensor, shape: Mamba2Shape
) -> Tensor:
    """Run one token: `S = exp(rate dt) S + b (dt x)^T` in place, and `S^T c + skip x`, with dt behind softplus.

    Parameters
    ----------
    mixed
        Any float dtype, `[B, channels]`: x, B and C after the convolution.
    dt
        Any float dtype, `[B, n_heads]`, before the bias and softplus.
    rate, bias, skip
        float32 `[n_heads]`; rates are negative.
    state
        float32 `[B, n_heads, state_dim, head_dim]`, contiguous.

    Returns
    -------
    Tensor
        float32 `[B, inner]`.
    """
    assert state.is_contiguous()
    batch, wide = len(mixed), triton.next_power_of_2(shape.state_dim)
    block = min(triton.next_power_of_2(shape.head_dim), max(16, _STATE_NUMBERS // wide))
    out = torch.empty((batch, shape.inner), dtype=torch.float32, device=mixed.device)
    _mamba2_step[(triton.cdiv(shape.head_dim, block), shape.n_heads, batch)](
        mixed, dt, rate, bias, skip, state, out, mixed.stride(0), dt.stride(0), shape.n_heads, shape.n_groups,
        shape.head_dim, shape.state_dim, WIDE_N=wide, BLOCK=block, num_warps=4, **overlapping(mixed.device),
    )  # fmt: skip
    return out


@triton.jit
def _mamba2_prompt(mixed, dt, rate, bias, skip, state, out, mixed_row, dt_row, n_tokens, n_heads, n_groups, head_dim,
                   state_dim, WIDE_N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    head, seq = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (n_heads // n_groups)
    i, n = tl.arange(0, ROWS), tl.arange(0, WIDE_N)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_n, in_p = n < state_dim, p < head_dim
    at = state + (seq * n_heads + head) * state_dim * head_dim + n[:, None] * head_dim + p[None, :]
    memory = tl.load(at, mask=in_n[:, None] & in_p[None, :], other=0.0)
    own_rate, own_bias, own_skip = tl.load(rate + head), tl.load(bias + head), tl.load(skip + head)
    lower = i[:, None] >= i[None, :]
    for start in range(0, n_tokens, ROWS):
        token = start + i
        valid = token < n_tokens
        row = seq * n_tokens + token
        # Rows past the last token neither decay nor write: their time step is 0.
        step = softplus(tl.load(dt + row * dt_row + head, mask=valid, other=0.0).to(tl.float32) + own_bias)
        step = tl.where(valid, step, 0.0)
        total = tl.cumsum(own_rate * step, 0)
        last = tl.sum(own_rate * step, 0)
        source = mixed + row[:, None] * mixed_row
        groups = source + n_heads * head_dim + group * state_dim + n[None, :]
        x = tl.load(source + head * head_dim + p[None, :], mask=valid[:, None] & in_p[None, :], other=0.0)
        b = tl.load(groups, mask=valid[:, None] & in_n[None, :], other=0.0).to(tl.float32)
        c = tl.load(groups + n_groups * state_dim, mask=valid[:, None] & in_n[None, :], other=0.0).to(tl.float32)
        x = x.to(tl.float32)
        between = tl.exp(tl.where(lower, total[:, None] - total[None, :], 0.0)) * step[None, :]
        scores = tl.where(lower, tl.dot(c, tl.trans(b), input_precision=PRECISION) * between, 0.0)
        result = tl.dot(c, memory, input_precision=PRECISION) * tl.exp(total)[:, None]
        result += tl.dot(scores, x, input_precision=PRECISION) + x * own_skip
        to = out + (row * n_heads + head)[:, None] * head_dim + p[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=valid[:, None] & in_p[None, :])
        kept = b * (tl.exp(last - total) * step)[:, None]
        memory = memory * tl.exp(last) + tl.dot(tl.trans(kept), x, input_precision=PRECISION)
    tl.store(at, memory, mask=in_n[:, None] & in_p[None, :])


def mamba2_prompt(
    mixed: Tensor, dt: Tensor, rate: Tensor, bias: Tensor, skip: Tensor, state: Tensor, shape: Mamba2Shape
) -> Tensor:
    """Run T tokens per sequence as `mamba2_step` runs one, the state in place.

    Parameters
    ----------
    mixed, dt
        Any float dtype, `[B * T, ...]`. Products are of tf32, of float32 as three of them.

    Returns
    -------
    Tensor
        In mixed's dtype, `[B * T, inner]`.
    """
    assert state.is_contiguous()
    batch, wide = len(state), max(16, triton.next_power_of_2(shape.state_dim))
    rows = 32 if wide <= 128 else 16
    block = min(rows, max(16, triton.next_power_of_2(shape.head_dim)))
    out = torch.empty((len(mixed), shape.inner), dtype=mixed.dtype, device=mixed.device)
    # Two warps, so that products are mma.sync: see `delta_prompt`.
    _mamba2_prompt[(triton.cdiv(shape.head_dim, block), shape.n_heads, batch)](
        mixed, dt, rate, bias, skip, state, out, mixed.stride(0), dt.stride(0), len(mixed) // batch, shape.n_heads,
        shape.n_groups, shape.head_dim, shape.state_dim, WIDE_N=wide, BLOCK=block, ROWS=rows,
        PRECISION="tf32x3" if mixed.dtype == torch.float32 else "tf32", num_warps=2, num_stages=1,
    )  # fmt: skip
    return out


@triton.jit
def _mamba1(mixed, dt, left, right, z, rate, bias, skip, state, out, mixed_row, dt_row, left_row, right_row, z_row,
            n_tokens, inner, state_dim, factor, WIDE_N: tl.constexpr, BLOCK: tl.constexpr,
            OVERLAPS: tl.constexpr):  # fmt: skip
    seq = tl.program_id(1).to(tl.int64)
    channel, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE_N)
    inside, in_n = channel < inner, n < state_dim
    both = inside[:, None] & in_n[None, :]
    place = channel[:, None] * state_dim + n[None, :]
    begin(OVERLAPS)
    memory = tl.load(state + seq * inner * state_dim + place, mask=both, other=0.0)
    rates = tl.load(rate + place, mask=both, other=0.0)
    biases = tl.load(bias + channel, mask=inside, other=0.0)
    skips = tl.load(skip + channel, mask=inside, other=0.0)
    for token in range(n_tokens):
        row = seq * n_tokens + token
        x = tl.load(mixed + row * mixed_row + channel, mask=inside, other=0.0).to(tl.float32)
        step = softplus(tl.load(dt + row * dt_row + channel, mask=inside, other=0.0).to(tl.float32) + biases)
        b = tl.load(left + row * left_row + n, mask=in_n, other=0.0).to(tl.float32)
        c = tl.load(right + row * right_row + n, mask=in_n, other=0.0).to(tl.float32)
        gate = tl.load(z + row * z_row + channel, mask=inside, other=0.0).to(tl.float32)
        memory = memory * tl.exp(rates * step[:, None]) + (x * step)[:, None] * b[None, :]
        result = (tl.sum(memory * c[None, :], 1) + x * skips) * gate * tl.sigmoid(gate) * factor
        tl.store(out + row * inner + channel, result.to(out.dtype.element_ty), mask=inside)
    tl.store(state + seq * inner * state_dim + place, memory, mask=both)


def mamba1(
    mixed: Tensor,
    dt: Tensor,
    left: Tensor,
    right: Tensor,
    z: Tensor,
    rate: Tensor,
    bias: Tensor,
    skip: Tensor,
    state: Tensor,
    *,
    factor: float,
) -> Tensor:
    """Run T tokens per sequence: `h = exp(rate dt) h + dt x b` in place, and `(h c + skip x) * silu(z) * factor`.

    Parameters
    ----------
    mixed, dt, z
        Any float dtype, `[B * T, inner]`: x after the convolution, the time steps before the bias and softplus, gates.
    left, right
        Any float dtype, `[B * T, state_dim]`: b and c.
    rate, bias, skip
        float32 `[inner, state_dim]` and `[inner]`; rates are negative.
    state
        float32 `[B, inner, state_dim]`, contiguous.

    Returns
    -------
    Tensor
        float16 `[B * T, inner]`.
    """
    assert state.is_contiguous() and rate.is_contiguous()
    batch, inner, state_dim = state.shape
    out = torch.empty((len(mixed), inner), dtype=torch.float16, device=mixed.device)
    _mamba1[(triton.cdiv(inner, _CHANNELS), batch)](
        mixed, dt, left, right, z, rate, bias, skip, state, out, mixed.stride(0), dt.stride(0), left.stride(0),
        right.stride(0), z.stride(0), len(mixed) // batch, inner, state_dim, factor,
        WIDE_N=triton.next_power_of_2(state_dim), BLOCK=_CHANNELS, num_warps=1, **overlapping(mixed.device),
    )  # fmt: skip
    return out


@triton.jit
def _gate_norm(x, z, weight, out, x_row, z_row, out_row, width, eps, factor, NORM: tl.constexpr,
               OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    inside, at = cols < width, group * width + cols
    begin(OVERLAPS)
    gate = tl.load(z + row * z_row + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32) * gate * tl.sigmoid(gate)
    if NORM:
        value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        value *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + at, (value * factor).to(out.dtype.element_ty), mask=inside)


def gate_norm(
    x: Tensor, z: Tensor, weight: Tensor | None, n_groups: int, *, eps: float, factor: float, dtype: torch.dtype
) -> Tensor:
    """Compute `x * silu(z) * factor`, `[N, width]`; behind RMSNorm of each of `n_groups` parts if there is a weight.

    Parameters
    ----------
    weight
        `[width]`.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    width = x.shape[1] // n_groups
    block = triton.next_power_of_2(width)
    _gate_norm[(len(x), n_groups)](
        x, z, z if weight is None else weight, out, x.stride(0), z.stride(0), out.stride(0), width, eps, factor,
        NORM=weight is not None, BLOCK=block, num_warps=min(16, max(1, block // 256)), **overlapping(x.device),
    )  # fmt: skip
    return out
