"""From a view to launches: how the work is divided, and the arguments of the attention kernels.

Owns the choice of tiles and shares, made from facts that the host knows without asking the device. No call waits for
the device, and every call may be captured in a graph once the kernels are compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridkv.kernels.case import AttentionParams, KVView, Segment
from hybridkv.kernels.cuda import prefill
from hybridkv.kernels.cuda.card import facts_of
from hybridkv.kernels.cuda.decode import attend_one_token
from hybridkv.kernels.cuda.generic import attend_segment, combine_parts
from hybridkv.kernels.cuda.layout import BF16, BYTES, F16, F32, NIBBLES, NONE, RowFormat, capacity, memory, row_format
from hybridkv.kernels.cuda.overlap import overlapping

ONE_TOKEN_ROWS = 8
"""Query rows of a tile of the kernel for one token (decode.py); the general kernel's are 16 and more."""
COMBINED = 4096
"""Numbers that one program sums, all loaded at once."""
MAX_PARTS = 512
"""Parts of one query row that are summed; more would be many short ones."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """The division of one call's work.

    Attributes
    ----------
    block_m, block_n
        Query rows and stored rows of a tile.
    warps
        Of a program.
    programs
        Programs that one multiprocessor is given, if there are rows enough: shares are made for that.
    prefetch
        Whether the bytes of the next tile are loaded while one is computed.
    least
        Tiles of stored rows that a program is given, if there are as many: parts have to be summed.
    """

    block_m: int
    block_n: int
    warps: int
    programs: int
    prefetch: bool = True
    least: int = 1


def choose_tiling(
    side_k: RowFormat, side_v: RowFormat, n_query_rows: int, *, one_token: bool = False, turing: bool = False
) -> Tiling:
    """Choose a tiling for a case: narrow in query rows for decode, wide for prefill.

    Of those that `bench/attention_cuda.py --tune` times on an H100, the ones that lose least in the geometric mean.

    Parameters
    ----------
    one_token
        Whether the kernel for one token may be used, as far as the call is concerned.
    turing
        Whether a program has 64 KiB of shared memory.
    """
    lanes = 32 * max(side_k.blocks_padded, side_v.blocks_padded)
    if one_token and all(_by_words(s) for s in (side_k, side_v)):
        programs, least = (2, 2) if lanes > 128 else (4, 1)  # as many as registers allow, and fewer of large parts
        return Tiling(ONE_TOKEN_ROWS, 64, warps=4, programs=programs, least=least)
    plain, wide = ([s.main in kinds for s in (side_k, side_v)] for kinds in ((F16, F32, BF16), (F32, BF16)))
    if turing and lanes > 128:
        n_query_rows = min(n_query_rows, 32 if lanes <= 256 else 16)
    if n_query_rows <= 64:
        block_m = max(16, 1 << (n_query_rows - 1).bit_length())
        values = 8192 if any(plain) else 16384
        return Tiling(block_m, max(16, min(128, values // lanes // (2 if any(wide) else 1))), warps=4, programs=4)
    if any(wide) or lanes > 256:
        return Tiling(64, 32 if lanes <= 256 else 16, warps=4, programs=1)
    if lanes <= 128:
        return Tiling(128, 64, warps=8, programs=1) if any(plain) else Tiling(64, 128, 4, 1, prefetch=False)
    return Tiling(128, 32, 8, 1, prefetch=False) if any(plain) else Tiling(64, 64, 4, 1, prefetch=False)


def _by_words(s: RowFormat) -> bool:
    """Check whether lanes may share a row's words evenly, as the kernel for one token has it."""
    return s.main in (NONE, BYTES, NIBBLES) and not s.row_scale and s.head_dim in (64, 128, 256)


def _aligned(segment: Segment) -> bool:
    """Check whether four words may be loaded at once."""
    return all(plane.data_ptr() % 16 == 0 for plane in (*segment.k, *segment.v))


def _loads_eights(q: Tensor) -> bool:
    """Check whether eight values of a query may be loaded at once."""
    return q.data_ptr() % 16 == 0 and q.stride(0) % 8 == 0 and q.stride(1) % 8 == 0


def _n_multiprocessors(device: torch.device) -> int:
    card = facts_of(device)
    return 4 if card is None else card.n_multiprocessors


def _has_products_of_fragments(device: torch.device) -> bool:
    """Check for the instructions of the kernel for one token; the interpreter has its own."""
    card = facts_of(device)
    return card is None or card.capability >= (8, 0)


