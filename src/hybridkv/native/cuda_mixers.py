"""The lowering of a model's mixers to CUDA: from normed rows, float16, to what is added to the residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridkv.hf.step.fused_layers import StepContext
from hybridkv.kernels.cuda import mamba
from hybridkv.kernels.cuda.conv import conv_prompt, conv_step
from hybridkv.kernels.cuda.delta import DeltaShape, delta_prompt, delta_step, gated_norm
from hybridkv.kernels.cuda.layers import add_norm, gate_heads, norm_rope
from hybridkv.kernels.cuda.mamba import Mamba2Shape, gate_norm, mamba2_prompt, mamba2_step
from hybridkv.model import Adapter, Attention, DeltaNet, Mamba1, Mamba2, ShortConv
from hybridkv.model.protocols import Config
from hybridkv.model.rope import rope_frequencies
from hybridkv.native.cuda_card import Card, Product, WeightRows

BETWEEN = 1 / 32
"""Factor on what lies between the products of a gated feed-forward, and on other products of values without a norm."""

Mix = Callable[[Tensor, StepContext], Tensor]
"""From normed rows, float16, to what is added to the residual, float32; perhaps in parts, `[parts, N, hidden]`."""


def summed(added: Tensor) -> Tensor:
    """Add up what is in parts."""
    return added if added.dim() == 2 else added.sum(0)


def dtype_of(context: StepContext) -> torch.dtype:
    """Choose the dtype of what products give: float16 halves what a prompt's rows take."""
    return torch.float32 if context.n_tokens == 1 else torch.float16


