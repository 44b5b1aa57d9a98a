"""The gated delta rule (Qwen3-Next, Qwen3.5) with what stands around it: Triton kernels and how they are called.

One token: everything from the short convolution's output to the gated norm in one launch. A prompt: what each chunk of
64 tokens can know without the state before it, all chunks at once; then the states from chunk to chunk; then the gated
norm. States are updated in place. Transformers' torch code for a prompt launches some six kernels per chunk, and for a
token some sixty.

Source: Yang et al., "Gated Delta Networks" (2024), the chunked form with the WY representation, as in Transformers'
`torch_chunk_gated_delta_rule`, whose names of intermediate results are used here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridkv.kernels.cuda.overlap import begin, overlapping

CHUNK = 64
"""Tokens that are solved together."""

STEP_WARPS = 4
"""Warps of a program for one token, which holds a head's state in registers."""

L2_EPS = 1e-6
"""Of the queries' and keys' norm, fixed in Transformers' code."""


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """Sizes of one layer: key and value heads, and the dims of each.

    With `tiled`, value head h belongs to key head `h % n_key`, as GGUF files have them. An update replaces at most
    `update_scale` of a value.
    """

    n_key: int
    n_value: int
    head_k: int
    head_v: int
    tiled: bool = False
    update_scale: float = 1.0

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.n_key * self.head_k + self.n_value * self.head_v


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _delta_step(mixed, z, alpha, beta, a_log, dt_bias, norm, state, out, mixed_row, z_row, alpha_row, beta_row,
                n_key, n_value, head_k, head_v, scale, update_scale, l2_eps, eps,
                WIDE_K: tl.constexpr, WIDE_V: tl.constexpr, TILED: tl.constexpr,
                OVERLAPS: tl.constexpr):  # fmt: skip
    seq, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    of_key = head % n_key if TILED else head // (n_value // n_key)
    k_dim, v_dim = tl.arange(0, WIDE_K), tl.arange(0, WIDE_V)
    in_k, in_v = k_dim < head_k, v_dim < head_v
    row = mixed + seq * mixed_row
    # The state is the most of what is read, and asked for first: below, sums over a program's warps wait for their own.
    both = in_k[:, None] & in_v[None, :]
    at = state + (seq * n_value + head) * head_k * head_v + k_dim[:, None] * head_v + v_dim[None, :]
    begin(OVERLAPS)
    memory = tl.load(at, mask=both, other=0.0)
    gate = tl.load(z + seq * z_row + head * head_v + v_dim, mask=in_v, other=0.0).to(tl.float32)
    q = tl.load(row + of_key * head_k + k_dim, mask=in_k, other=0.0)
    k = tl.load(row + (n_key + of_key) * head_k + k_dim, mask=in_k, other=0.0)
    v = tl.load(row + 2 * n_key * head_k + head * head_v + v_dim, mask=in_v, other=0.0)
    q *= tl.rsqrt(tl.sum(q * q, 0) + l2_eps) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + l2_eps)
    open_ = tl.sigmoid(tl.load(beta + seq * beta_row + head).to(tl.float32)) * update_scale
    step = tl.load(alpha + seq * alpha_row + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    decay = tl.exp(-tl.exp(tl.load(a_log + head).to(tl.float32)) * _softplus(step))
    memory *= decay
    correction = (v - tl.sum(memory * k[:, None], 0)) * open_
    memory += k[:, None] * correction[None, :]
    tl.store(at, memory, mask=both)
    result = tl.sum(memory * q[:, None], 0)
    result *= tl.rsqrt(tl.sum(result * result, 0) / head_v + eps)
    result *= tl.load(norm + v_dim, mask=in_v, other=0.0).to(tl.float32)
    to = out + (seq * n_value + head) * head_v + v_dim
    tl.store(to, (result * gate * tl.sigmoid(gate)).to(out.dtype.element_ty), mask=in_v)


def delta_step(
    mixed: Tensor, z: Tensor, alpha: Tensor, beta: Tensor, a_log: Tensor, dt_bias: Tensor, norm: Tensor, state: Tensor,
    shape: DeltaShape, *, eps: float, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Run one token: norms of q and k, gates, the delta rule on the state in place, and the gated RMSNorm.

    Parameters
    ----------
    mixed
        float32 `[B, channels]`: queries, keys and values after the convolution.
    z
        Any float dtype, `[B, n_value * head_v]`: the gate of the norm.
    alpha, beta
        Any float dtype, `[B, n_value]`, before softplus and sigmoid.
    a_log, dt_bias
        `[n_value]`.
    norm
        `[head_v]`, of the gated norm.
    state
        float32 `[B, n_value, head_k, head_v]`, contiguous.
    dtype
        Of the result; z's by default.

    Returns
    -------
    Tensor
        `[B, n_value * head_v]`.
    """
    assert state.is_contiguous()
    batch = len(mixed)
    out = torch.empty((batch, shape.n_value * shape.head_v), dtype=z.dtype if dtype is None else dtype, device=z.device)
    _delta_step[(shape.n_value, batch)](
        mixed, z, alpha, beta, a_log, dt_bias, norm, state, out, mixed.stride(0), z.stride(0), alpha.stride(0),
        beta.stride(0), shape.n_key, shape.n_value, shape.head_k, shape.head_v, shape.head_k**-0.5,
        shape.update_scale, L2_EPS, eps,
        WIDE_K=triton.next_power_of_2(shape.head_k), WIDE_V=triton.next_power_of_2(shape.head_v), TILED=shape.tiled,
        num_warps=STEP_WARPS, **overlapping(z.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_tokens", "n_chunks"])
def _chunk_solve(mixed, alpha, beta, a_log, dt_bias, reads, keys, values, weights, scores, decays,
                 alpha_row, beta_row, channels, n_tokens, n_chunks, n_key, n_value, head_k, head_v, scale,
                 update_scale, l2_eps,
                 WIDE_K: tl.constexpr, WIDE_V: tl.constexpr, ROWS: tl.constexpr, TILED: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    chunk, head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    of_key = head % n_key if TILED else head // (n_value // n_key)
    i = tl.arange(0, ROWS)
    k_dim, v_dim = tl.arange(0, WIDE_K), tl.arange(0, WIDE_V)
    token = chunk * ROWS + i
    valid = token < n_tokens
    in_k = valid[:, None] & (k_dim < head_k)[None, :]
    in_v = valid[:, None] & (v_dim < head_v)[None, :]
    row = seq * n_tokens + token
    source = mixed + row[:, None] * channels
    q = tl.load(source + of_key * head_k + k_dim[None, :], mask=in_k, other=0.0).to(tl.float32)
    k = tl.load(source + (n_key + of_key) * head_k + k_dim[None, :], mask=in_k, other=0.0).to(tl.float32)
    v = tl.load(source + 2 * n_key * head_k + head * head_v + v_dim[None, :], mask=in_v, other=0.0).to(tl.float32)
    q *= (tl.rsqrt(tl.sum(q * q, 1) + l2_eps) * scale)[:, None]
    k *= tl.rsqrt(tl.sum(k * k, 1) + l2_eps)[:, None]
    # Rows past the last token neither decay nor write: their beta is 0, and so is the logarithm of their decay.
    open_ = tl.sigmoid(tl.load(beta + row * beta_row + head, mask=valid, other=0.0).to(tl.float32)) * update_scale
    open_ = tl.where(valid, open_, 0.0)
    step = tl.load(alpha + row * alpha_row + head, mask=valid, other=0.0).to(tl.float32)
    step += tl.load(dt_bias + head).to(tl.float32)
    log_decay = tl.where(valid, -tl.exp(tl.load(a_log + head).to(tl.float32)) * _softplus(step), 0.0)
    total = tl.cumsum(log_decay, 0)
    lower = i[:, None] >= i[None, :]
    between = tl.exp(tl.where(lower, total[:, None] - total[None, :], 0.0))
    narrow = keys.dtype.element_ty
    k_t = tl.trans(k.to(narrow))
    system = tl.dot((k * open_[:, None]).to(narrow), k_t, input_precision=PRECISION) * between
    system = tl.where(i[:, None] > i[None, :], system, 0.0)
    # (I + system)^-1 by forward substitution, row after row. Powers of `system` would need fewer steps, but where keys
    # repeat they grow to 1e18 and cancel.
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for at in range(1, ROWS):
        factors = tl.sum(tl.where((i == at)[:, None], system, 0.0), 0)
        fresh = tl.sum(factors[:, None] * inverse, 0)
        inverse -= tl.where((i == at)[:, None], fresh[None, :], 0.0)
    grown = tl.exp(total)
    shrunk = tl.exp(tl.sum(log_decay, 0) - total)
    inverse = inverse.to(narrow)
    u = tl.dot(inverse, (v * open_[:, None]).to(narrow), input_precision=PRECISION)
    w = tl.dot(inverse, (k * (open_ * grown)[:, None]).to(narrow), input_precision=PRECISION)
    attention = tl.where(lower, tl.dot(q.to(narrow), k_t, input_precision=PRECISION) * between, 0.0)
    at = (seq * n_value + head) * n_chunks + chunk
    rows = (at * ROWS + i)[:, None]
    kept_k, kept_v = (k_dim < head_k)[None, :], (v_dim < head_v)[None, :]
    tl.store(reads + rows * head_k + k_dim[None, :], (q * grown[:, None]).to(narrow), mask=kept_k)
    tl.store(keys + rows * head_k + k_dim[None, :], (k * shrunk[:, None]).to(narrow), mask=kept_k)
    tl.store(weights + rows * head_k + k_dim[None, :], w.to(narrow), mask=kept_k)
    tl.store(values + rows * head_v + v_dim[None, :], u.to(values.dtype.element_ty), mask=kept_v)
    tl.store(scores + rows * ROWS + i[None, :], attention.to(narrow))
    tl.store(decays + at, tl.exp(tl.sum(log_decay, 0)))


@triton.jit(do_not_specialize=["n_tokens", "n_chunks"])
def _chunk_scan(reads, keys, values, weights, scores, decays, state, out, n_tokens, n_chunks, n_value, head_k, head_v,
                WIDE_K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    head, seq = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, k_dim = tl.arange(0, ROWS), tl.arange(0, WIDE_K)
    v_dim = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_k, in_v = k_dim < head_k, v_dim < head_v
    at = state + (seq * n_value + head) * head_k * head_v + k_dim[:, None] * head_v + v_dim[None, :]
    memory = tl.load(at, mask=in_k[:, None] & in_v[None, :], other=0.0)
    narrow = keys.dtype.element_ty
    for chunk in range(n_chunks):
        place = (seq * n_value + head) * n_chunks + chunk
        rows = (place * ROWS + i)[:, None]
        q = tl.load(reads + rows * head_k + k_dim[None, :], mask=in_k[None, :], other=0.0)
        k = tl.load(keys + rows * head_k + k_dim[None, :], mask=in_k[None, :], other=0.0)
        w = tl.load(weights + rows * head_k + k_dim[None, :], mask=in_k[None, :], other=0.0)
        u = tl.load(values + rows * head_v + v_dim[None, :], mask=in_v[None, :], other=0.0).to(tl.float32)
        attention = tl.load(scores + rows * ROWS + i[None, :])
        seen = memory.to(narrow)
        fresh = (u - tl.dot(w, seen, input_precision=PRECISION)).to(narrow)
        result = tl.dot(q, seen, input_precision=PRECISION)
        result += tl.dot(attention, fresh, input_precision=PRECISION)
        token = chunk * ROWS + i
        to = out + ((seq * n_tokens + token)[:, None] * n_value + head) * head_v + v_dim[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=(token < n_tokens)[:, None] & in_v[None, :])
        memory = memory * tl.load(decays + place) + tl.dot(tl.trans(k), fresh, input_precision=PRECISION)
    tl.store(at, memory, mask=in_k[:, None] & in_v[None, :])


def delta_prompt(
    mixed: Tensor, alpha: Tensor, beta: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor, shape: DeltaShape
) -> Tensor:
    """Run T tokens per sequence: norms of q and k, gates, and the delta rule on the state in place.

    Parameters
    ----------
    mixed
        Any float dtype, `[B * T, channels]`, contiguous. float32 is multiplied as three products of tf32, other dtypes
        as they are.
    alpha, beta, a_log, dt_bias, state
        As in `delta_step`, `[B * T, n_value]` and so on.

    Returns
    -------
    Tensor
        In mixed's dtype, `[B * T, n_value * head_v]`, before the norm.
    """
    assert state.is_contiguous() and mixed.is_contiguous()
    batch, n_tokens = len(state), len(mixed) // len(state)
    n_chunks = triton.cdiv(n_tokens, CHUNK)
    places = (batch, shape.n_value, n_chunks)
    reads, keys, weights = (mixed.new_empty((*places, CHUNK, shape.head_k)) for _ in range(3))
    values, scores = mixed.new_empty((*places, CHUNK, shape.head_v)), mixed.new_empty((*places, CHUNK, CHUNK))
    decays = torch.empty(places, dtype=torch.float32, device=mixed.device)
    wide_k, wide_v = (max(16, triton.next_power_of_2(n)) for n in (shape.head_k, shape.head_v))
    precision = "tf32x3" if mixed.dtype == torch.float32 else "tf32"  # "ieee" takes minutes to compile
    _chunk_solve[(n_chunks, shape.n_value, batch)](
        mixed, alpha, beta, a_log, dt_bias, reads, keys, values, weights, scores, decays, alpha.stride(0),
        beta.stride(0), mixed.stride(0), n_tokens, n_chunks, shape.n_key, shape.n_value, shape.head_k, shape.head_v,
        shape.head_k**-0.5, shape.update_scale, L2_EPS, WIDE_K=wide_k, WIDE_V=wide_v, ROWS=CHUNK, TILED=shape.tiled,
        PRECISION=precision, num_warps=8,
    )  # fmt: skip
    out = torch.empty((len(mixed), shape.n_value * shape.head_v), dtype=mixed.dtype, device=mixed.device)
    block = min(32, wide_v)
    # Two warps, so that products are mma.sync. With four they are wgmma, and Triton 3.6 lets the one of transposed keys
    # read beyond its shared memory: an illegal access with two stages, a wrong result in silence with one.
    _chunk_scan[(triton.cdiv(shape.head_v, block), shape.n_value, batch)](
        reads, keys, values, weights, scores, decays, state, out, n_tokens, n_chunks, shape.n_value, shape.head_k,
        shape.head_v, WIDE_K=wide_k, BLOCK=block, ROWS=CHUNK, PRECISION=precision, num_warps=2, num_stages=1,
    )  # fmt: skip
    return out


@triton.jit
def _gated_norm(x, z, weight, out, x_row, z_row, out_row, head_dim, eps, BLOCK: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, BLOCK)
    inside = dims < head_dim
    at = head * head_dim + dims
    value = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_row + at, mask=inside, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / head_dim + eps)
    value *= tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32) * gate * tl.sigmoid(gate)
    tl.store(out + row * out_row + at, value.to(out.dtype.element_ty), mask=inside)


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Compute RMSNorm of every head times `silu(z)`; x and z `[N, heads * D]`, weight `[D]`; in x's dtype."""
    head_dim = len(weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _gated_norm[(len(x), x.shape[1] // head_dim)](
        x, z, weight, out, x.stride(0), z.stride(0), out.stride(0), head_dim, eps,
        BLOCK=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip
    return out
