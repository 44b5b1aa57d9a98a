"""The lowering of a model's graph to CUDA: packed weights on the card, and Triton kernels between products.

The residual is float32, what products read is float16, and their sums are float32; of prompts, products are float16.
What lies between a feed-forward's products is counted in 32nds: it alone may be too large for float16. `LOWER` has one
function a record; mixers are in `cuda_mixers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridkv.hf.step.fused_layers import Embed, Head, Layers, StepContext
from hybridkv.kernels.cuda.layers import activated, add_norm
from hybridkv.kernels.cuda.packed import multiply_gated
from hybridkv.kernels.cuda.packed_layout import PackedWeight
from hybridkv.kernels.cuda.packed_rows import gather_rows
from hybridkv.model import (
    Attention,
    Branch,
    DeltaNet,
    Experts,
    Gated,
    Mamba1,
    Mamba2,
    ModelGraph,
    Norm,
    Plain,
    Shared,
    ShortConv,
)
from hybridkv.model.protocols import Config
from hybridkv.native.cuda_card import Card
from hybridkv.native.cuda_experts import experts
from hybridkv.native.cuda_mixers import (
    BETWEEN,
    Mix,
    adapted,
    attention,
    delta_net,
    dtype_of,
    mamba1,
    mamba2,
    short_conv,
    summed,
)


def _gated(card: Card, config: Config, index: int, f: Gated) -> Mix:
    del config, index
    down, up = card.product(f.down, biased=f.biased), _activated(card, f)

    def mix(normed: Tensor, context: StepContext) -> Tensor:
        return down.shares(up(normed, context), factor=1 / BETWEEN)

    return mix


def _activated(card: Card, f: Gated) -> Mix:
    """Lower what lies between a gated feed-forward's products: in the first one's kernel, where nothing is added."""
    if card.one_type(f.gate, f.up) and not f.biased and f.adapter is None:
        both = card.packed(f.gate, f.up)
        return lambda normed, _: multiply_gated(normed, both, f.act, factor=BETWEEN)
    project = card.product(f.gate, f.up, biased=f.biased)
    more = None if f.adapter is None else adapted(card, f.adapter, f.gate, f.up)

    def up(normed: Tensor, context: StepContext) -> Tensor:
        parts = project.whole(normed, dtype_of(context))
        if more is not None:
            parts = parts + torch.cat(more(normed, dtype_of(context)), 1)
        return activated(parts, f.act, factor=BETWEEN, dtype=torch.float16)

    return up


def _plain(card: Card, config: Config, index: int, f: Plain) -> Mix:
    del config, index
    up, down = card.product(f.up), card.product(f.down)

    def mix(normed: Tensor, context: StepContext) -> Tensor:
        squares = activated(up.whole(normed, dtype_of(context)), "relu2", factor=BETWEEN, dtype=torch.float16)
        return down.whole(squares, factor=1 / BETWEEN)

    return mix


def _experts(card: Card, config: Config, index: int, e: Experts) -> Mix:
    return experts(card, e, lambda part: LOWER[type(part)](card, config, index, part))


def _shared(card: Card, config: Config, index: int, s: Shared) -> Mix:
    """Lower a block that several layers share, before a layer's own mixer; it reads the residual as it is."""
    own, card.prefix = card.prefix, f"blk.{s.owner}.shared."
    before, attend = (card.norm(s.attn_norm), s.attn_norm.eps), attention(card, config, index, s.attention)
    between, feed = (card.norm(s.ffn_norm), s.ffn_norm.eps), _gated(card, config, index, s.ffn)
    card.prefix = own
    join, last, mixer = card.product(s.join), (card.norm(s.norm), s.norm.eps), mamba2(card, config, index, s.mixer)

    def mix(x: Tensor, context: StepContext) -> Tensor:
        assert context.embedded is not None
        joined = torch.cat([x, context.embedded], 1)
        attended = summed(attend(add_norm(joined, None, *before, dtype=torch.float16), context))
        fed = summed(feed(add_norm(attended, None, *between, dtype=torch.float16), context))
        return mixer(add_norm(join.whole(fed.to(torch.float16)), x, *last, dtype=torch.float16), context)

    return mix