def adapted(card: Card, adapter: Adapter, *weights: str) -> Callable[[Tensor, torch.dtype], list[Tensor]]:
    """Build the low-rank products beside those of weights that share an adapter's `a`, which has the first's name."""
    low, high = card.product(adapter.a(weights[0])), card.product(*map(adapter.b, weights))

    def products(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return high(low.whole(x, torch.float16), dtype)

    return products


def attention(card: Card, config: Config, index: int, a: Attention) -> Mix:
    """Lower softmax attention over the KV cache."""
    weights = (a.q, a.k, a.v)
    project, out = card.product(*weights, biased=a.biased != "none"), card.product(a.out, biased=a.biased == "all")
    adapters = [] if a.adapter is None else [adapted(card, a.adapter, weight) for weight in weights]
    norms = [None if norm is None else (card.norm(norm), norm.eps) for norm in (a.q_norm, a.k_norm)]
    frequencies, magnitude = (torch.empty(0), 1.0) if a.rope is None else rope_frequencies(config, a.rope.kind)
    frequencies, pairs = frequencies.float().to(card.device), "halves" if a.rope is None else a.rope.pairs

    def turned(x: Tensor, norm: tuple[Tensor, float] | None, context: StepContext, dtype: torch.dtype | None) -> Tensor:
        weight, eps = (None, 0.0) if norm is None or a.norms_together else norm
        return norm_rope(x, weight, eps, context.positions, frequencies, pairs=pairs, magnitude=magnitude, dtype=dtype)

    def mix(normed: Tensor, context: StepContext) -> Tensor:
        dtype = dtype_of(context)
        parts = project(normed, dtype)
        if adapters:
            parts = [part + more(normed, dtype)[0] for part, more in zip(parts, adapters, strict=True)]
        if a.norms_together:
            both = zip(parts, norms, strict=False)
            parts[:2] = [x if norm is None else add_norm(x, None, *norm) for x, norm in both]
        raw, k, v = (torch.unflatten(x, 1, (-1, a.head_dim)) for x in parts)
        q, gate = (raw[:, 0::2], raw[:, 1::2]) if a.gated else (raw, None)
        # Prompts are attended in float16: queries that come so need no pass of their own.
        q, k = turned(q, norms[0], context, dtype), turned(k, norms[1], context, None)
        answer = context.attend(index, q, k, v, a.scale)
        if gate is None:
            return out.shares(answer.flatten(1).to(torch.float16).contiguous())
        return out.shares(gate_heads(answer, gate, dtype=torch.float16))

    return mix


def _projections(card: Card, d: DeltaNet) -> Product:
    """Build a delta net's product: queries, keys and values, gates, decays' inputs, updates' inputs, in this order."""
    gates: list[str | WeightRows] = [d.gate]
    mixed: list[str | WeightRows] = [d.qkv] if isinstance(d.qkv, str) else [*d.qkv]
    if isinstance(d.qkv, str) and not card.has(d.qkv):
        share = d.n_values // d.n_keys * d.value_dim
        q, k, v, z = _by_part(card, d.joined, d.n_keys, (d.key_dim, d.key_dim, share, share))
        mixed, gates = [q, k, v], [z]
    rates: list[str | WeightRows] = [d.alpha, d.beta]
    if d.joined_rates:
        each = d.n_values // d.n_keys
        beta, alpha = _by_part(card, d.rates, d.n_keys, (each, each))
        rates = [alpha, beta]
    return card.product(*mixed, *gates, *rates)


def _by_part(card: Card, name: str, n_heads: int, widths: tuple[int, ...]) -> list[WeightRows]:
    """Take a matrix apart whose rows go head by head, all parts of each: into one for each part, head by head."""
    weight, whole = card.weight(name), sum(widths)
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return [
        WeightRows(
            f"{card.prefix}{name}[{i}]",
            tuple(weight.part(h * whole + start, h * whole + start + width) for h in range(n_heads)),
        )
        for i, (start, width) in enumerate(zip(starts, widths, strict=True))
    ]


def delta_net(card: Card, config: Config, index: int, d: DeltaNet) -> Mix:
    """Lower a gated delta net."""
    del config
    project, out = _projections(card, d), card.product(d.out)
    shape = DeltaShape(d.n_keys, d.n_values, d.key_dim, d.value_dim, d.values == "tiled", d.update_scale)
    conv_weight = card.vector(d.conv).view(d.channels, 1, d.kernel)
    a_log, bias = torch.log(-card.vector(d.decay).flatten()), card.vector(card.either(d.bias)).flatten()
    norm, eps = card.norm(d.norm), d.norm.eps
    like = torch.empty(0, device=card.device)
    recurrent = (shape.n_value, shape.head_k, shape.head_v)
    widths = [d.channels, d.n_values * d.value_dim, d.n_values, d.n_values]

    def mix(normed: Tensor, context: StepContext) -> Tensor:
        raw, z, alpha, beta = torch.split(project.whole(normed, dtype_of(context)), widths, 1)
        conv, state = context.file_states(index, (shape.channels, d.kernel), recurrent, like)
        gates = (alpha, beta, a_log, bias)
        if context.n_tokens == 1:
            mixed = conv_step(raw, conv, conv_weight, None)
            answer = delta_step(mixed, z, *gates, norm, state, shape, eps=eps, dtype=torch.float16)
        else:
            answer = delta_prompt(conv_prompt(raw, conv, conv_weight, None), *gates, state, shape)
            answer = gated_norm(answer, z, norm, eps=eps)
        return out.shares(answer)

    return mix


def mamba2(card: Card, config: Config, index: int, m: Mamba2) -> Mix:
    """Lower a Mamba-2 mixer."""
    del config
    project, out = card.product(m.project), card.product(m.out)
    shape = Mamba2Shape(m.n_heads, m.n_groups, m.head_dim, m.state_dim)
    conv_weight = card.vector(m.conv).view(m.channels, 1, m.kernel)
    conv_bias = card.vector(m.conv_bias).flatten() if card.has(m.conv_bias) else None
    rate, bias, skip = (card.vector(name).flatten() for name in (m.rate, card.either(m.bias), m.skip))
    norm = None if m.norm is None else card.norm(m.norm)
    # Without a norm the gated output may be large.
    eps, factor = (0.0, BETWEEN) if m.norm is None else (m.norm.eps, 1.0)
    like = torch.empty(0, device=card.device)
    recurrent = (m.n_heads, m.state_dim, m.head_dim)

    def mix(normed: Tensor, context: StepContext) -> Tensor:
        gate, raw, dt = torch.split(project.whole(normed, dtype_of(context)), [m.inner, m.channels, m.n_heads], 1)
        conv, state = context.file_states(index, (m.channels, m.kernel), recurrent, like)
        if context.n_tokens == 1:
            mixed = conv_step(raw, conv, conv_weight, conv_bias)
            answer = mamba2_step(mixed, dt, rate, bias, skip, state, shape)
        else:
            mixed = conv_prompt(raw, conv, conv_weight, conv_bias)
            answer = mamba2_prompt(mixed, dt, rate, bias, skip, state, shape)
        gated = gate_norm(answer, gate, norm, m.n_groups, eps=eps, factor=factor, dtype=torch.float16)
        return out.shares(gated, factor=1 / factor)

    return mix


def mamba1(card: Card, config: Config, index: int, m: Mamba1) -> Mix:
    """Lower a Mamba-1 mixer."""
    del config
    project, select, time, out = (card.product(name) for name in (m.project, m.select, m.dt, m.out))
    conv_weight = card.vector(m.conv).view(m.inner, 1, m.kernel)
    conv_bias = card.vector(m.conv_bias).flatten() if card.has(m.conv_bias) else None
    rate = card.vector(m.rate).view(m.inner, m.state_dim)
    bias, skip = card.vector(m.bias).flatten(), card.vector(m.skip).flatten()
    norms = [(card.norm(norm), norm.eps) for norm in (m.dt_norm, m.b_norm, m.c_norm)]
    like = torch.empty(0, device=card.device)

    def mix(normed: Tensor, context: StepContext) -> Tensor:
        raw, gate = torch.chunk(project.whole(normed, dtype_of(context)), 2, 1)
        conv, state = context.file_states(index, (m.inner, m.kernel), (m.inner, m.state_dim), like)
        if context.n_tokens == 1:
            mixed = conv_step(raw, conv, conv_weight, conv_bias)
        else:
            mixed = conv_prompt(raw, conv, conv_weight, conv_bias)
        parts = torch.split(select.whole(mixed.to(torch.float16)), [m.rank, m.state_dim, m.state_dim], 1)
        dtypes = (torch.float16, torch.float32, torch.float32)
        steps, left, right = (
            add_norm(part, None, *norm, dtype=dtype) for part, norm, dtype in zip(parts, norms, dtypes, strict=True)
        )
        dt = time.whole(steps, dtype_of(context))
        answer = mamba.mamba1(mixed, dt, left, right, gate, rate, bias, skip, state, factor=BETWEEN)
        return out.whole(answer, factor=1 / BETWEEN)

    return mix


def short_conv(card: Card, config: Config, index: int, s: ShortConv) -> Mix:
    """Lower a short convolution between two products."""
    del config
    project, out = card.product(s.project), card.product(s.out)
    weight = card.vector(s.conv).view(s.channels, 1, s.kernel)
    like = torch.empty(0, device=card.device)

    def mix(normed: Tensor, context: StepContext) -> Tensor:
        before, after, x = torch.chunk(project.whole(normed, dtype_of(context)), 3, 1)
        (conv,) = context.file_states(index, (s.channels, s.kernel), (), like)
        if context.n_tokens == 1:
            return out.whole(conv_step(x, conv, weight, None, gates=(before, after), dtype=torch.float16))
        return out.whole(conv_prompt(x, conv, weight, None, gates=(before, after)))

    return mix
