"""Writing and attending stored rows: cases, kernels, and the choice between them.

Each backend exports `KERNELS` and `ENCODERS`; this file concatenates them. `attend` and `store` are the doors
through which rotated rows are read and written.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybridkv.errors import NoKernelError
from hybridkv.formats import KVFormat, Scale
from hybridkv.kernels import cpu, cuda, reference
from hybridkv.kernels.case import PHASES, AttentionCase, AttentionParams, KVView, Phase, Segment
from hybridkv.kernels.registry import Encoder, Kernel, explain, select, select_encoder
from hybridkv.rotation import rotate

KERNELS: tuple[Kernel, ...] = cpu.KERNELS + cuda.KERNELS + reference.KERNELS
ENCODERS: tuple[Encoder, ...] = cpu.ENCODERS + cuda.ENCODERS + reference.ENCODERS


def attend(kernel: Kernel, q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
    """Run `kernel`, with Q rotated to meet a rotated K and the output rotated back from a rotated V.

    Parameters
    ----------
    q
        Any float dtype, `[B, Hq, T, D]`, after RoPE.

    Returns
    -------
    Tensor
        `[B, Hq, T, Dv]`, float32, or float16 from a kernel that computes in it.
    """
    out = kernel.attend(rotate(q) if view.rotate_k else q, view, params)
    return rotate(out) if view.rotate_v else out


def store(
    encoder: Encoder,
    x: Tensor,
    fmt: KVFormat,
    scale: Scale | None,
    planes: Sequence[Tensor],
    row: int | Tensor,
    *,
    rotated: bool = False,
    center: Tensor | None = None,
) -> None:
    """Rotate new rows, take a center off, encode them, and store them: one kernel where the encoder has one.

    Parameters
    ----------
    x
        Any float dtype, `[B, Hkv, T, D]`, any strides, not rotated.
    planes
        uint8 `[B, Hkv, capacity, plane bytes]` each.
    row
        Where the first of the T rows goes: an int, or int32 `[B]` on the device, one per sequence.
    rotated
        Whether the rows are stored rotated.
    center
        float32 `[B, Hkv, D]`, rotated if the rows are, that is subtracted after the rotation; or None.

    Raises
    ------
    NoKernelError
        If this encoder knows no rows on the device, and is given some.
    """
    if encoder.store is not None:
        encoder.store(x, fmt, scale, planes, row, rotated=rotated, center=center)
        return
    if not isinstance(row, int):
        raise NoKernelError(
            f"{encoder.name} stores rows by number, not by tensors on the device",
            hint="on a CUDA device with triton installed, cuda-triton does",
        )
    x = rotate(x) if rotated else x
    encoder.write(x if center is None else x.float() - center.unsqueeze(2), fmt, scale, planes, row)


__all__ = [
    "ENCODERS",
    "KERNELS",
    "PHASES",
    "AttentionCase",
    "AttentionParams",
    "Encoder",
    "KVView",
    "Kernel",
    "Phase",
    "Segment",
    "attend",
    "explain",
    "select",
    "select_encoder",
    "store",
]
