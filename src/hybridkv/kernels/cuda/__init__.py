"""The CUDA kernels, written in Triton, as registry entries. Exports `KERNELS` and `ENCODERS`.

Owns the answer to "do the Triton kernels run this case?". Triton is imported where they are launched, so that a machine
without it has the package, and the reason. This package is the only importer of triton.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from hybridkv.formats import FORMATS, KVFormat, Scale
from hybridkv.kernels.case import AttentionCase, AttentionParams, KVView
from hybridkv.kernels.cuda.layout import rejects_rows
from hybridkv.kernels.registry import Encoder, Kernel

NAME = "cuda-triton"
TOLERANCE = 2e-3
"""Queries and weights are rounded to float16 for the tensor cores; docs/decisions/cuda-kernels.md."""


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _is_rocm() -> bool:
    return torch.version.hip is not None


def available(device: str) -> str | None:
    """Explain why the kernels cannot run on a kind of device; None if they can. Triton interprets them on the CPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device != "cuda" and not (device == "cpu" and interpreted):
        return f"runs on cuda, not on {device}"
    if not _installed():
        return "triton is not installed"
    return "its instructions are PTX, and this torch is built for ROCm" if _is_rocm() else None


def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
    """Attend q `[B, Hq, T, D]` over the view's S rows; `[B, Hq, T, Dv]`, float32, or float16 of prompts."""
    from hybridkv.kernels.cuda import launch

    return launch.attend(q, view, params)


def write(x: Tensor, fmt: KVFormat, scale: Scale | None, planes: Sequence[Tensor], row: int) -> None:
    """Encode x `[B, Hkv, T, D]` into rows `[row, row + T)` of the planes."""
    # Not by the name of the function below: once it is imported, the module of that name stands in its place.
    from hybridkv.kernels.cuda.store import store as launch

    launch(x, fmt, scale, planes, row)


def store(
    x: Tensor,
    fmt: KVFormat,
    scale: Scale | None,
    planes: Sequence[Tensor],
    row: int | Tensor,
    *,
    rotated: bool,
    center: Tensor | None,
) -> None:
    """Rotate, subtract a center, encode and write, in one launch."""
    from hybridkv.kernels.cuda.store import store as launch

    launch(x, fmt, scale, planes, row, rotated=rotated, center=center)


def _rejects(case: AttentionCase) -> str | None:
    if (missing := available(case.device)) is not None:
        return missing
    return rejects_rows(FORMATS[case.type_k], case.head_dim_k) or rejects_rows(FORMATS[case.type_v], case.head_dim_v)


def _rejects_rows(device: str, fmt: KVFormat, head_dim: int) -> str | None:
    return available(device) or rejects_rows(fmt, head_dim)


KERNELS = (Kernel(name=NAME, rank=5, tolerance=TOLERANCE, rejects=_rejects, attend=attend),)
ENCODERS = (Encoder(name=NAME, rank=5, rejects=_rejects_rows, write=write, store=store),)
