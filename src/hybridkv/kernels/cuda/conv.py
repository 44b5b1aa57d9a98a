"""Short causal convolutions with their states: before delta nets and state spaces, and as layers of their own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridkv.kernels.cuda.overlap import begin, overlapping

_CHANNELS = 128


@triton.jit
def _conv_step(raw, before, after, state, weight, bias, mixed, raw_row, before_row, after_row, state_seq, state_channel,
               state_tap, channels, TAPS: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
               OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    seq = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.arange(0, WIDE)
    inside = channel < channels
    both = inside[:, None] & (tap < TAPS)[None, :]
    at = state + seq * state_seq + channel[:, None] * state_channel + tap[None, :] * state_tap
    begin(OVERLAPS)
    newest = tl.load(raw + seq * raw_row + channel, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        newest *= tl.load(before + seq * before_row + channel, mask=inside, other=0.0).to(tl.float32)
    moved = tl.load(at + state_tap, mask=both & (tap < TAPS - 1)[None, :], other=0.0).to(tl.float32)
    moved = tl.where((tap == TAPS - 1)[None, :], newest[:, None], moved)
    taps = tl.load(weight + channel[:, None] * TAPS + tap[None, :], mask=both, other=0.0).to(tl.float32)
    out = tl.sum(moved * taps, 1)
    if BIAS:
        out += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        out *= tl.load(after + seq * after_row + channel, mask=inside, other=0.0).to(tl.float32)
    else:
        out *= tl.sigmoid(out)
    tl.debug_barrier()  # every input is read before one is overwritten
    tl.store(at, moved.to(state.dtype.element_ty), mask=both)
    tl.store(mixed + seq * channels + channel, out.to(mixed.dtype.element_ty), mask=inside)


def conv_step(
    raw: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gates: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Run one token through the depthwise causal convolution and SiLU; the state takes it in place.

    Parameters
    ----------
    raw
        Any float dtype, `[B, channels]`, the last dim contiguous.
    state
        Any float dtype and strides, `[B, channels, taps]`: the newest inputs, the newest last.
    weight
        `[channels, 1, taps]`, contiguous.
    gates
        Like `raw`: what multiplies the inputs, and what multiplies the outputs in place of SiLU.

    Returns
    -------
    Tensor
        `[B, channels]`, contiguous.
    """
    batch, channels, taps = state.shape
    mixed = torch.empty((batch, channels), dtype=dtype, device=raw.device)
    before, after = (raw, raw) if gates is None else gates
    _conv_step[(triton.cdiv(channels, _CHANNELS), batch)](
        raw, before, after, state, weight, weight if bias is None else bias, mixed, raw.stride(0), before.stride(0),
        after.stride(0), *state.stride(), channels, TAPS=taps, WIDE=triton.next_power_of_2(taps), BIAS=bias is not None,
        GATED=gates is not None, BLOCK=_CHANNELS, **overlapping(raw.device),
    )  # fmt: skip
    return mixed


@triton.jit(do_not_specialize=["n_tokens"])
def _conv_prompt(raw, after, state, weight, bias, mixed, raw_row, after_row, state_seq, state_channel, state_tap,
                 channels, n_tokens, TAPS: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, TOKENS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    seq = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    both = (token < n_tokens)[:, None] & inside[None, :]
    row = (seq * n_tokens + token)[:, None]
    out = tl.zeros((TOKENS, BLOCK), tl.float32)
    for tap in tl.static_range(TAPS):
        source = token - (TAPS - 1) + tap
        new = raw + (seq * n_tokens + source)[:, None] * raw_row + channel[None, :]
        old = state + seq * state_seq + channel[None, :] * state_channel + (TAPS + source)[:, None] * state_tap
        value = tl.load(new, mask=both & (source >= 0)[:, None], other=0.0).to(tl.float32)
        value += tl.load(old, mask=both & (source < 0)[:, None], other=0.0).to(tl.float32)
        out += value * tl.load(weight + channel * TAPS + tap, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        out += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        out *= tl.load(after + row * after_row + channel[None, :], mask=both, other=0.0).to(tl.float32)
    else:
        out *= tl.sigmoid(out)
    tl.store(mixed + row * channels + channel[None, :], out.to(mixed.dtype.element_ty), mask=both)


def conv_prompt(
    raw: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, *, gates: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Run T tokens per sequence through the convolution and SiLU; the state takes the newest of them in place.

    Parameters
    ----------
    raw
        Any float dtype, `[B * T, channels]`, the last dim contiguous.
    state, weight, gates
        As in `conv_step`.

    Returns
    -------
    Tensor
        In raw's dtype, `[B * T, channels]`, contiguous.
    """
    batch, channels, taps = state.shape
    n_tokens = len(raw) // batch
    mixed = torch.empty((len(raw), channels), dtype=raw.dtype, device=raw.device)
    after = raw if gates is None else gates[1]
    if gates is not None:
        raw = raw.float() * gates[0]
    _conv_prompt[(triton.cdiv(n_tokens, 16), triton.cdiv(channels, _CHANNELS), batch)](
        raw, after, state, weight, weight if bias is None else bias, mixed, raw.stride(0), after.stride(0),
        *state.stride(), channels, n_tokens, TAPS=taps, BIAS=bias is not None, GATED=gates is not None, TOKENS=16,
        BLOCK=_CHANNELS,
    )  # fmt: skip
    newest = torch.unflatten(raw, 0, (batch, n_tokens))[:, -taps:].transpose(1, 2).to(state.dtype)
    if n_tokens < taps:
        newest = torch.cat([state[:, :, n_tokens:], newest], 2)
    state.copy_(newest)
    return mixed
