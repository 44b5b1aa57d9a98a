"""The tensors that a graph reads, and their shapes: what a file is checked against before any weight is touched.

Names are GGUF's; shapes are Torch's, slowest dimension first. What a backend makes of the tensors is its own business
(`hybridkv.native.cpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hybridkv.model.graph import Block, ModelGraph, Prediction
from hybridkv.model.layers import Attention, DeltaNet, Experts, Gated, Mamba1, Mamba2, Norm, Part, Plain, ShortConv

Has = Callable[[str], bool]
"""Predicate: a file has a tensor of this name."""


@dataclass(frozen=True, slots=True)
class Named:
    """One tensor that a graph reads.

    Attributes
    ----------
    names
        What files call it; the first is written.
    shape
        Dimensions of one may be missing or added in a file.
    optional
        Whether a model can do without it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False

    def name_in(self, has: Has) -> str | None:
        """Return the name under which a file has this tensor; None if it has none of them."""
        return next((name for name in self.names if has(name)), None)


def graph_tensors(graph: ModelGraph, has: Has) -> Iterator[Named]:
    """Yield every tensor of a graph, in the layout that a file has where there are several."""
    yield _one(graph.embed, graph.n_vocab, graph.hidden)
    yield Named((graph.head,), (graph.n_vocab, graph.hidden), optional=True)
    yield _norm(graph.norm, graph.hidden)
    for index, block in enumerate(graph.blocks):
        yield from _block(block, f"blk.{index}.", graph.hidden, has)
    if graph.prediction is not None:
        yield from prediction_tensors(graph, graph.prediction, has)


def prediction_tensors(graph: ModelGraph, head: Prediction, has: Has) -> Iterator[Named]:
    """Yield every tensor of a head of multi-token prediction."""
    yield from _block(head.block, head.prefix, graph.hidden, has)
    own = (
        _one(head.project, graph.hidden, 2 * graph.hidden),
        *(_norm(norm, graph.hidden) for norm in (head.embed_norm, head.hidden_norm)),
        Named((head.norm.weight,), (graph.hidden,), optional=True),
        *(_one(name, graph.n_vocab, graph.hidden, optional=True) for name in (head.embed, head.head)),
    )
    yield from (_within(head.prefix, each) for each in own)


def _block(block: Block, prefix: str, hidden: int, has: Has) -> Iterator[Named]:
    def in_block(name: str) -> bool:
        return has(prefix + name)

    for branch in block.branches:
        norms = [norm for norm in (branch.norm, branch.after) if norm is not None]
        found = [_norm(norm, hidden) for norm in norms]
        for part in branch.parts:
            found += _PARTS[type(part)](part, hidden, in_block)
        yield from (_within(prefix, each) for each in found)


def _within(prefix: str, each: Named) -> Named:
    return Named(tuple(prefix + name for name in each.names), each.shape, each.optional)


def _one(name: str, *shape: int, optional: bool = False) -> Named:
    return Named((name,), shape, optional)


def _norm(norm: Norm, *shape: int) -> Named:
    return Named((norm.weight, norm.weight.removesuffix(".weight")), shape)


def _bias(weight: str, width: int) -> Named:
    return _one(weight.removesuffix(".weight") + ".bias", width)


def _attention(a: Attention, hidden: int, has: Has) -> Iterator[Named]:
    del has
    n_query, n_key = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    rows = {a.q: n_query * (2 if a.gated else 1), a.k: n_key, a.v: n_key}
    for name, width in rows.items():
        yield _one(name, width, hidden)
        if a.biased != "none":
            yield _bias(name, width)
    yield _one(a.out, hidden, n_query)
    if a.biased == "all":
        yield _bias(a.out, hidden)
    for norm, width in ((a.q_norm, n_query), (a.k_norm, n_key)):
        if norm is not None:
            yield _norm(norm, width if a.norms_together else a.head_dim)


