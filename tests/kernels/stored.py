"""Random rows stored in segments, in poisoned memory, as a view that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridkv.formats import KVFormat, get_format
from hybridkv.kernels import ENCODERS, KVView, Segment, select_encoder
from hybridkv.rotation import rotate

GAP = 3  # poisoned rows before each segment, and behind the last


@dataclass(frozen=True)
class Stored:
    """A view and the float32 rows that it stands for: decoded, centers added, rotation undone."""

    view: KVView
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Part:
    """One segment to be. Parts of the same `memory`, and so of the same types, lie in the same planes."""

    type_k: str
    type_v: str
    n_rows: int
    memory: str | None = None
    centered: bool = False


def store(
    type_k: str,
    type_v: str,
    *,
    batch: int = 2,
    n_kv_heads: int = 2,
    n_rows: int = 33,
    head_dim_k: int = 64,
    head_dim_v: int = 64,
    window: int | None = None,
    seed: int = 0,
) -> Stored:
    """One segment of `n_rows`."""
    return store_parts(
        (Part(type_k, type_v, n_rows),),
        batch=batch,
        n_kv_heads=n_kv_heads,
        head_dim_k=head_dim_k,
        head_dim_v=head_dim_v,
        window=window,
        seed=seed,
    )


def store_parts(
    parts: Sequence[Part],
    *,
    batch: int = 2,
    n_kv_heads: int = 2,
    head_dim_k: int = 64,
    head_dim_v: int = 64,
    window: int | None = None,
    rotated: bool = False,
    seed: int = 0,
) -> Stored:
    """The segments hold random values; everything around them is 0xFF.

    With `rotated`, what is stored counts as rotated, and so do the centers.
    """
    generator = torch.Generator().manual_seed(seed)
    rooms: dict[str, int] = {}
    for i, part in enumerate(parts):
        label = part.memory or str(i)
        rooms[label] = rooms.get(label, GAP) + part.n_rows + GAP
    planes: dict[tuple[str, str], tuple[Tensor, ...]] = {}
    free = dict.fromkeys(rooms, GAP)
    segments, k_rows, v_rows = [], [], []
    for i, part in enumerate(parts):
        label = part.memory or str(i)
        start = free[label]
        free[label] += part.n_rows + GAP
        sides = []
        for side, name, dim in (("k", part.type_k, head_dim_k), ("v", part.type_v, head_dim_v)):
            fmt = get_format(name)
            shape = (batch, n_kv_heads, rooms[label])
            memory = planes.setdefault((label, side), _poisoned(fmt, shape, dim))
            x = torch.randn(batch, n_kv_heads, part.n_rows, dim, generator=generator)
            select_encoder("cpu", fmt, dim, ENCODERS).write(x, fmt, None, memory, start)
            sides.append((memory, fmt, fmt.decode([plane[:, :, start : start + part.n_rows] for plane in memory], dim)))
        (k_planes, k_fmt, k), (v_planes, v_fmt, v) = sides
        center = 3 * torch.randn(batch, n_kv_heads, head_dim_k, generator=generator) if part.centered else None
        segments.append(Segment(k_planes, v_planes, k_fmt, v_fmt, start, part.n_rows, center))
        k_rows.append(k if center is None else k + center.unsqueeze(2))
        v_rows.append(v)
    view = KVView(tuple(segments), head_dim_k, head_dim_v, rotated, rotated, window)
    k, v = torch.cat(k_rows, dim=2), torch.cat(v_rows, dim=2)
    return Stored(view, rotate(k) if rotated else k, rotate(v) if rotated else v)


def _poisoned(fmt: KVFormat, shape: tuple[int, int, int], head_dim: int) -> tuple[Tensor, ...]:
    return tuple(torch.full((*shape, n), 0xFF, dtype=torch.uint8) for n in fmt.plane_bytes(head_dim))
