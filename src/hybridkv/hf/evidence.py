"""What the guard measures of a layer, with other code than the code that is measured.

Three numbers of one call, on a bounded sample of its queries and rows: how far its attention is from attention over
the activations (do the types suit the layer?), how far the stored rows are from what the types make of the activations,
and how far the attention is from float attention over the rows that are stored (does the code do what the types mean?).

Stored rows are encoded again by `KVFormat`, rotated by the butterfly below and not by `hybridkv.rotation`; the mask is
written out for the sampled queries. Measures only; `hybridkv.hf.attention` acts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.formats import FORMATS, KVFormat
from hybridkv.hf.layers import LayerView
from hybridkv.kernels import AttentionParams, KVView, Segment
from hybridkv.kernels.reference import attend as reference_attend
from hybridkv.policy import Evidence

SAMPLED_QUERIES = 16
"""Queries of a call that are compared at most, evenly spaced; the first few come in addition."""

EARLY_QUERIES = (0, 1, 2)
"""They see so few rows that one row too many or too few weighs much."""

SHORT_PROMPT = 256
"""In a first prompt shorter than this, only the first layer of each kind has its rows and its attention verified."""

SAMPLED_ROWS = 8
"""Rows of a call that are encoded again: as many of those that err most, and as many evenly spaced."""


def measure(query: Tensor, packed: LayerView, params: AttentionParams, out: Tensor) -> Evidence | None:
    """Evidence of a call that attends nothing but rows whose activations are at hand; None if they are not finite.

    Parameters
    ----------
    query, out
        The call's queries `[B, Hq, T, D]` and its attention output, float32 `[B, Hq, T, Dv]`.
    """
    n_new, view = query.shape[2], packed.view
    fresh = packed.fresh_k.float(), packed.fresh_v.float()
    if view.length != fresh[0].shape[2]:
        return replace(_evidence(packed), store_error=float("inf"))
    rows = _sampled(n_new, query.device)
    at_rows = _at_rows(params, rows, n_new, view)
    q, found = query[:, :, rows].float(), out[:, :, rows]
    even = slice(-min(n_new, SAMPLED_QUERIES), None)  # the early ones see few rows and would count for all of the sum
    if not packed.watch.leads and n_new < SHORT_PROMPT:
        exact = _attend_float(q, *fresh, at_rows)
        error = _relative_rmse(found[:, :, even], exact[:, :, even])
        return replace(_evidence(packed), error=error) if is_finite(exact) else None
    stored = _decoded(view, view.length)
    k, v = (butterfly(x) if turned else x for x, turned in zip(stored, (view.rotate_k, view.rotate_v), strict=True))
    both = _attend_float(q, torch.stack([fresh[0], k]), torch.stack([fresh[1], v]), at_rows)
    exact, expected = both.unbind()
    if not is_finite(exact):
        return None
    return replace(
        _evidence(packed),
        error=_relative_rmse(found[:, :, even], exact[:, :, even]),
        store_error=_store_error(packed, stored, n_new),
        kernel_error=_query_error(found, expected),
    )


def verify(query: Tensor, packed: LayerView, params: AttentionParams, out: Tensor) -> Evidence:
    """Evidence of any call: of the rows whose activations are at hand, and of the attention over all stored rows.

    Its `error` is 0: nothing is left to compare the older rows with.
    """
    view, n_new = packed.view, query.shape[2]
    rows = _sampled(n_new, query.device)
    q = query[:, :, rows]
    plain = replace(view, rotate_k=False, rotate_v=False)  # turned here, by other code
    expected = reference_attend(butterfly(q) if view.rotate_k else q, plain, _at_rows(params, rows, n_new, view))
    return replace(
        _evidence(packed),
        store_error=_store_error(packed, _decoded(view, min(view.length, packed.fresh_k.shape[2])), n_new),
        kernel_error=_query_error(out[:, :, rows], butterfly(expected) if view.rotate_v else expected),
    )


def float_view(k: Tensor, v: Tensor) -> KVView:
    """Plain tensors as a view of f32 rows, so that one attention serves stored and unstored rows."""
    f32 = FORMATS["f32"]
    return KVView(
        segments=(Segment(f32.encode(k), f32.encode(v), f32, f32, 0, k.shape[2]),),
        head_dim_k=k.shape[-1],
        head_dim_v=v.shape[-1],
    )


def is_finite(x: Tensor) -> bool:
    """Whether all of `x` is finite: one pass over it, and a second only if the sum is not."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def butterfly(x: Tensor) -> Tensor:
    """What `hybridkv.rotation.rotate` must give, float32: stage by stage instead of by a matrix.

    Every other orthonormal transform gives right scores too, only not the mixing that the types count on.
    """
    shape, block = x.shape, x.shape[-1] & -x.shape[-1]
    x = x.float()
    step = 1
    while step < block:
        pairs = x.reshape(*shape[:-1], -1, 2, step)
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
        step *= 2
    return x.reshape(shape) / math.sqrt(block)


