"""A model's linear modules as products: those that read the same rows joined into one.

Owns the joined matrices. The model keeps its own parameters, as parts of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridkv.kernels.cuda.layers import swiglu
from hybridkv.kernels.cuda.products import multiply, multiply_swiglu


def is_plain(weight: Tensor) -> bool:
    """Check whether a weight is held as plain values, and not as another library packs it."""
    return type(weight) in (nn.Parameter, Tensor)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply `[N, in]` by a weight that is held in any way: `[N, out]`."""
    return multiply(x, weight) if is_plain(weight) else F.linear(x, weight)


class Joined:
    """Linear modules without bias that read the same rows, as one product.

    Plain matrices are joined in memory, each module's own becoming a part of the whole; matrices that are held in
    another way are multiplied one by one.
    """

    def __init__(self, *modules: Any) -> None:
        weights = [module.weight for module in modules]
        self.widths = [weight.shape[0] for weight in weights]
        self._modules: Sequence[Any] = modules
        self._weight: Tensor | None = None
        if all(map(is_plain, weights)):
            self._weight = torch.cat([weight.detach() for weight in weights])
            for module, part in zip(modules, torch.split(self._weight, self.widths), strict=True):
                module.weight = nn.Parameter(part, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The matrices in one, `[sum of outs, in]`; there if all of them are plain."""
        assert self._weight is not None
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply `[N, in]` by the joined weights: `[N, sum of outs]`."""
        if self._weight is not None:
            return multiply(x, self._weight)
        return torch.cat([module(x) for module in self._modules], 1)

    def swiglu(self, x: Tensor) -> Tensor:
        """Compute `silu(gate) * up` of `[N, in]`, for a gate and an up module of one width; `[N, out]`."""
        return swiglu(self(x)) if self._weight is None else multiply_swiglu(x, self._weight)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split the product into its parts, as slices."""
        return torch.split(self(x), self.widths, 1)
