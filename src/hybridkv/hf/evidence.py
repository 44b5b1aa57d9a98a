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
"""They see so few rows that one row too many or too few cannot be missed."""

SAMPLED_ROWS = 8
"""Rows of a call that are encoded again: as many of those that err most, and as many evenly spaced."""


def measure(query: Tensor, packed: LayerView, params: AttentionParams, out: Tensor) -> Evidence | None:
    """Evidence of a call that attends nothing but rows whose activations are at hand; None if they are not finite.

    Parameters
    ----------
    query, out
        The call's queries `[B, Hq, T, D]` and its attention output, float32 `[B, Hq, T, Dv]`.
    """
    n_new = query.shape[2]
    rows = _spaced(n_new, SAMPLED_QUERIES, query.device)
    k, v = packed.fresh_k, packed.fresh_v
    view = float_view(k, v)
    exact = reference_attend(
        query[:, :, rows], view, _at_rows(params, rows, n_new, replace(view, window=packed.view.window))
    )
    if not is_finite(exact):
        return None
    return replace(verify(query, packed, params, out), error=_relative_rmse(out[:, :, rows], exact))


def verify(query: Tensor, packed: LayerView, params: AttentionParams, out: Tensor) -> Evidence:
    """Evidence of any call: of the rows whose activations are at hand, and of the attention over all stored rows.

    Its `error` is 0: nothing is left to compare the older rows with.
    """
    layer = packed.layer
    return Evidence(
        layer.spec.facts.layer,
        layer.types,
        error=0.0,
        store_error=_store_error(packed, query.shape[2]),
        kernel_error=_kernel_error(query, packed.view, params, out),
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


def _kernel_error(query: Tensor, view: KVView, params: AttentionParams, out: Tensor) -> float:
    """The worst sampled query's error over all its heads, relative to its output."""
    n_new = query.shape[2]
    rows = _spaced(n_new, SAMPLED_QUERIES, query.device)
    if n_new > SAMPLED_QUERIES:
        rows = torch.cat([torch.tensor(EARLY_QUERIES, device=query.device), rows])
    q = query[:, :, rows]
    plain = replace(view, rotate_k=False, rotate_v=False)  # turned here, by other code
    exact = reference_attend(butterfly(q) if view.rotate_k else q, plain, _at_rows(params, rows, n_new, view))
    exact = butterfly(exact) if view.rotate_v else exact
    size = exact.square().sum((1, 3))
    difference = (out[:, :, rows] - exact).square().sum((1, 3))
    return _worst((difference / size).sqrt(), size, difference)


def _store_error(packed: LayerView, n_new: int) -> float:
    """The worst row's error beyond that of its own encoding, relative to the row; inf if rows are missing."""
    layer, view = packed.layer, packed.view
    n_fresh, past, window = packed.fresh_k.shape[2], layer.n_seen - n_new, layer.spec.facts.window
    if view.length != n_new + (past if window is None else min(past, window - 1)):
        return float("inf")
    k, v = packed.fresh_k, packed.fresh_v
    k = butterfly(k) if view.rotate_k else k.float()
    v = butterfly(v) if view.rotate_v else v.float()
    worst = 0.0
    for segment, offset, n_rows in _newest(view, n_fresh):
        at, rows = slice(offset, offset + n_rows), slice(segment.start, segment.start + n_rows)
        wanted = k[:, :, at] if segment.center is None else k[:, :, at] - segment.center.unsqueeze(2)
        error_k = _excess([p[:, :, rows] for p in segment.k], segment.format_k, wanted, layer.types)
        error_v = _excess([p[:, :, rows] for p in segment.v], segment.format_v, v[:, :, at], layer.types)
        worst = max(worst, error_k, error_v)
    return worst


def _excess(planes: list[Tensor], fmt: KVFormat, wanted: Tensor, types: KVTypes) -> float:
    """How much more the stored rows err than `wanted` `[B, Hkv, S, D]` encoded again, relative to the row."""
    found = (fmt.decode(planes, wanted.shape[-1]) - wanted).square().sum(-1)
    size = wanted.square().sum(-1)
    if not is_finite(size):
        return 0.0  # not the cache's doing; the finiteness watch reports it
    order = (found / size).nan_to_num(0.0, torch.inf).amax((0, 1))
    n = min(SAMPLED_ROWS, len(order))
    rows = torch.cat([order.topk(n).indices, _spaced(len(order), n, order.device)])
    again = fmt.decode(fmt.encode(wanted[:, :, rows], types.scale_for(fmt.name)), wanted.shape[-1])
    own = (again - wanted[:, :, rows]).square().sum(-1)
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