def _evidence(packed: LayerView) -> Evidence:
    return Evidence(packed.layer.spec.facts.layer, packed.layer.types, error=0.0)


def _attend_float(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
    """Float attention of few queries `[B, Hq, N, D]` with an explicit mask; K and V may be several, along a first dim.

    Written out once more, so that a fault of the reference kernel shows too. Several at once, because operations on so
    little cost what it takes to start them.
    """
    batch, n_heads, n_queries, _ = q.shape
    several, (n_kv_heads, n_rows) = k.shape[:-4], k.shape[-3:-1]
    grouped = q.reshape(batch, n_kv_heads, -1, q.shape[-1])
    scores = (grouped @ k.transpose(-1, -2)).view(*several, batch, n_heads, n_queries, n_rows) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    assert params.mask is not None
    scores = scores.masked_fill(~params.mask, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    sinks = None if params.sinks is None else params.sinks.float().view(-1, 1, 1)
    top = top if sinks is None else torch.maximum(top, sinks)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True) + (0.0 if sinks is None else torch.exp(sinks - top))
    grouped = weights.view(*several, batch, n_kv_heads, -1, n_rows) @ v
    return grouped.view(*several, batch, n_heads, n_queries, -1) / total.masked_fill(total == 0, 1.0)


def _query_error(out: Tensor, expected: Tensor) -> float:
    """The worst query's error over all its heads, relative to its output."""
    size = expected.square().sum((1, 3))
    difference = (out - expected).square().sum((1, 3))
    return _worst((difference / size).sqrt(), size, difference)


def _decoded(view: KVView, n_rows: int) -> tuple[Tensor, Tensor]:
    """The newest rows of K and V, float32 `[B, Hkv, S, D]`, with the center and as rotated as they are stored."""
    parts: list[tuple[Tensor, Tensor]] = []
    for segment, _, _ in _newest(view, n_rows):
        k_planes, v_planes = _planes(segment)
        if segment.format_k is segment.format_v and view.head_dim_k == view.head_dim_v:
            both = [torch.cat(pair, 1) for pair in zip(k_planes, v_planes, strict=True)]
            k, v = segment.format_k.decode(both, view.head_dim_k).chunk(2, 1)
        else:
            k = segment.format_k.decode(k_planes, view.head_dim_k)
            v = segment.format_v.decode(v_planes, view.head_dim_v)
        parts.insert(0, (k if segment.center is None else k + segment.center.unsqueeze(2), v))
    k, v = (side[0] if len(side) == 1 else torch.cat(side, 2) for side in zip(*parts, strict=True))
    return k, v


def _planes(segment: Segment) -> tuple[list[Tensor], list[Tensor]]:
    rows = slice(segment.start, segment.start + segment.length)
    return [p[:, :, rows] for p in segment.k], [p[:, :, rows] for p in segment.v]


def _store_error(packed: LayerView, stored: tuple[Tensor, Tensor], n_new: int) -> float:
    """The worst row's error beyond that of its own encoding, relative to the row; inf if rows are missing.

    `stored` holds the rows whose activations are at hand, decoded.
    """
    layer, view = packed.layer, packed.view
    n_fresh, past, window = packed.fresh_k.shape[2], layer.n_seen - n_new, layer.spec.facts.window
    if view.length != n_new + (past if window is None else min(past, window - 1)):
        return float("inf")
    k = butterfly(packed.fresh_k) if view.rotate_k else packed.fresh_k.float()
    v = butterfly(packed.fresh_v) if view.rotate_v else packed.fresh_v.float()
    worst = 0.0
    for segment, offset, n_rows in _newest(view, n_fresh):
        at = slice(offset, offset + n_rows)
        k_planes, v_planes = _planes(segment)
        wanted, held = (k[:, :, at], v[:, :, at]), (stored[0][:, :, at], stored[1][:, :, at])
        if segment.format_k is segment.format_v and view.head_dim_k == view.head_dim_v and segment.center is None:
            both = [torch.cat(pair, 1) for pair in zip(k_planes, v_planes, strict=True)]
            error = _excess(both, segment.format_k, torch.cat(wanted, 1), torch.cat(held, 1), None, layer.types)
        else:
            error = max(
                _excess(k_planes, segment.format_k, wanted[0], held[0], segment.center, layer.types),
                _excess(v_planes, segment.format_v, wanted[1], held[1], None, layer.types),
            )
        worst = max(worst, error)
    return worst


def _excess(
    planes: list[Tensor], fmt: KVFormat, wanted: Tensor, stored: Tensor, center: Tensor | None, types: KVTypes
) -> float:
    """How much more stored rows `[B, Hkv, S, D]` err than the wanted ones encoded again, relative to the row."""
    found, size = (stored - wanted).square().sum(-1), wanted.square().sum(-1)
    if not is_finite(size):
        return 0.0  # not the cache's doing; the finiteness watch reports it
    order = (found / size).nan_to_num(0.0, torch.inf).amax((0, 1))
    n = min(SAMPLED_ROWS, len(order))
    rows = torch.cat([order.topk(n).indices, _spaced(len(order), n, order.device)])
    if len(order) <= 2 * n:
        rows = torch.arange(len(order), device=order.device)
    x = wanted[:, :, rows] if center is None else wanted[:, :, rows] - center.unsqueeze(2)
    again = fmt.encode(x, types.scale_for(fmt.name))
    if all(torch.equal(mine, plane[:, :, rows]) for mine, plane in zip(again, planes, strict=True)):
        return 0.0
    own = (fmt.decode(again, x.shape[-1]) - x).square().sum(-1)
    found, size = found[:, :, rows], size[:, :, rows]
    beyond = (found.sqrt() - own.sqrt()).masked_fill(~torch.isfinite(own), 0.0)  # out of the type's range: not finite
    return _worst(beyond / size.sqrt(), size, beyond)


def _worst(ratio: Tensor, size: Tensor, difference: Tensor) -> float:
    """The largest ratio; where the size is 0, 0 or, with a difference, inf; where it is not finite, 0."""
    ratio = ratio.where(difference != 0, 0.0).where(torch.isfinite(size), 0.0)
    return max(0.0, ratio.nan_to_num(torch.inf, torch.inf).max().item())


def _newest(view: KVView, n_rows: int) -> Iterator[tuple[Segment, int, int]]:
    """The parts of the view's newest rows: segments cut to them, first row among the newest, number of rows."""
    end = n_rows
    for segment in reversed(view.segments):
        n = min(segment.length, end)
        if not n:
            return
        end -= n
        yield replace(segment, start=segment.start + segment.length - n, length=n), end, n


def _sampled(n_new: int, device: torch.device) -> Tensor:
    """The queries of a call to compare: the first few, then evenly spaced ones."""
    rows = _spaced(n_new, SAMPLED_QUERIES, device)
    return rows if n_new <= SAMPLED_QUERIES else torch.cat([torch.tensor(EARLY_QUERIES, device=device), rows])


def _spaced(n: int, count: int, device: torch.device) -> Tensor:
    """At most `count` of n indices, evenly spaced, the last among them."""
    count = min(n, count)
    return torch.linspace(0, n, count + 1, device=device)[1:].round().long() - 1


def _at_rows(params: AttentionParams, rows: Tensor, n_new: int, view: KVView) -> AttentionParams:
    """The same call for some of its queries: their visibility as an explicit mask."""
    if params.mask is not None:
        return replace(params, mask=params.mask[:, :, rows])
    position = (view.length - n_new + rows).unsqueeze(-1)
    key = torch.arange(view.length, device=rows.device)
    visible = key <= position
    if view.window is not None:
        visible &= key > position - view.window
    return replace(params, mask=visible.view(1, 1, len(rows), view.length))


def _relative_rmse(out: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of `exact`; 0 if both are zero, inf if `out` is not finite."""
    if not is_finite(out):
        return float("inf")
    size = exact.square().mean().sqrt().item()
    difference = (out - exact).square().mean().sqrt().item()
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))
