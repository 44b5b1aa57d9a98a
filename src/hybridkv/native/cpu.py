"""What each record of a model's graph becomes on the CPU: native operations on buffers.

`LOWER` has one function a record; `rejects` is the first record that has none, or that its operation cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hybridkv.kernels.step import delta_rejects
from hybridkv.kernels.weights import Weight
from hybridkv.model import Attention, Block, DeltaNet, Experts, Gated, ModelGraph
from hybridkv.native.builder import Builder


def rejects(graph: ModelGraph) -> str | None:
    """Why the CPU's operations cannot run a graph; None if they can."""
    for block in graph.blocks:
        for record in (block.mixer, block.ffn):
            if type(record) not in LOWER:
                return f"knows no {type(record).__name__}"
        if isinstance(block.mixer, DeltaNet):
            reason = delta_rejects(block.mixer.key_dim, block.mixer.value_dim)
            if reason is not None:
                return reason
    return None


def build_layers(graph: ModelGraph, b: Builder) -> None:
    """Write all blocks: embedded tokens come in buffer `x`, hidden states are left there."""
    x = b.buffer("x", graph.hidden)
    for index, block in enumerate(graph.blocks):
        b.prefix = f"blk.{index}."
        _block(b, index, block, x)
    b.prefix = ""


def build_head(graph: ModelGraph, b: Builder) -> None:
    """Write what follows, for the tokens whose logits are asked for: from buffer `x` to buffer `logits`."""
    x = b.buffer("x", graph.hidden)
    b.rms_norm(x, x, graph.norm)
    head = graph.head if b.has(graph.head) else graph.embed
    b.linear(x, (head, b.buffer("logits", graph.n_vocab)))


def _block(b: Builder, index: int, block: Block, x: Tensor) -> None:
    normed = b.buffer("normed", x.shape[1])
    b.rms_norm(x, normed, block.norm)
    LOWER[type(block.mixer)](b, index, block.mixer, normed, x)
    b.rms_norm(x, normed, block.ffn_norm)
    LOWER[type(block.ffn)](b, index, block.ffn, normed, x)


def _attention(b: Builder, index: int, a: Attention, normed: Tensor, x: Tensor) -> None:
    raw = b.buffer("attention_q", a.n_heads * a.head_dim * (2 if a.gated else 1))
    k, v = (b.buffer(f"attention_{name}", a.n_kv_heads * a.head_dim) for name in "kv")
    out = b.buffer("attention_out", a.n_heads * a.head_dim)
    b.linear(normed, (a.q, raw), (a.k, k), (a.v, v))
    q, k, v = b.heads(raw, a.n_heads), b.heads(k, a.n_kv_heads), b.heads(v, a.n_kv_heads)
    q, gate = torch.split(q, a.head_dim, dim=2) if a.gated else (q, None)
    for part, norm in ((q, a.q_norm), (k, a.k_norm)):
        if norm is not None:
            b.rms_norm(part, part, norm)
        if a.rope is not None:
            b.program.rope(part, a.rope.n_rotated, a.rope.pairs)
    heads = b.heads(out, a.n_heads)
    b.attend(index, q, k, v, heads, a.scale)
    if gate is not None:
        b.program.gate(heads, gate, heads, "sigmoid")
    b.linear(out, (a.out, x), add=True)


