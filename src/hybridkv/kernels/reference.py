"""The torch reference: right for every case, in bounded memory, slow. The oracle that fast kernels answer to.

Reads the packed rows tile by tile (never a full-precision copy of the cache) with a running softmax. Scores,
softmax statistics and the value accumulator are float32. Masked lanes are excluded by select: stale bytes
under the mask, NaN or not, never reach a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hybridkv.formats import FORMATS, KVFormat, Scale
from hybridkv.kernels.case import (
    DEVICE_ROWS_REFUSAL,
    AttentionCase,
    AttentionParams,
    KVView,
    Segment,
    require_host_rows,
)
from hybridkv.kernels.registry import Encoder, Kernel

NAME = "torch-reference"
TILE_QUERIES = 128
TILE_ROWS = 2048


def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
    """Attend q `[B, Hq, T, D]` over the view's S rows; float32 `[B, Hq, T, Dv]`.

    A query that sees no row gives zeros.
    """
    require_host_rows(view.segments, NAME)
    n_new = q.shape[2]
    out = torch.empty(*q.shape[:3], view.head_dim_v, dtype=torch.float32, device=q.device)
    for first in range(0, n_new, TILE_QUERIES):
        last = min(first + TILE_QUERIES, n_new)
        out[:, :, first:last] = _attend_queries(q[:, :, first:last].float(), view, params, first, n_new)
    return out


def _attend_queries(q: Tensor, view: KVView, params: AttentionParams, first: int, n_new: int) -> Tensor:
    """Attend one tile of queries over all rows they can see, with a running maximum, sum and accumulator."""
    batch, n_heads, n_queries, _ = q.shape
    n_kv_heads = view.segments[0].k[0].shape[1]
    grouped = q.reshape(batch, n_kv_heads, -1, q.shape[-1])
    shape = (batch, n_heads, n_queries)
    if params.sinks is None:
        top = torch.full(shape, -torch.inf, device=q.device)
        total = torch.zeros(shape, device=q.device)
    else:
        top = params.sinks.float().view(1, -1, 1).expand(shape)
        total = torch.ones(shape, device=q.device)
    acc = torch.zeros(*shape, view.head_dim_v, device=q.device)
    for segment, offset, row, n_rows in _tiles(view):
        visible = _visible(view, params, first, n_queries, n_new, row, n_rows, q.device)
        if not visible.any():
            continue
        k = _decode(segment.k, segment.format_k, view.head_dim_k, segment.start + offset, n_rows)
        if segment.center is not None:
            k = k + segment.center.unsqueeze(2)
        scores = (grouped @ k.transpose(-1, -2)).view(*shape, n_rows) * params.scale
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        scores = scores.masked_fill(~visible, -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1))
        # A query that has seen nothing yet keeps -inf: subtract 0 there, so that exp gives 0 and not NaN.
        base = new_top.masked_fill(new_top == -torch.inf, 0.0)
        weights = torch.exp(scores - base.unsqueeze(-1))
        shrink = torch.exp(top - base)
        v = _decode(segment.v, segment.format_v, view.head_dim_v, segment.start + offset, n_rows)
        total = total * shrink + weights.sum(-1)
        acc = acc * shrink.unsqueeze(-1) + _weigh(weights, v, visible)
        top = new_top
    return acc / total.masked_fill(total == 0, 1.0).unsqueeze(-1)


def _tiles(view: KVView) -> Iterator[tuple[Segment, int, int, int]]:
    """Yield segment, first row within it, first row within the view, and number of rows."""
    row = 0
    for segment in view.segments:
        for offset in range(0, segment.length, TILE_ROWS):
            n_rows = min(TILE_ROWS, segment.length - offset)
            yield segment, offset, row, n_rows
            row += n_rows


def _weigh(weights: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Multiply weights `[B, Hq, T, S]` by values `[B, Hkv, S, Dv]`, where a weight of an invisible row counts as
    absent even if the value is NaN (0 * NaN would spread it).
    """
    batch, n_heads, n_queries, n_rows = weights.shape
    n_kv_heads = v.shape[1]
    grouped = weights.reshape(batch, n_kv_heads, -1, n_rows)
    if math.isfinite(v.sum().item()):  # one pass where all is well
        return (grouped @ v).view(batch, n_heads, n_queries, -1)
    stale = ~torch.isfinite(v).all(-1)
    out = (grouped @ v.masked_fill(stale.unsqueeze(-1), 0.0)).view(batch, n_heads, n_queries, -1)
    per_head = stale.repeat_interleave(n_heads // n_kv_heads, dim=1).unsqueeze(2)
    return out.masked_fill((visible & per_head).any(-1, keepdim=True), torch.nan)


def _visible(
    view: KVView,
    params: AttentionParams,
    first: int,
    n_queries: int,
    n_new: int,
    row: int,
    n_rows: int,
    device: torch.device,
) -> Tensor:
    """Mark which rows of this tile the tile's queries attend: bool `[B or 1, Hq or 1, queries, rows]`."""
    if params.mask is not None:
        return params.mask[:, :, first : first + n_queries, row : row + n_rows]
    position = (view.length - n_new + first + torch.arange(n_queries, device=device)).unsqueeze(-1)
    key = row + torch.arange(n_rows, device=device)
    visible = key <= position
    if view.window is not None:
        visible &= key > position - view.window
    return visible.view(1, 1, n_queries, n_rows)


def _decode(planes: Sequence[Tensor], fmt: KVFormat, head_dim: int, row: int, n_rows: int) -> Tensor:
    """Decode `n_rows` rows of planes: float32 `[B, Hkv, n_rows, D]`."""
    return fmt.decode([p[:, :, row : row + n_rows] for p in planes], head_dim)


def write(x: Tensor, fmt: KVFormat, scale: Scale | None, planes: Sequence[Tensor], row: int) -> None:
    """Encode x `[B, Hkv, T, D]` into rows `[row, row + T)` of the planes."""
    for plane, encoded in zip(planes, fmt.encode(x, scale), strict=True):
        plane[:, :, row : row + x.shape[2]] = encoded


def _rejects(case: AttentionCase) -> str | None:
    if case.device_rows:
        return DEVICE_ROWS_REFUSAL
    return FORMATS[case.type_k].rejects(case.head_dim_k) or FORMATS[case.type_v].rejects(case.head_dim_v)


def _rejects_rows(device: str, fmt: KVFormat, head_dim: int) -> str | None:
    del device  # torch runs on any
    return fmt.rejects(head_dim)


KERNELS = (Kernel(name=NAME, rank=0, tolerance=1e-5, rejects=_rejects, attend=attend),)
ENCODERS = (Encoder(name=NAME, rank=0, rejects=_rejects_rows, write=write),)
