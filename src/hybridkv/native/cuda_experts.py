"""The lowering of a mixture of experts to CUDA: routed experts on the card or in main memory, and the shared one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hybridkv.hf.step.fused_layers import StepContext
from hybridkv.kernels.cuda.experts import bias_of_groups, route
from hybridkv.kernels.cuda.packed_experts import prompt_experts, run_packed_experts
from hybridkv.kernels.cuda.packed_layout import PackedWeight
from hybridkv.kernels.cuda.streamed import StreamedStack
from hybridkv.kernels.routing import Routing
from hybridkv.kernels.weights import Weight
from hybridkv.model import Experts, FeedForward, Gated
from hybridkv.native.cuda_card import Card
from hybridkv.native.cuda_mixers import BETWEEN, Mix, summed

Chosen = tuple[Tensor, Tensor]
Routed = Callable[[Tensor, Tensor, StepContext, Callable[[], Tensor | None]], Tensor]
"""From rows, the router's scores, and what the shared expert gives (computed meanwhile) to the sum of all answers."""


class _Router:
    """Chooses experts.

    Parameters
    ----------
    fused
        Whether the shared expert is one more of the chosen.
    """

    def __init__(self, card: Card, e: Experts, *, fused: bool) -> None:
        self._choice, self._n_experts = e.choice, e.n_experts
        self._bias = None if e.choice.bias is None else card.vector(e.choice.bias).flatten()
        self._shared: Literal["weighed", "always", "none"] = "none"
        if fused:
            self._shared = "weighed" if e.weighed else "always"

    def __call__(self, raw: Tensor) -> Chosen:
        """Choose by scores `[N, experts]`, and the shared expert's gate behind them."""
        c, scores = self._choice, raw[:, : self._n_experts]
        bias = self._bias
        if c.n_groups > 1:
            zero = raw.new_zeros(self._n_experts, dtype=torch.float32)
            bias = bias_of_groups(scores, zero if bias is None else bias, c.n_groups, c.n_used_groups)
        return route(
            raw if self._shared == "weighed" else scores,
            c.n_used,
            normalize=c.normalised,
            gating=c.gating,
            bias=bias,
            eps=c.eps,
            scale=c.scale,
            shared=self._shared,
        )


def experts(card: Card, e: Experts, lower: Callable[[FeedForward], Mix]) -> Mix:
    """Lower a mixture of experts; `lower` does that with the shared one."""
    has_gate = e.shared is not None and e.weighed
    scores = card.product(e.router, *([e.shared_gate] if has_gate else []))
    routed = _hosted(card, e) if card.hosts(e.down) else _on_card(card, e)
    fused = _fused_shared(card, e) is not None and not card.hosts(e.down)
    shared = None if e.shared is None or fused else lower(e.shared)
    around = (card.product(card.either(e.into)), card.product(card.either(e.back))) if e.latent else None

    def mix(normed: Tensor, context: StepContext) -> Tensor:
        raw = scores.whole(normed)

        def beside() -> Tensor | None:
            if shared is None:
                return None
            answer = summed(shared(normed, context))
            return answer * torch.sigmoid(raw[:, -1:]) if has_gate else answer

        if around is None:
            return routed(normed, raw, context, beside)
        into, back = around
        answer = back.whole(routed(into.whole(normed, torch.float16), raw, context, lambda: None).to(torch.float16))
        other = beside()
        return answer if other is None else answer.add_(other)

    return mix


def _stacked(card: Card, e: Experts) -> tuple[str, ...]:
    """Name the stacks of what comes before an expert's activation."""
    if not e.gated:
        return (e.up,)
    return (e.gate_up,) if card.has(e.gate_up) else (e.gate, e.up)


def _fused_shared(card: Card, e: Experts) -> Gated | None:
    """Return the shared expert if it can be one more of the chosen."""
    s = e.shared
    if not isinstance(s, Gated) or not e.gated or e.latent or s.biased or s.act != "silu":
        return None
    packed = card.one_type(s.gate, s.up) and card.one_type(s.down)
    return s if packed and card.one_type(*_stacked(card, e)) and card.one_type(e.down) else None


def _on_card(card: Card, e: Experts) -> Routed:
    up, down = card.stack(*_stacked(card, e)), card.stack(e.down)
    own = _fused_shared(card, e)
    shared = None if own is None else (card.packed(own.gate, own.up), card.packed(own.down))
    choose, gated, top_k = _Router(card, e, fused=own is not None), e.gated, e.choice.n_used

    def routed(x: Tensor, raw: Tensor, context: StepContext, meanwhile: Callable[[], Tensor | None]) -> Tensor:
        chosen, other = choose(raw), meanwhile()
        # Rows that choose more often than there are experts read most experts for several rows.
        few = context.n_tokens == 1 or len(x) * top_k <= e.n_experts
        if few and isinstance(up, PackedWeight) and isinstance(down, PackedWeight):
            answer = run_packed_experts(x, chosen, (up, down), shared, factor=BETWEEN, gated=gated)
        else:
            answer = prompt_experts(x, chosen, (up, down), shared, factor=BETWEEN, gated=gated)
        return answer if other is None else answer.add_(other)

    return routed


def _hosted(card: Card, e: Experts) -> Routed:
    """Run routed experts in main memory; what they share is computed on the card meanwhile."""
    c = e.choice
    stacked: tuple[Weight, ...] = tuple(card.weight(name) for name in _stacked(card, e))
    down, pinned, choose = card.weight(e.down), card.pinned, _Router(card, e, fused=False)
    gate, up = (None, stacked[0]) if not e.gated else (stacked[0], stacked[-1])
    if e.gated and len(stacked) == 1:
        gate, up = up.part(0, e.width), up.part(e.width, 2 * e.width)
    bias = None if c.bias is None else card.source.vector(card.prefix + c.bias).flatten()
    routing = Routing(c.n_used, c.gating, bias, c.n_groups, c.n_used_groups, c.normalised, c.eps, c.scale)
    layer = pinned.add_layer(gate, up, down, routing)
    # Gate and up in one stack stay so; apart, they are joined as they are sent.
    each = tuple(StreamedStack(part, card.staging, card.device) for part in (stacked, (down,)))

    def routed(x: Tensor, raw: Tensor, context: StepContext, meanwhile: Callable[[], Tensor | None]) -> Tensor:
        if context.n_tokens == 1 or len(x) < pinned.least[layer]:
            return pinned.experts(layer, x, raw[:, : e.n_experts], meanwhile)
        answer = prompt_experts(x, choose(raw), (each[0], each[1]), None, factor=BETWEEN, gated=e.gated)
        other = meanwhile()
        return answer if other is None else answer.add_(other)

    return routed
