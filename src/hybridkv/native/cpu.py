"""The lowering of a model's graph to the CPU: native operations on buffers.

`LOWER` has one function a record; `rejects` is the first record that has none, or that its operation cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hybridkv.kernels.routing import Routing
from hybridkv.kernels.step import Gate, delta_rejects
from hybridkv.kernels.weights import Weight
from hybridkv.model import (
    Adapter,
    Attention,
    Branch,
    DeltaNet,
    Experts,
    Gated,
    Mamba1,
    Mamba2,
    ModelGraph,
    Plain,
    Shared,
    ShortConv,
)
from hybridkv.native.builder import Builder


def rejects(graph: ModelGraph) -> str | None:
    """Explain why the CPU's operations cannot run a graph; None if they can."""
    for part in graph.parts:
        if type(part) not in LOWER:
            return f"knows no {type(part).__name__}"
        if isinstance(part, DeltaNet) and (reason := delta_rejects(part.key_dim, part.value_dim)) is not None:
            return reason
    return None


def build_layers(graph: ModelGraph, b: Builder) -> None:
    """Write all blocks: embedded tokens come in buffer `x`, hidden states are left there."""
    x = b.buffer("x", graph.hidden)
    if any(isinstance(part, Shared) for part in graph.parts):
        b.program.copy(x, b.buffer("joined", 2 * graph.hidden)[:, graph.hidden :])
    for index, block in enumerate(graph.blocks):
        b.prefix = f"blk.{index}."
        for branch in block.branches:
            _branch(b, index, branch, x)
    b.prefix = ""


def build_head(graph: ModelGraph, b: Builder) -> None:
    """Write what follows, for the tokens whose logits are asked for: from buffer `x` to buffer `logits`."""
    x = b.buffer("x", graph.hidden)
    b.rms_norm(x, x, graph.norm, graph.logit_scale)
    head = graph.head if b.has(graph.head) else graph.embed
    b.linear(x, (head, b.buffer("logits", graph.n_vocab)))


def build_prediction(graph: ModelGraph, b: Builder) -> None:
    """Write the block of a head of multi-token prediction.

    Tokens come embedded in buffer `embedding`, normed hidden states in buffer `hidden`, where the head's are left.
    """
    p = graph.prediction
    assert p is not None
    embedding, hidden, x = (b.buffer(name, graph.hidden) for name in ("embedding", "hidden", "x"))
    joined = b.buffer("joined", 2 * graph.hidden)
    b.prefix = p.prefix
    b.rms_norm(embedding, joined[:, : graph.hidden], p.embed_norm)
    b.rms_norm(hidden, joined[:, graph.hidden :], p.hidden_norm)
    b.linear(joined, (p.project, x))
    for branch in p.block.branches:
        _branch(b, 0, branch, x)
    norm = p.norm
    if not b.has(norm.weight):
        b.prefix, norm = "", graph.norm
    b.rms_norm(x, hidden, norm)
    b.prefix = ""


def build_prediction_head(graph: ModelGraph, b: Builder, head: Weight) -> None:
    """Write a head's output matrix: from buffer `hidden` to buffer `logits`."""
    b.linear(b.buffer("hidden", graph.hidden), (head, b.buffer("logits", head.n_out)))


def _branch(b: Builder, index: int, branch: Branch, x: Tensor) -> None:
    normed = x
    if branch.norm is not None:
        normed = b.buffer("normed", x.shape[1])
        b.rms_norm(x, normed, branch.norm)
    direct = branch.norm is not None and branch.after is None and branch.scale == 1
    dst = x if direct else b.buffer("branch", x.shape[1])
    for number, part in enumerate(branch.parts):
        LOWER[type(part)](b, index, part, normed, dst, direct or number > 0)
    if branch.after is not None:
        b.rms_norm(dst, dst, branch.after)
    if not direct:
        b.program.add(dst, x, branch.scale)


