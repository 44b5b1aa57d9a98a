"""How stored rows are written and attended: cases, kernels, and the choice between them.

Each backend exports `KERNELS` and `ENCODERS`; this file concatenates them, and `attend` is the one door
through which attention over a cache goes.
"""

from __future__ import annotations

from torch import Tensor

from hybridkv.kernels import cpu, reference
from hybridkv.kernels.case import PHASES, AttentionCase, AttentionParams, KVView, Phase, Segment
from hybridkv.kernels.registry import Encoder, Kernel, explain, select, select_encoder
from hybridkv.rotation import rotate

KERNELS: tuple[Kernel, ...] = cpu.KERNELS + reference.KERNELS
ENCODERS: tuple[Encoder, ...] = cpu.ENCODERS + reference.ENCODERS


def attend(kernel: Kernel, q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
    """Run `kernel`, with Q rotated to meet a rotated K and the output rotated back from a rotated V.

    Parameters
    ----------
    q
        Any float dtype, `[B, Hq, T, D]`, after RoPE.

    Returns
    -------
    Tensor
        float32 `[B, Hq, T, Dv]`.
    """
    out = kernel.attend(rotate(q) if view.rotate_k else q, view, params)
    return rotate(out) if view.rotate_v else out


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
]
