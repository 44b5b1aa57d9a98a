"""The guard's measurements of a layer, with other code than the code that is measured.

Three measures of one call, on a bounded sample of its queries and rows: how far its attention is from attention over
the activations (do the types suit the layer?), how far the stored rows are from what the types make of the activations,
and how far the attention is from float attention over the rows that are stored (does the code do what the types mean?).

Stored rows are encoded again by `KVFormat`, rotated by a butterfly and not by `hybridkv.rotation`; the mask is written
out for the sampled queries. Measures only; `hybridkv.runtime.attend` acts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.formats import FORMATS, KVFormat
from hybridkv.kernels import AttentionParams, KVView, Segment, cpu_native
from hybridkv.kernels.reference import attend as reference_attend
from hybridkv.kernels.threads import torch_on_one_thread
from hybridkv.policy import Evidence
from hybridkv.runtime.probes import Probe, butterfly, newest_rows, probes, visible_rows
from hybridkv.runtime.view import LayerView

Attend = Callable[[Probe], Tensor]

_SHARED_OUT = 1 << 20
"""Values from which on a sum is worth more than one thread."""

SAMPLED_QUERIES = 16
"""Queries of a call that are compared at most, evenly spaced; the first few come in addition."""

EARLY_QUERIES = (0, 1, 2)
"""They see so few rows that one row too many or too few weighs much."""

SAMPLED_ROWS = 8
"""Rows of a call that are encoded again: as many of those that err most, and as many evenly spaced."""


def measure(query: Tensor, packed: LayerView, params: AttentionParams, out: Tensor, attend: Attend) -> Evidence | None:
    """Measure a call that attends nothing but rows whose activations are at hand; None if they are not finite.

    Parameters
    ----------
    query, out
        The call's queries `[B, Hq, T, D]` and its attention output `[B, Hq, T, Dv]`.
    attend
        The call's kernel, for the probes; see `verify`.
    """
    n_new, view = query.shape[2], packed.view
    fresh = packed.fresh_k.float(), packed.fresh_v.float()
    if view.length != fresh[0].shape[2]:
        return replace(_evidence(packed), store_error=float("inf"))
    rows, at_rows = _sampled_call(params, n_new, view, query.device)
    q, found = query[:, :, rows].float(), out[:, :, rows]
    even = slice(-min(n_new, SAMPLED_QUERIES), None)  # the early ones see few rows and would count for all of the sum
    if not packed.watch.is_representative:
        exact = _attend_float(q[:, :, even], *fresh, _last(at_rows, even))
        error = _relative_rmse(found[:, :, even], exact)
        return None if error is None else replace(_evidence(packed), error=error)
    stored = _decoded(view, view.length)
    k, v = (butterfly(x) if turned else x for x, turned in zip(stored, (view.rotate_k, view.rotate_v), strict=True))
    exact, expected = _attend_float(q, *fresh, at_rows), _attend_float(q, k, v, at_rows)
    error = _relative_rmse(found[:, :, even], exact[:, :, even])
    if error is None:
        return None
    kernel_error = _query_error(found, expected)
    for probe in probes(query, view, params):
        expected = _attend_float(probe.query.float(), k, v, replace(params, mask=probe.visible))
        kernel_error = max(kernel_error, _query_error(attend(probe), expected))
    return replace(
        _evidence(packed),
        error=error,
        store_error=_store_error(packed, stored, n_new),
        kernel_error=kernel_error,
    )


def verify(query: Tensor, packed: LayerView, params: AttentionParams, out: Tensor, attend: Attend) -> Evidence:
    """Verify any call: the rows whose activations are at hand, and the attention over all stored rows.

    Its `error` is 0: nothing is left to compare the older rows with.

    Parameters
    ----------
    query, out
        The call's queries `[B, Hq, T, D]` and its attention output `[B, Hq, T, Dv]`.
    attend
        The call's kernel, for other queries: those that look for the rows at the ends of what is attended. In the
        model's own queries a row of many hardly counts; in these it is most of the output.
    """
    view, n_new = packed.view, query.shape[2]
    rows, at_rows = _sampled_call(params, n_new, view, query.device)
    more = probes(query, view, params)
    q = torch.cat([query[:, :, rows], *(probe.query for probe in more)], 2)
    found = torch.cat([out[:, :, rows], *(attend(probe) for probe in more)], 2)
    assert at_rows.mask is not None
    masks = [mask.expand(len(q), q.shape[1], -1, -1) for mask in (at_rows.mask, *(probe.visible for probe in more))]
    at_rows = replace(at_rows, mask=torch.cat(masks, 2))
    plain = replace(view, rotate_k=False, rotate_v=False)  # turned here, by other code
    expected = reference_attend(butterfly(q) if view.rotate_k else q, plain, at_rows)
    return replace(
        _evidence(packed),
        store_error=_store_error(packed, _decoded(view, min(view.length, packed.fresh_k.shape[2])), n_new),
        kernel_error=_query_error(found, butterfly(expected) if view.rotate_v else expected),
    )


def float_view(k: Tensor, v: Tensor) -> KVView:
    """View plain tensors as f32 rows, so that one attention serves stored and unstored rows."""
    f32 = FORMATS["f32"]
    return KVView(
        segments=(Segment(f32.encode(k), f32.encode(v), f32, f32, 0, k.shape[2]),),
        head_dim_k=k.shape[-1],
        head_dim_v=v.shape[-1],
    )


def is_finite(x: Tensor) -> bool:
    """Check whether all of `x` is finite: one pass over it, and a second only if the sum is not."""
    if x.numel() >= _SHARED_OUT or not x.is_cpu:
        return _sums_finite(x)
    if x.dtype == torch.float32 and x.is_contiguous() and cpu_native.available() is None:
        return cpu_native.all_finite(x)
    with torch_on_one_thread():
        return _sums_finite(x)


def _sums_finite(x: Tensor) -> bool:
    return math.isfinite(x.sum(dtype=torch.float32).item()) or bool(torch.isfinite(x).all())


def finite_rows(x: Tensor) -> list[bool]:
    """Check whether each row of `x` `[N, D]` is finite, at the same price."""
    if x.is_cpu:
        return [is_finite(row) for row in x]
    return [
        math.isfinite(total) or is_finite(row)
        for total, row in zip(x.sum(-1, dtype=torch.float32).tolist(), x, strict=True)
    ]


def _evidence(packed: LayerView) -> Evidence:
    return Evidence(packed.layer.spec.facts.layer, packed.layer.types, error=0.0)


def _last(params: AttentionParams, queries: slice) -> AttentionParams:
    assert params.mask is not None
    return replace(params, mask=params.mask[:, :, queries])


def _attend_float(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
    """Attend in floats, for few queries `[B, Hq, N, D]` with an explicit mask.

    Written out once more, so that a fault of the reference kernel shows too, and in few operations: on so little they
    cost what it takes to start them.
    """
    batch, n_heads, n_queries, _ = q.shape
    n_kv_heads, n_rows = k.shape[1:3]
    grouped = (q * params.scale).reshape(batch, n_kv_heads, -1, q.shape[-1])
    scores = (grouped @ k.transpose(-1, -2)).view(batch, n_heads, n_queries, n_rows)
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    assert params.mask is not None
    scores.masked_fill_(~params.mask, -torch.inf)
    if params.sinks is not None:
        sinks = params.sinks.float().view(-1, 1, 1).expand(batch, -1, n_queries, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).masked_fill_(~params.mask.any(-1, keepdim=True), 0.0)
    return (weights.reshape(batch, n_kv_heads, -1, n_rows) @ v).view(batch, n_heads, n_queries, -1)


def _query_error(out: Tensor, expected: Tensor) -> float:
    """Return the worst query's error over all its heads, relative to its output."""
    size = expected.square().sum((1, 3))
    difference = (out - expected).square().sum((1, 3))
    return _worst((difference / size).sqrt(), size, difference)