def _delta_net(d: DeltaNet, hidden: int, has: Has) -> Iterator[Named]:
    n_key, n_value = d.n_keys * d.key_dim, d.n_values * d.value_dim
    if not isinstance(d.qkv, str):
        yield from (_one(name, width, hidden) for name, width in zip(d.qkv, (n_key, n_key, n_value), strict=True))
        yield _one(d.gate, n_value, hidden)
    elif has(d.qkv) or not has(d.joined):
        yield _one(d.qkv, d.channels, hidden)
        yield _one(d.gate, n_value, hidden)
    else:
        yield _one(d.joined, d.channels + n_value, hidden)
    for name in (d.rates,) if d.joined_rates else (d.alpha, d.beta):
        yield _one(name, d.n_values * (2 if d.joined_rates else 1), hidden)
    yield _one(d.decay, d.n_values)
    yield Named(d.bias, (d.n_values,))
    yield _one(d.conv, d.channels, d.kernel)
    yield _norm(d.norm, d.value_dim)
    yield _one(d.out, hidden, n_value)


def _mamba2(m: Mamba2, hidden: int, has: Has) -> Iterator[Named]:
    del has
    yield _one(m.project, m.inner + m.channels + m.n_heads, hidden)
    yield _one(m.conv, m.channels, m.kernel)
    yield _one(m.conv_bias, m.channels, optional=True)
    yield Named(m.bias, (m.n_heads,))
    yield from (_one(name, m.n_heads) for name in (m.rate, m.skip))
    if m.norm is not None:
        yield _norm(m.norm, m.n_groups, m.inner // m.n_groups)
    yield _one(m.out, hidden, m.inner)


def _mamba1(m: Mamba1, hidden: int, has: Has) -> Iterator[Named]:
    del has
    yield _one(m.project, 2 * m.inner, hidden)
    yield _one(m.conv, m.inner, m.kernel)
    yield _one(m.conv_bias, m.inner, optional=True)
    yield _one(m.select, m.rank + 2 * m.state_dim, m.inner)
    yield _one(m.dt, m.inner, m.rank)
    yield _one(m.bias, m.inner)
    yield _one(m.rate, m.inner, m.state_dim)
    yield _one(m.skip, m.inner)
    yield from (_norm(norm, n) for norm, n in ((m.dt_norm, m.rank), (m.b_norm, m.state_dim), (m.c_norm, m.state_dim)))
    yield _one(m.out, hidden, m.inner)


def _short_conv(s: ShortConv, hidden: int, has: Has) -> Iterator[Named]:
    del has
    yield _one(s.project, 3 * s.channels, hidden)
    yield _one(s.conv, s.channels, s.kernel)
    yield _one(s.out, hidden, s.channels)


def _gated(f: Gated, hidden: int, has: Has) -> Iterator[Named]:
    del has
    for name, width in ((f.gate, f.width), (f.up, f.width)):
        yield _one(name, width, hidden)
        if f.biased:
            yield _bias(name, width)
    yield _one(f.down, hidden, f.width)
    if f.biased:
        yield _bias(f.down, hidden)


def _plain(f: Plain, hidden: int, has: Has) -> Iterator[Named]:
    del has
    yield _one(f.up, f.width, hidden)
    yield _one(f.down, hidden, f.width)


def _experts(e: Experts, hidden: int, has: Has) -> Iterator[Named]:
    inside = e.latent or hidden
    yield _one(e.router, e.n_experts, hidden)
    if e.choice.bias is not None:
        yield _one(e.choice.bias, e.n_experts)
    if e.gated and not has(e.gate) and has(e.gate_up):
        yield _one(e.gate_up, e.n_experts, 2 * e.width, inside)
    else:
        yield from (_one(name, e.n_experts, e.width, inside) for name in ((e.gate,) if e.gated else ()) + (e.up,))
    yield _one(e.down, e.n_experts, inside, e.width)
    if e.latent:
        yield Named(e.into, (e.latent, hidden))
        yield Named(e.back, (hidden, e.latent))
    if e.shared is not None:
        yield from _PARTS[type(e.shared)](e.shared, hidden, has)
        if e.weighed:
            yield _one(e.shared_gate, hidden)


_PARTS: Mapping[type[Part], Callable[[Any, int, Has], Iterator[Named]]] = {
    Attention: _attention,
    DeltaNet: _delta_net,
    Mamba2: _mamba2,
    Mamba1: _mamba1,
    ShortConv: _short_conv,
    Gated: _gated,
    Plain: _plain,
    Experts: _experts,
}
