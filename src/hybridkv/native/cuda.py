"""What each record of a model's graph becomes on CUDA: packed weights on the card, and Triton kernels between products.

The residual is float32, what products read is float16, and their sums are float32; of prompts, products are float16.
What lies between a gated feed-forward's products is counted in 32nds: it alone may be too large for float16.
`LOWER` has one function a record; `choice.rejects_packed` says which records it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridkv.hf.step.fused_layers import Embed, FusedRun, Head, Layers
from hybridkv.kernels.cuda.conv import conv_prompt, conv_step
from hybridkv.kernels.cuda.delta import DeltaShape, delta_prompt, delta_step, gated_norm
from hybridkv.kernels.cuda.experts import route
from hybridkv.kernels.cuda.layers import add_norm, gate_heads, norm_rope, swiglu
from hybridkv.kernels.cuda.packed import multiply_gated, multiply_packed
from hybridkv.kernels.cuda.packed_experts import prompt_experts, run_packed_experts
from hybridkv.kernels.cuda.packed_layout import PACKED, PackedWeight, upload
from hybridkv.kernels.cuda.packed_rows import gather_rows
from hybridkv.kernels.cuda.products import MOST_INPUTS, one_row
from hybridkv.kernels.cuda.streamed import Staging, StreamedStack
from hybridkv.kernels.step import Routing
from hybridkv.kernels.weights import Weight
from hybridkv.model import Attention, DeltaNet, Experts, Gated, ModelGraph, Norm
from hybridkv.model.protocols import Config
from hybridkv.model.rope import rope_frequencies
from hybridkv.native.hosted import Pinned
from hybridkv.native.sources import Typed

BETWEEN = 1 / 32
"""Factor on what lies between the products of a gated feed-forward."""

_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Mix = Callable[[Tensor, FusedRun], Tensor]
"""From normed rows, float16, to what is added to the residual."""


class Card:
    """A model's weights on a device, each uploaded once.

    Parameters
    ----------
    source
        Holds the weights in the file's order.
    hosted
        Names of tensors that stay in main memory: routed experts, and an embedding that is no head.
    n_rows
        Most rows of a run.
    """

    def __init__(
        self, source: Typed, device: torch.device, *, hosted: frozenset[str] = frozenset(), n_rows: int = 1
    ) -> None:
        self.source, self.device, self.hosted, self.n_rows = source, device, hosted, n_rows
        self.prefix = ""
        """Of the block that is lowered: `blk.3.`."""
        self.n_bytes = 0
        self._matrices: dict[tuple[str, ...], PackedWeight | Tensor] = {}
        self._pinned: Pinned | None = None
        self._staging: Staging | None = None

    def has(self, name: str) -> bool:
        """Check whether the block has a tensor of this name."""
        return self.source.has(self.prefix + name)

    def hosts(self, name: str) -> bool:
        """Check whether a tensor of the block stays in main memory."""
        return self.prefix + name in self.hosted

    @property
    def pinned(self) -> Pinned:
        """Memory through which rows reach what stays in main memory."""
        assert self._pinned is not None
        return self._pinned

    @property
    def n_host_layers(self) -> int:
        """Layers whose routed experts stay in main memory."""
        return 0 if self._pinned is None else self._pinned.n_layers

    @property
    def staging(self) -> Staging:
        """Memory through which matrices reach the device for a prompt."""
        if self._staging is None:
            self._staging = Staging(self.device)
        return self._staging

    def share_rows(self, graph: ModelGraph) -> None:
        """Take the memory for what of a model stays in main memory."""
        if self.hosted:
            n_experts = max((part.n_experts for part in graph.parts if isinstance(part, Experts)), default=0)
            self._pinned = Pinned(self.n_rows, graph.hidden, n_experts, self.device, self.source.verify)

    def weight(self, name: str) -> Weight:
        """Return a matrix or a stack of the block, where it lies."""
        return self.source.weight(self.prefix + name)

    def vector(self, name: str) -> Tensor:
        """Return a small tensor of the block, float32 on the device."""
        found = self.source.vector(self.prefix + name).to(self.device).contiguous()
        self.n_bytes += found.nbytes
        return found

    def norm(self, norm: Norm) -> Tensor:
        """Return the weight of a norm, flat; some files leave out its suffix."""
        name = norm.weight if self.has(norm.weight) else norm.weight.removesuffix(".weight")
        return self.vector(name).flatten()

    def joined(self, *names: str) -> PackedWeight | Tensor:
        """Join matrices of one type and width, one above the other: packed, or as their values."""
        key = tuple(self.prefix + name for name in names)
        if key not in self._matrices:
            weights = [self.weight(name) for name in names]
            if weights[0].format.name in _FLOATS:
                parts = [w.data.view(_FLOATS[w.format.name])[0].to(self.device) for w in weights]
                held: PackedWeight | Tensor = torch.cat(parts)
            else:
                held = upload(weights, self.device)
            self.n_bytes += held.nbytes
            self._matrices[key] = held
        return self._matrices[key]

    def packed(self, *names: str) -> PackedWeight:
        """Join matrices of a packed type."""
        held = self.joined(*names)
        assert isinstance(held, PackedWeight)
        return held

    def product(self, *names: str) -> Product:
        """Build one product of matrices that read the same rows."""
        groups = [tuple(part) for _, part in groupby(names, lambda name: self.weight(name).format.name)]
        widths = [[self.weight(name).n_out for name in group] for group in groups]
        return Product([self.joined(*group) for group in groups], widths)


class Product:
    """Matrices of several types that read the same rows.

    Parameters
    ----------
    matrices
        By type, in the order of their outputs.
    widths
        Outputs of each matrix before they were joined.
    """

    def __init__(self, matrices: Sequence[PackedWeight | Tensor], widths: Sequence[Sequence[int]]) -> None:
        order = sorted(range(len(matrices)), key=lambda i: isinstance(matrices[i], Tensor))  # packed ones first
        self._packed = [m for m in matrices if isinstance(m, PackedWeight)]
        self._plain = [m for m in matrices if isinstance(m, Tensor)]
        self._widths = [width for i in order for width in widths[i]]
        begins = [sum(map(len, widths[:i])) for i in range(len(widths))]
        at = [begins[i] + j for i in order for j in range(len(widths[i]))]
        self._places = [at.index(i) for i in range(len(at))]
        self._in_order = order == list(range(len(matrices)))

    def whole(self, x: Tensor, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
        """Multiply `[N, in]`, float16, to `[N, sum of outs]`."""
        parts = self._parts(x, dtype, factor)
        if not self._in_order:
            parts = self._split(parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Compute the outputs of each matrix, rows of a larger whole."""
        return self._split(self._parts(x, dtype, 1.0))

    def _split(self, parts: Sequence[Tensor]) -> list[Tensor]:
        out: list[Tensor] = []
        widths = iter(self._widths)
        for part in parts:
            at = 0
            while at < part.shape[1]:
                width = next(widths)
                out.append(part[:, at : at + width])
                at += width
        return [out[place] for place in self._places]

    def _parts(self, x: Tensor, dtype: torch.dtype, factor: float) -> list[Tensor]:
        """Launch two packed matrices at a time, the first plain one with the last of them."""
        parts, plain = [], self._plain
        for i in range(0, len(self._packed), 2):
            beside = None
            if i + 2 >= len(self._packed) and plain:
                beside, plain = plain[0], plain[1:]
            parts.append(multiply_packed(x, self._packed[i : i + 2], plain=beside, dtype=dtype, factor=factor))
        return parts + [_plain(x, matrix, dtype, factor) for matrix in plain]


