"""The native CPU kernels as registry entries. Exports `KERNELS` and `ENCODERS`.

Owns the answer to "does the native code run this case?"; `hybridkv.kernels.cpu_native` owns the call. The
instruction set is part of the name, so that every printed choice says what really runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybridkv.formats import FORMATS, KVFormat, Scale
from hybridkv.kernels import cpu_native
from hybridkv.kernels.case import DEVICE_ROWS_REFUSAL, AttentionCase, AttentionParams, KVView
from hybridkv.kernels.registry import Encoder, Kernel

TOLERANCE = 2e-3
"""Queries are rounded to integers for the integer dot products; docs/decisions/cpu-kernels.md."""

MAX_HEAD_DIM = 1024


def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
    """Attend q `[B, Hq, T, D]` over the view's S rows; float32 `[B, Hq, T, Dv]`."""
    return cpu_native.attend(
        q,
        view.segments,
        view.head_dim_k,
        view.head_dim_v,
        params.scale,
        softcap=params.softcap,
        sinks=params.sinks,
        window=None if params.mask is not None else view.window,
        mask=params.mask,
        causal=params.mask is None,
    )


def write(x: Tensor, fmt: KVFormat, scale: Scale | None, planes: Sequence[Tensor], row: int) -> None:
    """Encode x `[B, Hkv, T, D]` into rows `[row, row + T)` of the planes."""
    cpu_native.encode_into(x, fmt.name, scale, planes, row)


def _rejects(case: AttentionCase) -> str | None:
    if case.device != "cpu":
        return f"runs on cpu, not on {case.device}"
    if (missing := cpu_native.available()) is not None:
        return missing
    if case.device_rows:
        return DEVICE_ROWS_REFUSAL
    for type_name, head_dim in ((case.type_k, case.head_dim_k), (case.type_v, case.head_dim_v)):
        if reason := _rejects_rows("cpu", FORMATS[type_name], head_dim):
            return reason
    return None


def _rejects_rows(device: str, fmt: KVFormat, head_dim: int) -> str | None:
    if device != "cpu":
        return f"runs on cpu, not on {device}"
    if (missing := cpu_native.available()) is not None:
        return missing
    if head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim} is above {MAX_HEAD_DIM}"
    if fmt.name not in cpu_native.formats():
        return f"the extension reads no {fmt.name}"
    return fmt.rejects(head_dim)


def _name() -> str:
    return "cpu" if cpu_native.available() is not None else f"cpu-{cpu_native.isa()}"


KERNELS = (Kernel(name=_name(), rank=10, tolerance=TOLERANCE, rejects=_rejects, attend=attend),)
ENCODERS = (Encoder(name=_name(), rank=10, rejects=_rejects_rows, write=write),)