LOWER: Mapping[type, Callable[[Card, Any, int, Any], Mix]] = {
    Attention: attention,
    DeltaNet: delta_net,
    Mamba2: mamba2,
    Mamba1: mamba1,
    ShortConv: short_conv,
    Shared: _shared,
    Gated: _gated,
    Plain: _plain,
    Experts: _experts,
}


def _embed(card: Card, graph: ModelGraph) -> Embed:
    if card.hosts(graph.embed):
        weight, pinned = card.weight(graph.embed), card.pinned
        return lambda tokens: pinned.embed(weight, tokens, graph.embed_scale)
    table = card.joined(graph.embed)

    def embed(tokens: Tensor) -> Tensor:
        rows = gather_rows(table, tokens) if isinstance(table, PackedWeight) else F.embedding(tokens, table)
        return rows.to(torch.float32) if graph.embed_scale == 1 else rows.to(torch.float32) * graph.embed_scale

    return embed


@dataclass(frozen=True, slots=True)
class _Branch:
    """A branch of the residual stream; norms are weights with their epsilons.

    Attributes
    ----------
    wide
        Whether its part reads the residual as it is.
    """

    norm: tuple[Tensor, float] | None
    mixes: tuple[Mix, ...]
    after: tuple[Tensor, float] | None
    scale: float
    wide: bool

    def read(self, x: Tensor, added: Tensor | None, scale: float) -> Tensor:
        """Add what the branch before gave to the residual, and return what this one's parts read."""
        if self.norm is not None:
            return add_norm(x, added, *self.norm, scale=scale, dtype=torch.float16)
        if added is not None:
            x.add_(summed(added), alpha=scale)
        return x if self.wide else x.to(torch.float16)

    def __call__(self, normed: Tensor, context: StepContext) -> Tensor:
        """Compute what is added to the residual, but for the factor."""
        first, *rest = self.mixes
        added = first(normed, context)
        for mix in rest:
            added = summed(added).add_(summed(mix(normed, context)))
        return added if self.after is None else add_norm(summed(added), None, *self.after)


def _branch(card: Card, config: Config, index: int, branch: Branch) -> _Branch:
    def held(norm: Norm | None) -> tuple[Tensor, float] | None:
        return None if norm is None else (card.norm(norm), norm.eps)

    mixes = tuple(LOWER[type(part)](card, config, index, part) for part in branch.parts)
    wide = isinstance(branch.parts[0], Shared)
    return _Branch(held(branch.norm), mixes, held(branch.after), branch.scale, wide)


def build(graph: ModelGraph, config: Config, card: Card) -> tuple[Embed, Layers, Head]:
    """Upload a model, and write it down; `choice.rejects_packed` must have said None."""
    card.share_rows(graph)
    branches: list[_Branch] = []
    for index, block in enumerate(graph.blocks):
        card.prefix = f"blk.{index}."
        branches += [_branch(card, config, index, branch) for branch in block.branches]
    card.prefix = ""
    embed = _embed(card, graph)
    head_product = card.product(graph.head if card.has(graph.head) else graph.embed)
    last, reads_embedding = card.norm(graph.norm), any(isinstance(part, Shared) for part in graph.parts)

    def layers(x: Tensor, context: StepContext) -> Tensor:
        added: Tensor | None = None
        scale = 1.0
        if reads_embedding:
            context = replace(context, embedded=x.clone())
        for branch in branches:
            added = branch(branch.read(x, added, scale), context)
            scale = branch.scale
        return x if added is None else x.add_(summed(added), alpha=scale)

    def head(hidden: Tensor) -> Tensor:
        normed = add_norm(hidden, None, last, graph.norm.eps, dtype=torch.float16)
        return head_product.whole(normed, factor=graph.logit_scale)

    return embed, layers, head