def _decoded(view: KVView, n_rows: int) -> tuple[Tensor, Tensor]:
    """Decode the newest rows of K and V, float32 `[B, Hkv, S, D]`, with the center and rotated as they are stored."""
    parts: list[tuple[Tensor, Tensor]] = []
    for segment, _, _ in newest_rows(view, n_rows):
        k_planes, v_planes = _planes(segment)
        k = segment.format_k.decode(k_planes, view.head_dim_k)
        v = segment.format_v.decode(v_planes, view.head_dim_v)
        parts.insert(0, (k if segment.center is None else k + segment.center.unsqueeze(2), v))
    k, v = (side[0] if len(side) == 1 else torch.cat(side, 2) for side in zip(*parts, strict=True))
    return k, v


def _planes(segment: Segment) -> tuple[list[Tensor], list[Tensor]]:
    rows = slice(segment.start, segment.start + segment.length)
    return [p[:, :, rows] for p in segment.k], [p[:, :, rows] for p in segment.v]


def _store_error(packed: LayerView, stored: tuple[Tensor, Tensor], n_new: int) -> float:
    """Return the worst row's error beyond that of its own encoding, relative to the row; inf if rows are missing.

    `stored` holds the rows whose activations are at hand, decoded.
    """
    layer, view = packed.layer, packed.view
    n_fresh, past, window = packed.fresh_k.shape[2], layer.n_seen - n_new, layer.spec.facts.window
    if view.length != n_new + (past if window is None else min(past, window - 1)):
        return float("inf")
    k = butterfly(packed.fresh_k) if view.rotate_k else packed.fresh_k.float()
    v = butterfly(packed.fresh_v) if view.rotate_v else packed.fresh_v.float()
    worst = 0.0
    for segment, offset, n_rows in newest_rows(view, n_fresh):
        at = slice(offset, offset + n_rows)
        sample_k, sample_v = (
            _sample(planes, wanted[:, :, at], held[:, :, at], center)
            for planes, wanted, held, center in zip(
                _planes(segment), (k, v), stored, (segment.center, None), strict=True
            )
        )
        if segment.format_k is segment.format_v and sample_k.rows.shape == sample_v.rows.shape:
            error = _excess(_together(sample_k, sample_v), segment.format_k, layer.types)
        else:
            error = max(
                _excess(sample_k, segment.format_k, layer.types), _excess(sample_v, segment.format_v, layer.types)
            )
        worst = max(worst, error)
    return worst


