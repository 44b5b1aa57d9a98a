"""Weights of linear layers in the native kernels' own layout, and y = W x over them.

Owns packing and unpacking, the choice of the smallest type that holds a weight unchanged, and the binding of the native
linear layer. The layout is described in csrc/pack.h. Knows no models. A model's native step takes `PackedWeight`
records and multiplies them itself; `linear` is for tests and benches, `gather` for an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats import get_format
from hybridkv.kernels.cpu_native import _native, allocate, encode_into, isa

WeightType = Literal["f32", "bf16", "q8_0"]

WEIGHT_TYPES: Final[tuple[WeightType, ...]] = ("f32", "bf16", "q8_0")

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


def exact_type(weight: Tensor) -> WeightType:
    """The smallest type that holds `weight`, any float dtype [n_out, n_in], without changing a bit."""
    kinds: list[WeightType] = ["q8_0", "bf16"] if weight.shape[1] % _BLOCK == 0 else ["bf16"]
    for chunk in _row_chunks(weight):
        chunk = chunk.float()
        kinds = [kind for kind in kinds if _same_bits(_rounded(chunk, kind), chunk)]
        if not kinds:
            return "f32"
    return kinds[0]


def pack(weight: Tensor, weight_type: WeightType) -> PackedWeight:
    """Pack a matrix, float32, float16 or bfloat16 [n_out, n_in], rounding its values to `weight_type`.

    Raises
    ------
    UsageError
        q8_0 and n_in is no multiple of 32.
    """
    n_out, n_in = weight.shape
    if weight_type == "q8_0" and n_in % _BLOCK:
        raise UsageError(
            f"q8_0 needs a multiple of {_BLOCK} inputs, not {n_in}", hint="pack this weight as bf16 or f32"
        )
    data = allocate((_native().packed_bytes(weight_type, n_out, n_in),))
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
        out.data_ptr(), out.stride(0), into == "add", n_threads or torch.get_num_threads(),
    )  # fmt: skip
    return out


def _address(weight: PackedWeight) -> int:
    """Address of the packed bytes, once it is sure that the native code may read them."""
    data = weight.data
    assert data.dtype == torch.uint8 and data.device.type == "cpu" and data.is_contiguous()
    assert data.numel() == _native().packed_bytes(weight.type, weight.n_out, weight.n_in), weight
    assert data.data_ptr() % 64 == 0, data.data_ptr()
    return data.data_ptr()


def _row_chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """Whole panels of rows, so few that temporaries stay small."""
    step = max(1, _CHUNK_VALUES // weight.shape[1] // _PANEL) * _PANEL
    return torch.split(weight, step)


def _rounded(x: Tensor, kind: WeightType) -> Tensor:
    """float32 [n, n_in] as `kind` holds it."""
    if kind == "bf16":
        return x.bfloat16().float()
    return get_format("q8_0").decode(_q8_0(x), x.shape[1])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _q8_0(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and codes of rows, uint8 [n, bytes] each: the bytes of `KVFormat.encode`, made by native code."""
    sizes = get_format("q8_0").plane_bytes(x.shape[1])
    d, codes = (torch.empty(1, 1, x.shape[0], size, dtype=torch.uint8) for size in sizes)
    encode_into(x[None, None], "q8_0", "absmax", (d, codes), 0)
    return d[0, 0], codes[0, 0]


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


def _pack_q8_0(x: Tensor, out: Tensor) -> None:
    d, codes = _q8_0(x)
    n, n_pairs = out.shape[0], -(-x.shape[1] // (2 * _BLOCK))
    scale_bytes = 2 * _PANEL * 2
    pairs = out.view(n, n_pairs, -1)
    halves = _padded(d.view(torch.int16), n, 2 * n_pairs).view(n, _PANEL, n_pairs, 2)
    pairs[..., :scale_bytes].view(torch.int16).view(n, n_pairs, 2, _PANEL).copy_(halves.permute(0, 2, 3, 1))
    quads = _padded(codes ^ 0x80, n, n_pairs * 2 * _BLOCK, fill=0x80).view(torch.int32)
    quads = quads.view(n, _PANEL, n_pairs, 2 * _BLOCK // 4).permute(0, 2, 3, 1)
    pairs[..., scale_bytes:].view(torch.int32).view(n, n_pairs, 2 * _BLOCK // 4, _PANEL).copy_(quads)


_PACK: Final = {"f32": _pack_f32, "bf16": _pack_bf16, "q8_0": _pack_q8_0}
