"""Storing new rows: from a format's scale rule to the launch of the store kernel.

Owns what the encoder must know of a format at compile time. `hybridkv.kernels.cuda.encode` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats import KVFormat, Scale, get_format
from hybridkv.kernels.cuda.encode import store_rows
from hybridkv.kernels.cuda.layout import capacity, memory, row_format
from hybridkv.kernels.cuda.overlap import overlapping
from hybridkv.rotation import MIN_BLOCK, rotation_block

_VALUES = 1024
"""Values that one program encodes, if there are rows enough."""


class Encoding(NamedTuple):
    """A format, a scale rule and a head dim, for the compiler; names as in `KVFormat` and `RowFormat`."""

    rule: str
    rounding: str
    refit: str
    zero: int
    lowest: int
    highest: int
    extreme_code: int
    n_entries: int
    starts: tuple[int, ...]
    main: int
    pairs: int
    bits: int
    has_min: bool
    has_sum: bool
    whole_row: bool
    pad_copies: bool
    head_dim: int
    n_blocks: int
    blocks_padded: int
    rotation: int
    rotation_stages: int


@lru_cache(maxsize=256)
def encoding(type_name: str, scale: Scale | None, head_dim: int) -> Encoding:
    """Collect what the encoder of rows of `head_dim` values must know.

    Raises
    ------
    UsageError
        This format has no such scale rule.
    """
    fmt = get_format(type_name)
    scale = scale or fmt.default_scale
    if scale not in fmt.scales:
        raise UsageError(f"{type_name} has no scale rule {scale!r}; allowed: {', '.join(fmt.scales)}")
    rows = row_format(type_name, head_dim)
    lowest, highest = fmt.code_range if fmt.is_quantized else (0, 0)
    mixed = rotation_block(head_dim) if head_dim % MIN_BLOCK == 0 else 1
    return Encoding(
        rule=fmt.rule,
        rounding=fmt.rounding,
        refit=(fmt.refit or "") if scale == "refit" else "",
        zero=fmt.zero,
        lowest=lowest,
        highest=highest,
        extreme_code=fmt.extreme_code if fmt.is_quantized else 1,
        n_entries=len(fmt.codebook or ()),
        starts=fmt.starts,
        main=rows.main,
        pairs=rows.pairs,
        bits=rows.bits,
        has_min=fmt.has_min,
        has_sum=any(plane.role == "s" for plane in fmt.planes),
        whole_row=rows.row_scale,
        pad_copies=head_dim % 32 != 0 and fmt.refit in ("starts", "line"),
        head_dim=head_dim,
        n_blocks=rows.n_blocks,
        blocks_padded=rows.blocks_padded,
        rotation=mixed,
        rotation_stages=mixed.bit_length() - 1,
    )


def store(
    x: Tensor,
    fmt: KVFormat,
    scale: Scale | None,
    planes: Sequence[Tensor],
    row: int | Tensor,
    *,
    rotated: bool = False,
    center: Tensor | None = None,
) -> None:
    """Rotate, subtract a center, encode and write new rows in one launch; the arguments of `hybridkv.kernels.store`."""
    n_batch, n_kv_heads, n_new, head_dim = x.shape
    enc = encoding(fmt.name, scale, head_dim)
    if rotated:
        rotation_block(head_dim)  # raises where there is none
    n_rows = capacity(fmt, planes, head_dim, (n_batch, n_kv_heads))
    on_device = not isinstance(row, int)
    if isinstance(row, int):
        assert row >= 0 and row + n_new <= n_rows, (row, n_new, n_rows)
    else:
        assert row.shape == (n_batch,) and row.dtype == torch.int32 and row.is_contiguous(), (row.shape, row.dtype)
    if center is not None:
        assert center.shape == (n_batch, n_kv_heads, head_dim) and center.is_contiguous(), center.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    where = memory(fmt, planes)
    extra = next((data for plane, data in zip(fmt.planes, planes, strict=True) if plane.role in ("s", "sum")), where.d)
    n = min(max(1, _VALUES // (32 * enc.blocks_padded)), 1 << (n_new - 1).bit_length())
    n_values = n * 32 * enc.blocks_padded
    store_rows[(-(-n_new // n), n_batch * n_kv_heads)](
        x,
        where.main,
        where.pairs,
        where.bits,
        where.d,
        where.m,
        extra,
        x if fmt.codebook is None else entries(fmt.name, x.device),
        x if center is None else center,
        row if on_device else x,
        0 if on_device else row,
        n_new,
        n_kv_heads,
        n_rows,
        *x.stride()[:3],
        E=enc,
        N=n,
        ROTATED=rotated,
        HAS_CENTER=center is not None,
        HAS_ROWS=on_device,
        num_warps=_warps(n_values, enc),
        num_stages=1,
        enable_fp_fusion=False,
        **overlapping(x.device),
    )


def _warps(n_values: int, enc: Encoding) -> int:
    """Choose the warps of a program by its values: with `starts` one takes a hundred instructions and more."""
    if n_values <= 256:
        return max(1, n_values // 64) if enc.refit == "starts" else 1
    return 4


@lru_cache(maxsize=64)
def entries(type_name: str, device: torch.device) -> Tensor:
    """Return the codebook in float32, as the encoder compares with it, and then what `refit_starts` begins with."""
    fmt = get_format(type_name)
    return torch.tensor((*(fmt.codebook or ()), *fmt.starts), dtype=torch.float32, device=device)
