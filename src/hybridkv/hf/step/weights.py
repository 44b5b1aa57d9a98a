"""A model's matrices as the native step multiplies them: packed once, by the parameter that they came from.

Owns the choice of a weight's type and the freeing of what has been packed. `take` packs a parameter as soon as it has
been read from a file, so that no more than one is ever held twice.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.kernels.linear import PackedWeight, WeightType, exact_type, pack

WeightKind = Literal["auto", "f32", "bf16", "int8"]
"""`auto` is the smallest type that holds a weight without any change; `int8` is q8_0, 8.5 bits."""


def parse_weights(text: str) -> WeightKind:
    """Check a kind of weights.

    Raises
    ------
    UsageError
        Listing the kinds there are.
    """
    for kind in get_args(WeightKind):
        if text == kind:
            return kind  # type: ignore[no-any-return]
    raise UsageError(
        f"no weights {text!r}; allowed: {', '.join(get_args(WeightKind))}",
        hint="auto keeps every weight as it is in the file",
    )


class PackedWeights:
    """Packed matrices, each once however often it is used."""

    def __init__(self, kind: WeightKind = "auto") -> None:
        self._kind = kind
        # The parameter is kept, so that its id stays its own.
        self._packed: dict[int, tuple[Tensor, PackedWeight]] = {}
        self.damaged: str | None = None

    @property
    def types(self) -> tuple[WeightType, ...]:
        """Types in use."""
        return tuple(dict.fromkeys(packed.type for _, packed in self._packed.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(packed.nbytes for _, packed in self._packed.values())

    def of(self, parameter: Tensor, name: str = "a weight") -> PackedWeight:
        """The packed form of a parameter `[n_out, n_in]`."""
        if id(parameter) not in self._packed:
            if self.damaged is None and not torch.isfinite(parameter).all():
                self.damaged = name
            self._packed[id(parameter)] = parameter, pack(parameter, self._type(parameter))
        return self._packed[id(parameter)][1]

    def take(self, name: str, parameter: Any) -> None:
        """Pack a parameter if it is a matrix, and free its own memory."""
        if parameter.dim() == 2:
            self.of(parameter, name)
            parameter.data = parameter.data.new_empty(0)

    def release(self) -> None:
        """Free the own memory of every parameter that was packed."""
        for parameter, _ in self._packed.values():
            parameter.data = parameter.data.new_empty(0)

    def _type(self, weight: Tensor) -> WeightType:
        if self._kind == "auto":
            return exact_type(weight)
        if self._kind == "int8":
            return "q8_0" if weight.shape[1] % 32 == 0 else exact_type(weight)
        return self._kind