def _attention(b: Builder, index: int, a: Attention, normed: Tensor, dst: Tensor, add: bool) -> None:
    raw = b.buffer("attention_q", a.n_heads * a.head_dim * (2 if a.gated else 1))
    k, v = (b.buffer(f"attention_{name}", a.n_kv_heads * a.head_dim) for name in "kv")
    out = b.buffer("attention_out", a.n_heads * a.head_dim)
    b.linear(normed, (a.q, raw), (a.k, k), (a.v, v))
    for target in ((a.q, raw), (a.k, k), (a.v, v)):
        _adapt(b, normed, a.adapter, target)
    if a.biased != "none":
        for name, part in ((a.q, raw), (a.k, k), (a.v, v)):
            b.bias(part, name)
    if a.norms_together:
        _norm_heads(b, a, raw, k)
    q, k, v = b.heads(raw, a.n_heads), b.heads(k, a.n_kv_heads), b.heads(v, a.n_kv_heads)
    q, gate = torch.split(q, a.head_dim, dim=2) if a.gated else (q, None)
    if not a.norms_together:
        _norm_heads(b, a, q, k)
    if a.rope is not None:
        for part in (q, k):
            b.rope(part, a.rope)
    heads = b.heads(out, a.n_heads)
    b.attend(index, q, k, v, heads, a.scale)
    if gate is not None:
        b.program.gate(heads, gate, heads, "sigmoid")
    b.linear(out, (a.out, dst), add=add)
    if a.biased == "all":
        b.bias(dst, a.out)


def _adapt(b: Builder, x: Tensor, adapter: Adapter | None, *targets: tuple[str, Tensor]) -> None:
    """Add the low-rank products of weights that share an adapter's `a`, which has the first one's name."""
    if adapter is None:
        return
    low = b.buffer(f"low_{adapter.rank}", adapter.rank)
    b.linear(x, (adapter.a(targets[0][0]), low))
    b.linear(low, *((adapter.b(name), dst) for name, dst in targets), add=True)


def _norm_heads(b: Builder, a: Attention, q: Tensor, k: Tensor) -> None:
    for part, norm in ((q, a.q_norm), (k, a.k_norm)):
        if norm is not None:
            b.rms_norm(part, part, norm)


def _delta_net(b: Builder, index: int, d: DeltaNet, normed: Tensor, dst: Tensor, add: bool) -> None:
    n_key, n_value = d.n_keys * d.key_dim, d.n_values * d.value_dim
    raw, mixed = b.buffer("delta_raw", d.channels), b.buffer("delta_mixed", d.channels)
    z, out = b.buffer("delta_z", n_value), b.buffer("delta_out", n_value)
    decay, beta = b.buffer("delta_decay", d.n_values), b.buffer("delta_beta", d.n_values)
    conv_state, state = b.new_states(index, (d.kernel, d.channels), (d.n_values, d.key_dim, d.value_dim))
    projections = _delta_projections(b, d, raw, z)
    rates, alphas, betas = _rates(b, d)
    b.linear(normed, *projections, *rates)
    b.program.conv(raw, mixed, b.vector(d.conv).view(d.channels, d.kernel), None, conv_state)
    q, k, v = torch.split(mixed, [n_key, n_key, n_value], dim=1)
    q, k, v = b.heads(q, d.n_keys), b.heads(k, d.n_keys), b.heads(v, d.n_values)
    b.l2_norm(q, d.l2_eps, d.key_dim**-0.5)
    b.l2_norm(k, d.l2_eps)
    b.program.decay(
        alphas, betas, decay, beta, b.vector(d.decay).flatten(), b.vector(b.either(d.bias)).flatten(), d.update_scale
    )
    heads = b.heads(out, d.n_values)
    b.program.delta(q, k, v, decay, beta, heads, state, d.values)
    b.rms_norm(heads, heads, d.norm)
    b.program.gate(out, z, out, "silu")
    b.linear(out, (d.out, dst), add=add)


def _delta_projections(b: Builder, d: DeltaNet, raw: Tensor, z: Tensor) -> list[tuple[str | Weight, Tensor]]:
    """List the products that give queries, keys and values, side by side in `raw`, and gates."""
    if not isinstance(d.qkv, str):
        parts = torch.split(raw, [d.n_keys * d.key_dim, d.n_keys * d.key_dim, d.n_values * d.value_dim], dim=1)
        return [*zip(d.qkv, parts, strict=True), (d.gate, z)]
    return [(d.qkv, raw), (d.gate, z)] if b.has(d.qkv) else _interleaved(b, d, raw, z)


def _rates(b: Builder, d: DeltaNet) -> tuple[list[tuple[str | Weight, Tensor]], Tensor, Tensor]:
    """List the projections that a delta net's decay and update rates come from, and each one's columns."""
    if not d.joined_rates:
        alpha, beta = b.buffer("delta_a", d.n_values), b.buffer("delta_b", d.n_values)
        return [(d.alpha, alpha), (d.beta, beta)], alpha, beta
    both = b.buffer("delta_ba", 2 * d.n_values)
    betas, alphas = torch.chunk(b.heads(both, d.n_keys), 2, dim=2)
    return [(d.rates, both)], alphas, betas