def n_shares(tiling: Tiling, n_rows: int, n_tiles: int, n_pairs: int, device: torch.device) -> int:
    """Choose into how many shares to cut `n_rows` rows, for `n_tiles` tiles of queries and `n_pairs` of KV heads."""
    slots = _n_multiprocessors(device) * tiling.programs
    # All programs of one token's kernel run at once: one more would run alone, after the others.
    wanted = slots // (n_tiles * n_pairs) if tiling.block_m == ONE_TOKEN_ROWS else -(-slots // (n_tiles * n_pairs))
    return max(1, min(wanted, -(-n_rows // (tiling.least * tiling.block_n)), MAX_PARTS))


def attend(q: Tensor, view: KVView, params: AttentionParams, tiling: Tiling | None = None) -> Tensor:
    """Attend q `[B, Hq, T, D]` over the view's rows; `[B, Hq, T, Dv]`, float32, or float16 of prompts.

    A query that sees no row gives zeros. Without a `tiling`, one is chosen.
    """
    n_batch, n_heads, n_new, head_dim = q.shape
    segments = view.segments
    if tiling is None and prefill.available(q.device) and prefill.takes(q, view, params):
        return prefill.attend(q, view, params)
    n_kv_heads = int(segments[0].k[0].shape[1])
    assert head_dim == view.head_dim_k and n_heads % n_kv_heads == 0, (q.shape, view.head_dim_k, n_kv_heads)
    assert view.window is None or view.window > 0, view.window
    group = n_heads // n_kv_heads
    turing = not _has_products_of_fragments(q.device)
    one_token = n_new == 1 and group <= ONE_TOKEN_ROWS and params.mask is None and not turing
    if q.stride(3) != 1 or (one_token and not _loads_eights(q)):
        q = q.contiguous()
    out = q.new_empty(n_batch, n_heads, n_new, view.head_dim_v, dtype=torch.float32)
    n_query_rows, n_pairs = n_new * group, n_batch * n_kv_heads
    sides = [
        (row_format(s.format_k.name, view.head_dim_k), row_format(s.format_v.name, view.head_dim_v)) for s in segments
    ]
    tilings = [
        tiling or choose_tiling(*pair, n_query_rows, one_token=one_token and _aligned(s), turing=turing)
        for pair, s in zip(sides, segments, strict=True)
    ]
    tiles = [-(-n_query_rows // t.block_m) for t in tilings]
    shares = [n_shares(t, s.length, n, n_pairs, q.device) for t, s, n in zip(tilings, segments, tiles, strict=True)]
    n_parts = sum(shares)
    partial = n_parts > 1 or tilings[0].block_m == ONE_TOKEN_ROWS
    if partial:
        parts = q.new_empty(n_pairs, n_parts, n_query_rows, view.head_dim_v, dtype=torch.float32)
        tops, sums = (q.new_empty(n_pairs, n_parts, n_query_rows, dtype=torch.float32) for _ in range(2))
    else:
        parts = tops = sums = out
    sinks = None if params.sinks is None else params.sinks.to(device=q.device, dtype=torch.float32).contiguous()
    mask, mask_strides = _mask(params.mask, n_batch, n_heads, n_new, view.length)
    lengths = _lengths(segments, n_batch)
    before = 0
    for i, segment in enumerate(segments):
        k_rows, v_rows = _rows(segment, view, n_batch, n_kv_heads)
        t = tilings[i]
        if t.block_m == ONE_TOKEN_ROWS:
            numbers = (before, k_rows, v_rows, n_parts, sum(shares[:i]))
            at = None if lengths is None else (i, len(segments))
            _one_token(q, view, params, segment, t, shares[i], (parts, tops, sums), lengths, at, numbers)
            before += segment.length
            continue
        attend_segment[(tiles[i], shares[i], n_pairs)](
            q,
            parts,
            tops,
            sums,
            _or(sinks, q),
            _or(mask, q),
            _or(segment.center, q),
            *memory(segment.format_k, segment.k),
            *memory(segment.format_v, segment.v),
            _or(segment.starts, q),
            _or(lengths, q),
            n_new,
            n_batch,
            n_kv_heads,
            segment.start,
            segment.length,
            before,
            before,
            view.length,
            k_rows,
            v_rows,
            params.scale,
            params.softcap or 1.0,
            view.window or 0,
            n_parts,
            sum(shares[:i]),
            *q.stride()[:3],
            *mask_strides,
            K=sides[i][0],
            V=sides[i][1],
            GROUP=group,
            BLOCK_M=t.block_m,
            BLOCK_N=t.block_n,
            ONE_TOKEN=n_new == 1,
            HAS_MASK=mask is not None,
            HAS_WINDOW=view.window is not None and mask is None,
            HAS_SOFTCAP=params.softcap is not None,
            HAS_SINKS=sinks is not None,
            HAS_CENTER=segment.center is not None,
            HAS_STARTS=segment.starts is not None,
            N_LENGTHS=0 if lengths is None else len(segments),
            SEGMENT=i if lengths is not None else 0,
            PARTIAL=partial,
            PREFETCH=t.prefetch,
            num_warps=t.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
        before += segment.length
    if partial:
        padded = 1 << (n_parts - 1).bit_length()
        columns = max(8, min(64, COMBINED // padded))
        combine_parts[(n_query_rows, n_pairs, -(-view.head_dim_v // columns))](
            parts,
            tops,
            sums,
            _or(sinks, q),
            out,
            n_parts,
            n_new,
            GROUP=group,
            HEAD_DIM=view.head_dim_v,
            COLUMNS=columns,
            PARTS_PADDED=padded,
            HAS_SINKS=sinks is not None,
            N_KV_HEADS=n_kv_heads,
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=True,
            **overlapping(q.device),
        )
    return out


def _one_token(
    q: Tensor,
    view: KVView,
    params: AttentionParams,
    segment: Segment,
    tiling: Tiling,
    n_shares: int,
    results: tuple[Tensor, Tensor, Tensor],
    lengths: Tensor | None,
    place: tuple[int, int] | None,
    numbers: tuple[int, int, int, int, int],
) -> None:
    """Launch the kernel for one token on one segment.

    Parameters
    ----------
    results
        Parts, their tops and their sums.
    place
        Which segment of how many, if `lengths` are on the device.
    numbers
        Rows before the segment; rows per sequence or block of K and of V; parts in all and before.
    """
    before, k_rows, v_rows, n_parts, first_part = numbers
    n_batch, n_heads = q.shape[:2]
    n_kv_heads = int(segment.k[0].shape[1])
    tile = tiling.block_n // tiling.warps
    attend_one_token[(n_shares, n_kv_heads, n_batch)](
        q,
        *results,
        _or(segment.center, q),
        *memory(segment.format_k, segment.k),
        *memory(segment.format_v, segment.v),
        _or(segment.starts, q),
        _or(lengths, q),
        n_batch,
        n_kv_heads,
        segment.start,
        segment.length,
        before,
        view.length,
        k_rows,
        v_rows,
        params.scale,
        params.softcap or 1.0,
        view.window or 0,
        n_parts,
        first_part,
        -(-segment.length // (n_shares * tile)) * tile,
        *q.stride()[:2],
        K=row_format(segment.format_k.name, view.head_dim_k),
        V=row_format(segment.format_v.name, view.head_dim_v),
        GROUP=n_heads // n_kv_heads,
        SUBTILES=tile // 16,
        WARPS=tiling.warps,
        HAS_WINDOW=view.window is not None,
        HAS_SOFTCAP=params.softcap is not None,
        HAS_CENTER=segment.center is not None,
        HAS_STARTS=segment.starts is not None,
        SEGMENT=place[0] if place else 0,
        N_LENGTHS=place[1] if place else 0,
        num_warps=tiling.warps,
        num_stages=1,
        enable_fp_fusion=True,
        **overlapping(q.device),
    )


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """Return the tensor, or another one's address for an argument that the kernel will not read."""
    return placeholder if tensor is None else tensor


def _mask(
    mask: Tensor | None, n_batch: int, n_heads: int, n_new: int, n_rows: int
) -> tuple[Tensor | None, tuple[int, ...]]:
    """View the mask as bytes, with its strides, the last of which is 1."""
    if mask is None:
        return None, (0, 0, 0)
    assert mask.dtype == torch.bool, mask.dtype
    if mask.stride(3) != 1:
        mask = mask.contiguous()
    mask = mask.view(torch.uint8).expand(n_batch, n_heads, n_new, n_rows)
    return mask, mask.stride()[:3]


def _lengths(segments: tuple[Segment, ...], n_batch: int) -> Tensor | None:
    """Gather the segments' lengths, int32 `[segments, B]` on the device, if any is there."""
    known = [s.lengths for s in segments if s.lengths is not None]
    if not known:
        return None
    for lengths in known:
        assert lengths.shape == (n_batch,) and lengths.dtype == torch.int32, (lengths.shape, lengths.dtype)
    if len(segments) == 1:
        return known[0].contiguous()
    return torch.stack([torch.full_like(known[0], s.length) if s.lengths is None else s.lengths for s in segments])


def _rows(segment: Segment, view: KVView, n_batch: int, n_kv_heads: int) -> tuple[int, int]:
    """Count the rows per sequence of K's and of V's planes; checked against what is to be read."""
    heads = (n_batch, n_kv_heads)
    k_rows = capacity(segment.format_k, segment.k, view.head_dim_k, heads)
    v_rows = capacity(segment.format_v, segment.v, view.head_dim_v, heads)
    end = segment.start + segment.length
    assert segment.start >= 0 and end <= min(k_rows, v_rows), (segment.start, segment.length, k_rows, v_rows)
    if segment.center is not None:
        assert segment.center.shape == (n_batch, n_kv_heads, view.head_dim_k), segment.center.shape
        assert segment.center.is_contiguous() and segment.center.dtype == torch.float32, segment.center.dtype
    return k_rows, v_rows