def _plain(x: Tensor, matrix: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """Multiply by a matrix that is not packed."""
    if factor != 1.0:
        x = x * factor
    if len(x) == 1 and x.device.type == "cuda" and matrix.shape[1] <= MOST_INPUTS:
        return one_row(x, matrix, dtype=dtype)
    return F.linear(x.to(matrix.dtype), matrix).to(dtype)


def _dtype(run: FusedRun) -> torch.dtype:
    """Choose the dtype of what products give: float16 halves what a prompt's rows take."""
    return torch.float32 if run.n_tokens == 1 else torch.float16


def _attention(card: Card, config: Config, index: int, a: Attention) -> Mix:
    project, out = card.product(a.q, a.k, a.v), card.product(a.out)
    assert a.q_norm is not None and a.k_norm is not None and a.rope is not None
    norms = [(card.norm(norm), norm.eps) for norm in (a.q_norm, a.k_norm)]
    frequencies = rope_frequencies(config, a.rope.kind)[0].to(card.device)

    def mix(normed: Tensor, run: FusedRun) -> Tensor:
        raw, k, v = (torch.unflatten(x, 1, (-1, a.head_dim)) for x in project(normed, _dtype(run)))
        q, gate = (raw[:, 0::2], raw[:, 1::2]) if a.gated else (raw, None)
        # Prompts are attended in float16: queries that come so need no pass of their own.
        dtypes = (torch.float16 if run.n_tokens > 1 else torch.float32, None)
        q, k = (
            norm_rope(x, weight, eps, run.positions, frequencies, offset=0.0, dtype=dtype)
            for x, (weight, eps), dtype in zip((q, k), norms, dtypes, strict=True)
        )
        answer = run.attend(index, q, k, v, a.scale)
        if gate is None:
            return out.whole(answer.flatten(1).to(torch.float16).contiguous())
        return out.whole(gate_heads(answer, gate, dtype=torch.float16))

    return mix


def _delta_net(card: Card, config: Config, index: int, d: DeltaNet) -> Mix:
    del config
    assert isinstance(d.qkv, str)
    project, out = card.product(d.qkv, d.gate, d.alpha, d.beta), card.product(d.out)
    shape = DeltaShape(d.n_keys, d.n_values, d.key_dim, d.value_dim, tiled=d.values == "tiled")
    conv_weight = card.vector(d.conv).view(d.channels, 1, d.kernel)
    a_log, bias = torch.log(-card.vector(d.decay).flatten()), card.vector(next(filter(card.has, d.bias))).flatten()
    norm, eps = card.norm(d.norm), d.norm.eps
    like = torch.empty(0, device=card.device)
    recurrent = (shape.n_value, shape.head_k, shape.head_v)

    def mix(normed: Tensor, run: FusedRun) -> Tensor:
        raw, z, alpha, beta = project(normed, _dtype(run))
        conv, state = run.file_states(index, (shape.channels, d.kernel), recurrent, like)
        gates = (alpha, beta, a_log, bias)
        if run.n_tokens == 1:
            mixed = conv_step(raw, conv, conv_weight, None)
            answer = delta_step(mixed, z, *gates, norm, state, shape, eps=eps, dtype=torch.float16)
        else:
            answer = delta_prompt(conv_prompt(raw, conv, conv_weight, None), *gates, state, shape)
            answer = gated_norm(answer, z, norm, eps=eps)
        return out.whole(answer)

    return mix


def _gated(card: Card, config: Config, index: int, f: Gated) -> Mix:
    del config, index
    down = card.product(f.down)
    if card.weight(f.gate).format == card.weight(f.up).format and card.weight(f.gate).format.name in PACKED:
        both = card.packed(f.gate, f.up)

        def up(normed: Tensor) -> Tensor:
            return multiply_gated(normed, both, factor=BETWEEN)
    else:
        project = card.product(f.gate, f.up)

        def up(normed: Tensor) -> Tensor:
            return swiglu(project.whole(normed, torch.float32), factor=BETWEEN).to(torch.float16)

    def mix(normed: Tensor, _: FusedRun) -> Tensor:
        return down.whole(up(normed), factor=1 / BETWEEN)

    return mix


def _experts(card: Card, config: Config, index: int, e: Experts) -> Mix:
    del config, index
    assert isinstance(e.shared, Gated)
    scores = card.product(e.router, e.shared_gate)
    if card.hosts(e.down):
        return _host_experts(card, e, scores)
    stacked = card.packed(e.gate_up) if card.has(e.gate_up) else card.packed(e.gate, e.up)
    each = (stacked, card.packed(e.down))
    shared = (card.packed(e.shared.gate, e.shared.up), card.packed(e.shared.down))
    top_k, normalised = e.choice.n_used, e.choice.normalised

    def mix(normed: Tensor, run: FusedRun) -> Tensor:
        chosen = route(scores.whole(normed), top_k, normalize=normalised)
        # Rows that choose more often than there are experts read most experts for several rows.
        many = run.n_tokens > 1 and len(normed) * top_k > e.n_experts
        return (prompt_experts if many else run_packed_experts)(normed, chosen, each, shared, factor=BETWEEN)

    return mix


def _host_experts(card: Card, e: Experts, scores: Product) -> Mix:
    """Run routed experts in main memory; what they share is computed on the card meanwhile."""
    assert isinstance(e.shared, Gated)
    shared = (card.packed(e.shared.gate, e.shared.up), card.packed(e.shared.down))
    down, top_k, normalised = card.weight(e.down), e.choice.n_used, e.choice.normalised
    if card.has(e.gate_up):
        both = card.weight(e.gate_up)
        gate, up = both.part(0, e.width), both.part(e.width, 2 * e.width)
        stacked: tuple[Weight, ...] = (both,)
    else:
        gate, up = stacked = (card.weight(e.gate), card.weight(e.up))
    layer = card.pinned.add_layer(gate, up, down, Routing(top_k, normalised=normalised, scale=e.choice.scale))
    each = tuple(StreamedStack(part, card.staging, card.device) for part in (stacked, (down,)))
    pinned = card.pinned

    def mix(normed: Tensor, run: FusedRun) -> Tensor:
        raw = scores.whole(normed)
        if run.n_tokens > 1 and len(normed) >= pinned.least[layer]:
            chosen = route(raw, top_k, normalize=normalised)
            return prompt_experts(normed, chosen, (each[0], each[1]), shared, factor=BETWEEN)

        def shared_expert() -> Tensor:
            weight = torch.sigmoid(raw[:, -1:])
            return weight * multiply_packed(
                multiply_gated(normed, shared[0], factor=BETWEEN), (shared[1],), factor=1 / BETWEEN
            )

        return pinned.experts(layer, normed, raw[:, :-1], shared_expert)

    return mix


LOWER: Mapping[type, Callable[[Card, Any, int, Any], Mix]] = {
    Attention: _attention,
    DeltaNet: _delta_net,
    Gated: _gated,
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


def build(graph: ModelGraph, config: Config, card: Card) -> tuple[Embed, Layers, Head]:
    """Upload a model, and write it down; `choice.rejects_packed` must have said None."""
    card.share_rows(graph)
    branches: list[tuple[Tensor, float, Mix]] = []
    for index, block in enumerate(graph.blocks):
        card.prefix = f"blk.{index}."
        for branch in block.branches:
            assert branch.norm is not None
            (part,) = branch.parts
            branches.append((card.norm(branch.norm), branch.norm.eps, LOWER[type(part)](card, config, index, part)))
    card.prefix = ""
    embed = _embed(card, graph)
    head_product = card.product(graph.head if card.has(graph.head) else graph.embed)
    last = card.norm(graph.norm)

    def layers(x: Tensor, run: FusedRun) -> Tensor:
        added: Tensor | None = None
        for weight, eps, mix in branches:
            added = mix(add_norm(x, added, weight, eps, dtype=torch.float16), run)
        return x if added is None else x.add_(added)

    def head(hidden: Tensor) -> Tensor:
        normed = add_norm(hidden, None, last, graph.norm.eps, dtype=torch.float16)
        return head_product.whole(normed, factor=graph.logit_scale)

    return embed, layers, head