def _interleaved(b: Builder, d: DeltaNet, raw: Tensor, z: Tensor) -> list[tuple[str | Weight, Tensor]]:
    """Split a matrix of rows `[q | k | values | gates]` per key head into products of its parts: nothing is moved."""
    weight, share = b.weight(d.joined), d.n_values // d.n_keys * d.value_dim
    n_key = d.n_keys * d.key_dim
    parts: list[tuple[str | Weight, Tensor]] = []
    row = 0
    for head in range(d.n_keys):
        for width, start, dst in (
            (d.key_dim, head * d.key_dim, raw),
            (d.key_dim, n_key + head * d.key_dim, raw),
            (share, 2 * n_key + head * share, raw),
            (share, head * share, z),
        ):
            parts.append((weight.part(row, row + width), dst[:, start : start + width]))
            row += width
    return parts


def _mamba2(b: Builder, index: int, m: Mamba2, normed: Tensor, dst: Tensor, add: bool) -> None:
    project = b.buffer("mamba_in", m.inner + m.channels + m.n_heads)
    mixed, out = b.buffer("mamba_mixed", m.channels), b.buffer("mamba_out", m.inner)
    conv_state, state = b.new_states(index, (m.kernel, m.channels), (m.n_heads, m.state_dim, m.head_dim))
    b.linear(normed, (m.project, project))
    gate, raw, dt = torch.split(project, [m.inner, m.channels, m.n_heads], dim=1)
    bias = b.vector(m.conv_bias).flatten() if b.has(m.conv_bias) else None
    b.program.conv(raw, mixed, b.vector(m.conv).view(m.channels, m.kernel), bias, conv_state)
    grouped = m.n_groups * m.state_dim
    x, left, right = torch.split(mixed, [m.inner, grouped, grouped], dim=1)
    names = {"rate": m.rate, "bias": b.either(m.bias), "skip": m.skip}
    vectors = {each: b.vector(name).flatten() for each, name in names.items()}
    groups = b.heads(left, m.n_groups), b.heads(right, m.n_groups)
    b.program.mamba2(b.heads(x, m.n_heads), *groups, dt, b.heads(out, m.n_heads), state, **vectors)
    b.program.gate(out, gate, out, "silu")
    if m.norm is not None:
        heads = b.heads(out, m.n_groups)
        b.rms_norm(heads, heads, m.norm)
    b.linear(out, (m.out, dst), add=add)


def _mamba1(b: Builder, index: int, m: Mamba1, normed: Tensor, dst: Tensor, add: bool) -> None:
    project, mixed = b.buffer("mamba_in", 2 * m.inner), b.buffer("mamba_mixed", m.inner)
    select, dt = b.buffer("mamba_select", m.rank + 2 * m.state_dim), b.buffer("mamba_dt", m.inner)
    conv_state, state = b.new_states(index, (m.kernel, m.inner), (m.inner, m.state_dim))
    b.linear(normed, (m.project, project))
    raw, gate = torch.chunk(project, 2, dim=1)
    bias = b.vector(m.conv_bias).flatten() if b.has(m.conv_bias) else None
    b.program.conv(raw, mixed, b.vector(m.conv).view(m.inner, m.kernel), bias, conv_state)
    b.linear(mixed, (m.select, select))
    steps, left, right = torch.split(select, [m.rank, m.state_dim, m.state_dim], dim=1)
    for part, norm in ((steps, m.dt_norm), (left, m.b_norm), (right, m.c_norm)):
        b.rms_norm(part, part, norm)
    b.linear(steps, (m.dt, dt))
    rate = b.vector(m.rate).view(m.inner, m.state_dim)
    vectors = {"rate": rate, "bias": b.vector(m.bias).flatten(), "skip": b.vector(m.skip).flatten()}
    b.program.mamba1(mixed, left, right, dt, mixed, state, **vectors)
    b.program.gate(mixed, gate, mixed, "silu")
    b.linear(mixed, (m.out, dst), add=add)


def _short_conv(b: Builder, index: int, s: ShortConv, normed: Tensor, dst: Tensor, add: bool) -> None:
    project, mixed = b.buffer("conv_in", 3 * s.channels), b.buffer("conv_mixed", s.channels)
    state, _ = b.new_states(index, (s.kernel, s.channels))
    b.linear(normed, (s.project, project))
    before, after, x = torch.chunk(project, 3, dim=1)
    b.program.gate(x, before, x, "product")
    b.program.conv(x, mixed, b.vector(s.conv).view(s.channels, s.kernel), None, state, silu=False)
    b.program.gate(mixed, after, mixed, "product")
    b.linear(mixed, (s.out, dst), add=add)