class _Sample(NamedTuple):
    """Some rows of a side: as they should be encoded, and what of them is stored.

    `rows` are float32 `[B, Hkv, N, D]`; `error` and `size` are the norms of what is stored less what was wanted, and of
    what was wanted, `[B, Hkv, N]`.
    """

    rows: Tensor
    error: Tensor
    size: Tensor
    planes: list[Tensor]


def _together(k: _Sample, v: _Sample) -> _Sample:
    """Join both sides as more heads of one: encoding so little costs what it takes to start it."""
    return _Sample(
        torch.cat([k.rows, v.rows], 1),
        torch.cat([k.error, v.error], 1),
        torch.cat([k.size, v.size], 1),
        [torch.cat(pair, 1) for pair in zip(k.planes, v.planes, strict=True)],
    )


def _sample(planes: list[Tensor], wanted: Tensor, stored: Tensor, center: Tensor | None) -> _Sample:
    """Sample rows of `[B, Hkv, S, D]`: those that err most, and evenly spaced ones."""
    error, size = torch.linalg.vector_norm(stored - wanted, dim=-1), torch.linalg.vector_norm(wanted, dim=-1)
    n_rows = size.shape[2]
    n = min(SAMPLED_ROWS, n_rows)
    if n_rows > 2 * n:
        order = (error / size).nan_to_num_(0.0, torch.inf).amax((0, 1))
        rows = torch.cat([order.topk(n).indices, _spaced(n_rows, n, order.device)])
        planes, wanted = [plane[:, :, rows] for plane in planes], wanted[:, :, rows]
        error, size = error[:, :, rows], size[:, :, rows]
    return _Sample(wanted if center is None else wanted - center.unsqueeze(2), error, size, planes)


def _excess(sample: _Sample, fmt: KVFormat, types: KVTypes) -> float:
    """Measure how much more stored rows err than the wanted ones encoded again, relative to the row."""
    again = fmt.encode(sample.rows, types.scale_for(fmt.name))
    if all(torch.equal(mine, plane) for mine, plane in zip(again, sample.planes, strict=True)):
        return 0.0
    own = torch.linalg.vector_norm(fmt.decode(again, sample.rows.shape[-1]) - sample.rows, dim=-1)
    beyond = (sample.error - own).masked_fill_(~torch.isfinite(own), 0.0)  # out of the type's range: not finite
    return _worst(beyond / sample.size, sample.size, beyond)


def _worst(ratio: Tensor, size: Tensor, difference: Tensor) -> float:
    """Return the largest ratio; where the size is 0, count 0 or, with a difference, inf; where it is not finite, 0."""
    ratio = ratio.where(difference != 0, 0.0).where(torch.isfinite(size), 0.0)
    return max(0.0, ratio.nan_to_num(torch.inf, torch.inf).max().item())


def _sampled_call(
    params: AttentionParams, n_new: int, view: KVView, device: torch.device
) -> tuple[Tensor, AttentionParams]:
    """Choose queries of a call to compare, and make the call for these alone: their visibility as an explicit mask."""
    rows, visible = _sampled(n_new, view.length, view.window, device)
    return rows, replace(params, mask=visible if params.mask is None else params.mask[:, :, rows])


@lru_cache(maxsize=2)  # full attention and one window
def _sampled(n_new: int, length: int, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Choose queries (the first few, then evenly spaced) and the rows each sees; the same in all layers."""
    rows = _spaced(n_new, SAMPLED_QUERIES, device)
    if n_new > SAMPLED_QUERIES:
        rows = torch.cat([torch.tensor(EARLY_QUERIES, device=device), rows])
    return rows, visible_rows(length - n_new + rows, length, window)


def _spaced(n: int, count: int, device: torch.device) -> Tensor:
    """Choose at most `count` of n indices, evenly spaced, the last among them."""
    count = min(n, count)
    return torch.linspace(0, n, count + 1, device=device)[1:].round().long() - 1


def _relative_rmse(out: Tensor, exact: Tensor) -> float | None:
    """Divide the difference's norm by that of `exact`; None if `exact` is not finite, inf if only `out` is not.

    0 if both are zero.
    """
    size, difference = (torch.linalg.vector_norm(x).item() for x in (exact, out - exact))
    if not math.isfinite(size):  # finite values may be too large to be squared
        if not is_finite(exact):
            return None
        size, difference = (torch.linalg.vector_norm(x.double()).item() for x in (exact, out - exact))
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size > 0 else (0.0 if difference == 0 else math.inf)
