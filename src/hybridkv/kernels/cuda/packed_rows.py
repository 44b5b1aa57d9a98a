"""Packed weights decoded to memory, float16: a window of a matrix for a prompt, or an embedding's rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridkv.kernels.cuda.overlap import begin, overlapping
from hybridkv.kernels.cuda.packed_layout import PackedWeight
from hybridkv.kernels.cuda.packed_unit import decode_unit, load_unit
from hybridkv.kernels.cuda.ptx import pack, store_four, unpack


@triton.jit
def _decoded(raw, place, T: tl.constexpr):
    """Decode a lane's words of a unit, times their scales."""
    words, scales = decode_unit(raw, place, T)
    out = ()
    for w in tl.static_range(8):
        for half in tl.static_range(2):
            scale = (scales[0] if T.order == "quarters" else scales[w]) * T.gain
            a, b = _times(words[4 * w + 2 * half], scale)
            c, d = _times(words[4 * w + 2 * half + 1], scale)
            out = out + (pack(a, b), pack(c, d))
    return out


@triton.jit
def _times(word, scale):
    low, high = unpack(word)
    return low.to(tl.float32) * scale, high.to(tl.float32) * scale


@triton.jit(do_not_specialize=["n", "n_in", "n_units"])
def _decode(main, more, scales, last, ids, out, n, first, n_in, n_units, out_row, WARPS: tl.constexpr,
            GATHERS: tl.constexpr, T: tl.constexpr, OVERLAPS: tl.constexpr):  # fmt: skip
    """Decode rows to float16: those of `ids`, or from `first` on. A warp takes eight rows of a unit."""
    begin(OVERLAPS)
    thread = tl.arange(0, WARPS * 32)
    place = thread % 4
    row = tl.program_id(0) * (WARPS * 8) + thread // 4
    unit = tl.program_id(1)
    source = first + row
    if GATHERS:
        source = tl.load(ids + row, mask=row < n, other=0)
    here = tl.where(row < n, unit, n_units)
    words = _decoded(load_unit(main, more, scales, last, source.to(tl.int64), here, n_units, place, T), place, T)
    to = out.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * (out_row // 2)
    if T.order == "quarters":
        # A lane's 64 values follow each other, its neighbour's come behind them: threads exchange them for the store.
        low, high = (), ()
        for w in tl.static_range(8):
            low = low + (words[4 * w], words[4 * w + 1])
            high = high + (words[4 * w + 2], words[4 * w + 3])
        whole = _side_by_side(low + high)
        at = (to + unit * 128 + place * 32)[:, None] + tl.arange(0, 32)[None, :]
        tl.store(at, whole, mask=(row < n)[:, None])
    else:
        for w in tl.static_range(8):
            start = unit * 256 + w * 32 + place * 8
            inside = (row < n) & (start < n_in)
            a, b, c, d = words[4 * w], words[4 * w + 1], words[4 * w + 2], words[4 * w + 3]
            store_four(
                to.to(tl.pointer_type(tl.float32)) + start // 2, a.to(tl.float32, bitcast=True),
                b.to(tl.float32, bitcast=True), c.to(tl.float32, bitcast=True), d.to(tl.float32, bitcast=True), inside,
            )  # fmt: skip


@triton.jit
def _side_by_side(x):
    """Join a tuple of 32 tensors to one, `[n, 32]`."""
    a, b = _pairs(x), ()
    for i in tl.static_range(8):
        b = b + (tl.join(a[2 * i], a[2 * i + 1]),)
    c, d = (), ()
    for i in tl.static_range(4):
        c = c + (tl.join(b[2 * i], b[2 * i + 1]),)
    for i in tl.static_range(2):
        d = d + (tl.join(c[2 * i], c[2 * i + 1]),)
    whole = tl.join(d[0], d[1])
    # The last dim tells the first of the bits of an index, since it was joined last.
    return tl.reshape(tl.permute(whole, (0, 5, 4, 3, 2, 1)), [x[0].shape[0], 32])


@triton.jit
def _pairs(x):
    out = ()
    for i in tl.static_range(16):
        out = out + (tl.join(x[2 * i], x[2 * i + 1]),)
    return out


def decode_rows(weight: PackedWeight, first: int, n: int) -> Tensor:
    """Decode rows of a matrix, or of a stack's matrices one after the other: float16 `[n, in]`."""
    out = torch.empty((n, weight.n_in), dtype=torch.float16, device=weight.device)
    _decode[(triton.cdiv(n, 32), weight.n_units)](
        *weight.planes, out, out, n, first, weight.n_in, weight.n_units, weight.n_in, WARPS=4, GATHERS=False,
        T=weight.type, num_warps=4, **overlapping(weight.device),
    )  # fmt: skip
    return out


def gather_rows(weight: PackedWeight, ids: Tensor) -> Tensor:
    """Decode rows of a matrix by their indices, int64 `[n]`: float16 `[n, in]`."""
    n = len(ids)
    out = torch.empty((n, weight.n_in), dtype=torch.float16, device=weight.device)
    _decode[(triton.cdiv(n, 32), weight.n_units)](
        *weight.planes, ids, out, n, 0, weight.n_in, weight.n_units, weight.n_in, WARPS=4, GATHERS=True,
        T=weight.type, num_warps=4, **overlapping(weight.device),
    )  # fmt: skip
    return out
