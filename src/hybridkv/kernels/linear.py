"""Weights of linear layers in the native kernels' own layout, and y = W x over them.

Owns packing and unpacking, the choice of the smallest type that holds a weight unchanged, and the binding of the native
linear layer. The layout is described in csrc/pack.h. Knows no models. A model's native step takes `PackedWeight`
records and multiplies them itself; `linear` is for tests and benches, `gather` for an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats import Scale, get_format
from hybridkv.kernels.cpu_native import _native, allocate, encode_into, isa

WeightType = Literal["f32", "bf16", "q8_0", "q4_0"]

WEIGHT_TYPES: Final[tuple[WeightType, ...]] = get_args(WeightType)

_PANEL = 16
_BLOCK = 32
_CHUNK_VALUES = 1 << 21


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A matrix [n_out, n_in] as panels of 16 rows.

    Parameters
    ----------
    type
        How its values are stored.
    data
        uint8 [bytes], 64-byte aligned.
    """

    type: WeightType
    n_out: int
    n_in: int
    data: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of memory, padding counted."""
        return self.data.numel()


def packed_bytes(weight_type: WeightType, n_out: int, n_in: int) -> int:
    """Bytes of a packed matrix, padding counted."""
    n_bytes: int = _native().packed_bytes(weight_type, n_out, n_in)
    return n_bytes


def exact_type(weight: Tensor) -> WeightType:
    """The smallest type that holds `weight`, any float dtype [n_out, n_in], without changing a bit."""
    kinds: list[WeightType] = ["q4_0", "q8_0", "bf16"] if weight.shape[1] % _BLOCK == 0 else ["bf16"]
    for chunk in _row_chunks(weight):
        chunk = chunk.float().contiguous()
        kinds = [kind for kind in kinds if _holds(chunk, kind)]
        if not kinds:
            return "f32"
    return kinds[0]


def pack(weight: Tensor, weight_type: WeightType) -> PackedWeight:
    """Pack a matrix, float32, float16 or bfloat16 [n_out, n_in], rounding its values to `weight_type`.

    A row that q8_0 or q4_0 holds as it is keeps the scales that it was quantized with, whatever rule gave them. Other
    rows get q8_0's largest magnitudes, and q4_0's scales refitted to the codes.

    Raises
    ------
    UsageError
        q8_0 or q4_0, and n_in is no multiple of 32.
    """
    n_out, n_in = weight.shape
    if weight_type in _SCALES and n_in % _BLOCK:
        raise UsageError(
            f"{weight_type} needs a multiple of {_BLOCK} inputs, not {n_in}", hint="pack this weight as bf16 or f32"
        )
    data = allocate((packed_bytes(weight_type, n_out, n_in),))
    panels = data.view(-(-n_out // _PANEL), -1)
    done = 0
    for chunk in _row_chunks(weight):
        here = -(-chunk.shape[0] // _PANEL)
        _PACK[weight_type](chunk, panels[done : done + here])
        done += here
    return PackedWeight(weight_type, n_out, n_in, data)


def gather(weight: PackedWeight, ids: Tensor, *, n_threads: int | None = None) -> Tensor:
    """Rows of the matrix.

    Parameters
    ----------
    ids
        Integers [n], each in 0..n_out-1.

    Returns
    -------
    Tensor
        float32 [n, n_in].
    """
    ids = ids.to(torch.int64).contiguous()
    assert ids.dim() == 1, ids.shape
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < weight.n_out):
        raise UsageError(f"row ids {int(ids.min())}..{int(ids.max())} of a matrix of {weight.n_out} rows")
    out = torch.empty(ids.numel(), weight.n_in, dtype=torch.float32)
    _native().unpack_rows(
        weight.type, weight.n_out, weight.n_in, _address(weight), ids.data_ptr(), ids.numel(), out.data_ptr(),
        n_threads or torch.get_num_threads(),
    )  # fmt: skip
    return out


def unpack(weight: PackedWeight) -> Tensor:
    """The whole matrix, float32 [n_out, n_in]."""
    return gather(weight, torch.arange(weight.n_out))


def linear(
    x: Tensor,
    weight: PackedWeight,
    *,
    out: Tensor | None = None,
    into: Literal["write", "add"] = "write",
    sums: Literal["of all rows", "of each alone"] = "of all rows",
    n_threads: int | None = None,
) -> Tensor:
    """X W^T in float32.

    Parameters
    ----------
    x
        Any float dtype [n, n_in].
    out
        float32 [n, n_out], rows contiguous; a new tensor if None.
    into
        Whether `out` is overwritten or added to.
    sums
        Whether the number of rows may decide how products are summed, or each row gets the bits that it gets alone.
    """
    assert x.dim() == 2 and x.shape[1] == weight.n_in, (x.shape, weight.n_in)
    assert into == "write" or out is not None
    if x.dtype != torch.float32 or x.stride(1) != 1:
        x = x.float().contiguous()
    if out is None:
        out = torch.empty(x.shape[0], weight.n_out, dtype=torch.float32)
    assert out.shape == (x.shape[0], weight.n_out) and out.dtype == torch.float32 and out.device.type == "cpu"
    assert out.stride(1) == 1 or weight.n_out == 1, out.stride()
    _native().linear(
        isa(), weight.type, weight.n_out, weight.n_in, _address(weight), x.data_ptr(), x.stride(0), x.shape[0],
        sums == "of each alone", out.data_ptr(), out.stride(0), into == "add", n_threads or torch.get_num_threads(),
    )  # fmt: skip
    return out


def _address(weight: PackedWeight) -> int:
    """Address of the packed bytes, once it is sure that the native code may read them."""
    data = weight.data
    assert data.dtype == torch.uint8 and data.device.type == "cpu" and data.is_contiguous()
    assert data.numel() == packed_bytes(weight.type, weight.n_out, weight.n_in), weight
    assert data.data_ptr() % 64 == 0, data.data_ptr()
    return data.data_ptr()


def _row_chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """Whole panels of rows, so few that temporaries stay small."""
    step = max(1, _CHUNK_VALUES // weight.shape[1] // _PANEL) * _PANEL
    return torch.split(weight, step)


def _holds(x: Tensor, kind: WeightType) -> bool:
    """Whether `kind` holds float32 rows [n, n_in] to the bit."""
    if kind in _SCALES:
        return bool(_exact(x, kind)[0].all())
    return torch.equal(x.bfloat16().float().view(torch.int32), x.view(torch.int32))


def _exact(x: Tensor, kind: WeightType) -> tuple[Tensor, Tensor, Tensor]:
    """Which of float32 rows `kind` holds to the bit, bool [n], and the scales and codes of those, uint8 [n, bytes]."""
    n, n_in = x.shape
    d, codes = (torch.empty(n, size, dtype=torch.uint8) for size in get_format(kind).plane_bytes(n_in))
    found = torch.empty(n, dtype=torch.bool)
    _native().exact_rows(
        kind, x.data_ptr(), n, n_in, d.data_ptr(), codes.data_ptr(), found.data_ptr(), torch.get_num_threads()
    )
    return found, d, codes


def _planes(x: Tensor, kind: WeightType) -> tuple[Tensor, Tensor]:
    """Scales and codes of rows, uint8 [n, bytes] each: as they are where that is exact, else as they are encoded."""
    x = x.float().contiguous()
    found, d, codes = _exact(x, kind)
    if not found.all():
        rest = x[~found][None, None]
        planes = [torch.empty(1, 1, rest.shape[2], p.shape[1], dtype=torch.uint8) for p in (d, codes)]
        encode_into(rest, kind, _SCALES[kind], planes, 0)
        d[~found], codes[~found] = (plane[0, 0] for plane in planes)
    return d, codes


def _padded(x: Tensor, n_panels: int, n_in: int, fill: int = 0) -> Tensor:
    """Rows padded to whole panels and inputs to `n_in`: [n_panels, 16, n_in]."""
    x = torch.nn.functional.pad(x, (0, n_in - x.shape[1], 0, n_panels * _PANEL - x.shape[0]), value=fill)
    return x.view(n_panels, _PANEL, n_in)


def _pack_f32(x: Tensor, out: Tensor) -> None:
    n = out.shape[0]
    out.view(torch.float32).view(n, -1, _PANEL).copy_(_padded(x.float(), n, x.shape[1]).transpose(1, 2))


def _pack_bf16(x: Tensor, out: Tensor) -> None:
    n, n_in = out.shape[0], out.shape[1] // (_PANEL * 2)
    pairs = _padded(x.bfloat16(), n, n_in).view(torch.int32)
    out.view(torch.int32).view(n, n_in // 2, _PANEL).copy_(pairs.transpose(1, 2))


def _pack_blocks(x: Tensor, out: Tensor, kind: WeightType, block_bytes: int, zero: int, flip: int) -> None:
    """Scales and codes, `block_bytes` a block and row; a byte of zeros is `zero`, and `flip` makes codes unsigned."""
    d, codes = _planes(x, kind)
    n, n_pairs = out.shape[0], -(-x.shape[1] // (2 * _BLOCK))
    scale_bytes, n_quads = 2 * _PANEL * 2, 2 * block_bytes // 4
    pairs = out.view(n, n_pairs, -1)
    halves = _padded(d.view(torch.int16), n, 2 * n_pairs).view(n, _PANEL, n_pairs, 2)
    pairs[..., :scale_bytes].view(torch.int16).view(n, n_pairs, 2, _PANEL).copy_(halves.permute(0, 2, 3, 1))
    quads = _padded(codes ^ flip, n, n_pairs * n_quads * 4, fill=zero).view(torch.int32)
    quads = quads.view(n, _PANEL, n_pairs, n_quads).permute(0, 2, 3, 1)
    pairs[..., scale_bytes:].view(torch.int32).view(n, n_pairs, n_quads, _PANEL).copy_(quads)


_SCALES: Final[Mapping[WeightType, Scale]] = {"q8_0": "absmax", "q4_0": "refit"}

_PACK: Final[Mapping[WeightType, Callable[[Tensor, Tensor], None]]] = {
    "f32": _pack_f32,
    "bf16": _pack_bf16,
    "q8_0": partial(_pack_blocks, kind="q8_0", block_bytes=_BLOCK, zero=0x80, flip=0x80),
    "q4_0": partial(_pack_blocks, kind="q4_0", block_bytes=_BLOCK // 2, zero=0x88, flip=0),
}