def _delta_net(b: Builder, index: int, d: DeltaNet, normed: Tensor, x: Tensor) -> None:
    n_key, n_value = d.n_keys * d.key_dim, d.n_values * d.value_dim
    raw, mixed = b.buffer("delta_raw", d.channels), b.buffer("delta_mixed", d.channels)
    z, out = b.buffer("delta_z", n_value), b.buffer("delta_out", n_value)
    decay, beta = b.buffer("delta_decay", d.n_values), b.buffer("delta_beta", d.n_values)
    conv_state, state = b.new_states(index, (d.kernel, d.channels), (d.n_values, d.key_dim, d.value_dim))
    projections = [(d.qkv, raw), (d.gate, z)] if b.has(d.qkv) else _interleaved(b, d, raw, z)
    rates, alphas, betas = _rates(b, d)
    b.linear(normed, *projections, *rates)
    b.program.conv(raw, mixed, b.vector(d.conv).view(d.channels, d.kernel), None, conv_state)
    q, k, v = torch.split(mixed, [n_key, n_key, n_value], dim=1)
    q, k, v = b.heads(q, d.n_keys), b.heads(k, d.n_keys), b.heads(v, d.n_values)
    b.l2_norm(q, d.l2_eps, d.key_dim**-0.5)
    b.l2_norm(k, d.l2_eps)
    b.program.decay(alphas, betas, decay, beta, b.vector(d.decay).flatten(), b.vector(d.bias).flatten())
    heads = b.heads(out, d.n_values)
    b.program.delta(q, k, v, decay, beta, heads, state, d.values)
    b.rms_norm(heads, heads, d.norm)
    b.program.gate(out, z, out, "silu")
    b.linear(out, (d.out, x), add=True)


def _rates(b: Builder, d: DeltaNet) -> tuple[list[tuple[str | Weight, Tensor]], Tensor, Tensor]:
    """The projections that a delta net's decay and update rates come from, and each one's columns."""
    if not d.joined_rates:
        alpha, beta = b.buffer("delta_a", d.n_values), b.buffer("delta_b", d.n_values)
        return [(d.alpha, alpha), (d.beta, beta)], alpha, beta
    both = b.buffer("delta_ba", 2 * d.n_values)
    betas, alphas = torch.chunk(b.heads(both, d.n_keys), 2, dim=2)
    return [(d.rates, both)], alphas, betas


def _interleaved(b: Builder, d: DeltaNet, raw: Tensor, z: Tensor) -> list[tuple[str | Weight, Tensor]]:
    """A matrix whose rows are `[q | k | values | gates]` per key head, as products of its parts: nothing is moved."""
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


def _gated(b: Builder, index: int, f: Gated, normed: Tensor, x: Tensor) -> None:
    del index
    _feed_forward(b, f, normed, x, add=True)


def _feed_forward(b: Builder, f: Gated, normed: Tensor, dst: Tensor, *, add: bool) -> None:
    gate, up = b.buffer(f"gate_{f.width}", f.width), b.buffer(f"up_{f.width}", f.width)
    b.linear(normed, (f.gate, gate), (f.up, up))
    b.program.gate(up, gate, up, "silu")  # silu(gate) is gate times its sigmoid: up * silu(gate)
    b.linear(up, (f.down, dst), add=add)


def _experts(b: Builder, index: int, e: Experts, normed: Tensor, x: Tensor) -> None:
    del index
    scores = b.buffer("router", e.n_experts)
    targets: list[tuple[str | Weight, Tensor]] = [(e.router, scores)]
    if e.shared is not None:
        weigh = b.buffer("shared_weight", 1)
        row = b.weight(e.shared_gate)
        targets.append((row, weigh))
    b.linear(normed, *targets)
    both = None if b.has(e.gate) else b.weight(e.gate_up)
    gate = b.weight(e.gate) if both is None else both.part(0, e.width)
    up = b.weight(e.up) if both is None else both.part(e.width, 2 * e.width)
    b.program.experts(normed, scores, gate, up, b.weight(e.down), x, n_used=e.n_used, normalised=e.normalised)
    if e.shared is not None:
        shared = b.buffer("shared", x.shape[1])
        _feed_forward(b, e.shared, normed, shared, add=False)
        b.program.add_weighed(shared, weigh, x)


LOWER: Mapping[type, Callable[[Builder, int, Any, Tensor, Tensor], None]] = {
    Attention: _attention,
    DeltaNet: _delta_net,
    Gated: _gated,
    Experts: _experts,
}
"""Reads the normed hidden states, and adds its result to the residual stream."""
