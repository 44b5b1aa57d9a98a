"""Queries that look for the rows at the ends of what a call attends, for the guard to put to a kernel.

In a model's own queries one row of hundreds may weigh a thousandth: left out, or attended though it should not be, it
hardly shows. A probe is made from the stored K so that one row outweighs all others, at any context. Makes the queries;
`hybridkv.runtime.evidence` compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybridkv.kernels import AttentionParams, KVView, Segment

PROBE_SCORE = 40.0
"""Largest score, up to the angle, of such a query: as large as models' own are, and no larger."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A call of its own over the same rows.

    Attributes
    ----------
    query
        `[B, Hq, n, D]`, of the newest n positions.
    params
        As the kernel was called: with a mask if it had one, so that it is its own notion of a mask that is looked at.
    visible
        What is to be seen, bool `[B or 1, Hq or 1, n, rows]`.
    """

    query: Tensor
    params: AttentionParams
    visible: Tensor


def probes(query: Tensor, view: KVView, params: AttentionParams) -> list[Probe]:
    """Build what is put to the kernel beside a call's queries `[B, Hq, T, D]`.

    For a single token: the oldest row that it attends, and the newest. For one or the last two of several: the row
    before the oldest, where one is stored, behind a window or in padding; it is not to be found.
    """
    n = min(query.shape[2], 2)
    if params.mask is not None:
        visible = params.mask[:, :, -n:]
    elif n > 1 and (view.window is None or view.length <= view.window):
        return []  # nothing is stored that the last two do not attend
    else:
        positions = torch.arange(view.length - n, view.length, device=query.device)
        visible = visible_rows(positions, view.length, view.window)
    seen = visible[:, 0].expand(query.shape[0], -1, -1).int()
    oldest, newest = seen.argmax(-1), view.length - 1 - seen.flip(-1).argmax(-1)
    new = _keys(view, newest)
    wanted = []
    if n == 1:
        old = _keys(view, oldest)
        wanted += [(old, new), (new, old)]
    if bool(oldest.any()):
        wanted.append((_keys(view, (oldest - 1).clamp(min=0)), new))
    group = query.shape[1] // new.shape[1]
    return [
        Probe(
            _between(row, other, params.scale, view.length).repeat_interleave(group, 1).to(query.dtype),
            params if params.mask is None else replace(params, mask=visible),
            visible,
        )
        for row, other in wanted
    ]


def visible_rows(positions: Tensor, length: int, window: int | None) -> Tensor:
    """Mark which of `length` rows the queries at `positions` `[N]` attend: bool `[1, 1, N, length]`."""
    key = torch.arange(length, device=positions.device)
    visible = key <= positions.unsqueeze(-1)
    if window is not None:
        visible &= key > positions.unsqueeze(-1) - window
    return visible.view(1, 1, len(positions), length)


def newest_rows(view: KVView, n_rows: int) -> Iterator[tuple[Segment, int, int]]:
    """Yield the parts of the view's newest rows: a segment, its first row among the newest, its number of rows."""
    end = n_rows
    for segment in reversed(view.segments):
        n = min(segment.length, end)
        if not n:
            return
        end -= n
        yield replace(segment, start=segment.start + segment.length - n, length=n), end, n


def butterfly(x: Tensor) -> Tensor:
    """Compute what `hybridkv.rotation.rotate` must give, float32: stage by stage instead of by a matrix.

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


def _between(wanted: Tensor, other: Tensor, scale: float, n_rows: int) -> Tensor:
    """Build queries that prefer rows of K to others, and to those between them, float32 `[B, Hkv, n, D]`."""
    apart, longest = wanted - other, torch.maximum(wanted.norm(dim=-1), other.norm(dim=-1))
    distance = apart.norm(dim=-1)
    # The other rows' scores lie half-way between the two on average; one row is to outweigh their sum.
    needed = 2 * (math.log(n_rows) + 4) / distance.square()
    bearable = PROBE_SCORE / (distance * longest)  # rounding grows with the product of the sizes
    factor = (torch.minimum(needed, bearable) / scale).nan_to_num(0.0, 0.0)
    return apart * factor.unsqueeze(-1)


def _keys(view: KVView, rows: Tensor) -> Tensor:
    """Decode stored rows of K, not rotated: those of `rows` int64 `[B, n]`, float32 `[B, Hkv, n, D]`."""
    sequences = [torch.cat([_key(view, b, row) for row in each], 2) for b, each in enumerate(rows.tolist())]
    return butterfly(torch.cat(sequences)) if view.rotate_k else torch.cat(sequences)


def _key(view: KVView, sequence: int, row: int) -> Tensor:
    *_, (segment, _, _) = newest_rows(view, view.length - row)
    here = slice(sequence, sequence + 1), slice(None), slice(segment.start, segment.start + 1)
    k = segment.format_k.decode([plane[here] for plane in segment.k], view.head_dim_k)
    return k if segment.center is None else k + segment.center[here[:2]].unsqueeze(2)