def _shared(b: Builder, index: int, s: Shared, x: Tensor, dst: Tensor, add: bool) -> None:
    hidden, own = x.shape[1], b.prefix
    joined, normed = b.buffer("joined", 2 * hidden), b.buffer("joined_normed", 2 * hidden)
    attended, fed = b.buffer("shared_attended", hidden), b.buffer("shared_fed", hidden)
    b.program.copy(x, joined[:, :hidden])
    b.prefix = f"blk.{s.owner}.shared."
    b.rms_norm(joined, normed, s.attn_norm)
    _attention(b, index, s.attention, normed, attended, add=False)
    b.rms_norm(attended, attended, s.ffn_norm)
    _gated(b, index, s.ffn, attended, fed, add=False)
    b.prefix = own
    b.linear(fed, (s.join, attended))
    b.program.add(x, attended)
    b.rms_norm(attended, attended, s.norm)
    _mamba2(b, index, s.mixer, attended, dst, add)


def _gated(b: Builder, index: int, f: Gated, normed: Tensor, dst: Tensor, add: bool) -> None:
    del index
    gate, up = b.buffer(f"gate_{f.width}", f.width), b.buffer(f"up_{f.width}", f.width)
    b.linear(normed, (f.gate, gate), (f.up, up))
    _adapt(b, normed, f.adapter, (f.gate, gate), (f.up, up))
    if f.biased:
        b.bias(gate, f.gate)
        b.bias(up, f.up)
    b.program.gate(up, gate, up, f.act)
    b.linear(up, (f.down, dst), add=add)
    if f.biased:
        b.bias(dst, f.down)


def _plain(b: Builder, index: int, f: Plain, normed: Tensor, dst: Tensor, add: bool) -> None:
    del index
    up = b.buffer(f"up_{f.width}", f.width)
    b.linear(normed, (f.up, up))
    b.program.gate(up, up, up, "relu")  # a number times its ReLU is the square of that
    b.linear(up, (f.down, dst), add=add)


def _experts(b: Builder, index: int, e: Experts, normed: Tensor, dst: Tensor, add: bool) -> None:
    scores = b.buffer("router", e.n_experts)
    targets: list[tuple[str | Weight, Tensor]] = [(e.router, scores)]
    x, result = normed, dst
    if e.shared is not None and e.weighed:
        targets.append((e.shared_gate, b.buffer("shared_weight", 1)))
    if e.latent:
        x, result = b.buffer("latent", e.latent), b.buffer("latent_out", e.latent)
        targets.append((b.either(e.into), x))
    b.linear(normed, *targets)
    gate, up = _expert_inputs(b, e)
    act: Gate = "silu" if e.gated else "relu"
    b.program.experts(x, scores, gate, up, b.weight(e.down), result, _routing(b, e), act=act, add=add and not e.latent)
    if e.latent:
        b.linear(result, (b.either(e.back), dst), add=add)
    if e.shared is not None and e.weighed:
        shared = b.buffer("shared", dst.shape[1])
        LOWER[type(e.shared)](b, index, e.shared, normed, shared, False)
        b.program.add_weighed(shared, b.buffer("shared_weight"), dst)
    elif e.shared is not None:
        LOWER[type(e.shared)](b, index, e.shared, normed, dst, True)


def _expert_inputs(b: Builder, e: Experts) -> tuple[Weight | None, Weight]:
    """Return the stacks of gates, if experts have them, and of what they gate."""
    if not e.gated:
        return None, b.weight(e.up)
    if b.has(e.gate):
        return b.weight(e.gate), b.weight(e.up)
    both = b.weight(e.gate_up)
    return both.part(0, e.width), both.part(e.width, 2 * e.width)


def _routing(b: Builder, e: Experts) -> Routing:
    c = e.choice
    bias = None if c.bias is None else b.vector(c.bias).flatten()
    return Routing(c.n_used, c.gating, bias, c.n_groups, c.n_used_groups, c.normalised, c.eps, c.scale)


LOWER: Mapping[type, Callable[[Builder, int, Any, Tensor, Tensor, bool], None]] = {
    Attention: _attention,
    DeltaNet: _delta_net,
    Mamba2: _mamba2,
    Mamba1: _mamba1,
    ShortConv: _short_conv,
    Shared: _shared,
    Gated: _gated,
    Plain: _plain,
    Experts: _experts,
}
"""Reads the normed hidden states, and writes its result to a buffer, or adds it to what is there."""
