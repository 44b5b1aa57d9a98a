"""Activations between a feed-forward's products, as device functions."""

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl

Act = Literal["silu", "gelu", "gelu_erf", "relu2"]
"""SiLU, GELU by its approximation with tanh and as it is, and the square of ReLU, which gates nothing."""


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Compute an activation."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    if ACT == "gelu":
        # (1 + tanh(y)) / 2 = sigmoid(2 y)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if ACT == "gelu_erf":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    positive = tl.maximum(x, 0.0)
    return positive * positive


@triton.jit
def softplus(x):
    """Compute log(1 + exp(x)), also where exp(x) is far below one."""
    small = tl.exp(-tl.abs(x))
    above = 1.0 + small
    # What 1 + small rounds away is put back as a factor.
    ratio = tl.where(above == 1.0, 1.0, small / tl.where(above == 1.0, 1.0, above - 1.0))
    return tl.maximum(x, 0.0) + tl.where(above == 1.0, small, tl.log(above) * ratio)
