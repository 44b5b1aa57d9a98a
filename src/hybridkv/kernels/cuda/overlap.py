"""Kernels that are launched while the one before them ends: programmatic dependent launch, on Hopper and newer.

A decode step is hundreds of kernels of a few microseconds; what lies between two of them is time as well. A kernel
that takes part is launched as soon as every program of the one before has begun, works out where its memory lies, and
waits for the end of that one before it touches any. None ends before its own wait has, so when a kernel's work begins
all that came before is done, along a whole chain of kernels that have begun. One that is launched like this and does
not wait would read what is not there yet: `begin` belongs before the first load of each. Only weights, which no kernel
of a step writes, may be read earlier (products.py).

Source: NVIDIA's PTX ISA, griddepcontrol.
"""

from __future__ import annotations

from typing import TypedDict

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridkv.kernels.cuda.card import facts_of


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Let the next kernel launch, and wait for the previous one."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()


class Launch(TypedDict, total=False):
    """The facts that a launch passes on."""

    OVERLAPS: bool
    launch_pdl: bool


def overlapping(device: torch.device) -> Launch:
    """Choose the launch options of a kernel that calls `begin` on this device."""
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps(device) else {"OVERLAPS": False}


def overlaps(device: torch.device) -> bool:
    """Check whether a kernel may be launched while the one before ends, and wait for it on the device."""
    card = facts_of(device)
    return card is not None and torch.version.hip is None and card.capability >= (9, 0)
