"""Random rows stored at a pair of types, in poisoned memory, as a view that kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridkv.formats import get_format
from hybridkv.kernels import ENCODERS, KVView, Segment, select_encoder


@dataclass(frozen=True)
class Stored:
    """A view and the float32 rows that it decodes to."""

    view: KVView
    k: Tensor
    v: Tensor


def store(
    type_k: str,
    type_v: str,
    *,
    batch: int = 2,
    n_kv_heads: int = 2,
    n_rows: int = 33,
    head_dim_k: int = 64,
    head_dim_v: int = 64,
    start: int = 3,
    slack: int = 5,
    window: int | None = None,
    seed: int = 0,
) -> Stored:
    """Rows `[start, start + n_rows)` hold random values; everything around them is 0xFF."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for type_name, dim in ((type_k, head_dim_k), (type_v, head_dim_v)):
        fmt = get_format(type_name)
        x = torch.randn(batch, n_kv_heads, n_rows, dim, generator=generator)
        shape = (batch, n_kv_heads, start + n_rows + slack)
        planes = tuple(torch.full((*shape, n), 0xFF, dtype=torch.uint8) for n in fmt.plane_bytes(dim))
        select_encoder("cpu", fmt, dim, ENCODERS).write(x, fmt, None, planes, start)
        rows = [plane[:, :, start : start + n_rows] for plane in planes]
        sides.append((planes, fmt, fmt.decode(rows, dim)))
    (k_planes, k_fmt, k), (v_planes, v_fmt, v) = sides
    view = KVView(
        segments=(Segment(k_planes, v_planes, k_fmt, v_fmt, start, n_rows),),
        head_dim_k=head_dim_k,
        head_dim_v=head_dim_v,
        window=window,
    )
    return Stored(view, k, v)
