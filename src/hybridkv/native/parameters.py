"""Weights of models that are no GGUF files, brought into the file's order once.

A Transformers model in memory or a directory of safetensors is read through the tables of its GGUF architecture, from
right to left, as `hybridkv convert` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hybridkv.gguf.convert import find_tables
from hybridkv.gguf.pairing import Pairing, file_tensors, pair
from hybridkv.kernels.weights import Weight, decode, encode, find_bad_block

_FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class ParameterSource:
    """The parameters of a Transformers model under their GGUF names, in the file's order.

    Parameters
    ----------
    model
        Of which shapes are read; it may be on the meta device.
    parameter
        Gives a parameter's values by its name in the model.
    """

    def __init__(self, model: Any, parameter: Callable[[str], Tensor]) -> None:
        self._config = model.config.get_text_config(decoder=True)
        self._parameter = parameter
        pairings = pair(find_tables(self._config), self._config, model, ())
        self._pairings: dict[str, Pairing] = {name: pairing for pairing in pairings for name in pairing.names}
        self._weights: dict[str, Weight] = {}
        self._vectors: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        """Check whether the model has the parameter that this tensor holds."""
        return name in self._pairings

    def weight(self, name: str) -> Weight:
        """Return a matrix or a stack, in the parameter's own float type; the same object each time."""
        if name not in self._weights:
            for each, tensor in self._tensors(name):
                matrix = tensor if tensor.dim() > 1 else tensor.unsqueeze(0)
                self._weights[each] = encode(matrix, _FLOATS[tensor.dtype])
        return self._weights[name]

    def vector(self, name: str) -> Tensor:
        """Return a small tensor: float32 in the file's shape."""
        if name in self._weights:  # a single row, which a product took: a directory is read once
            return decode(self._weights[name]).flatten()
        if name not in self._vectors:
            self._vectors |= {each: tensor.float() for each, tensor in self._tensors(name)}
        return self._vectors[name]

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Iterate names and shapes of all tensors."""
        for pairing in {pairing.param: pairing for pairing in self._pairings.values()}.values():
            yield from zip(pairing.names, pairing.shapes, strict=True)

    def matrices(self) -> Iterable[Weight]:
        """List the matrices that were taken."""
        return self._weights.values()

    def forget(self, name: str) -> None:
        """Free a matrix that nobody asks for again."""
        self._weights.pop(name, None)

    def shown(self, name: str) -> str:
        """Return the parameter's name."""
        return self._pairings[name].param

    def check(self) -> str | None:
        """Name the first parameter that holds NaN or infinity; None if there is none."""
        bad = (name for name, weight in self._weights.items() if find_bad_block(weight) is not None)
        vectors = (name for name, vector in self._vectors.items() if not torch.isfinite(vector).all())
        return next(map(self.shown, (*bad, *vectors)), None)

    def vectors(self) -> Iterable[Tensor]:
        """List the vectors that were taken."""
        return self._vectors.values()

    def verify(self) -> None:
        """Do nothing: parameters were read whole."""

    def _tensors(self, name: str) -> list[tuple[str, Tensor]]:
        """Convert the parameter that a tensor belongs to: all its tensors, in the file's conventions and shapes."""
        pairing = self._pairings[name]
        value = self._parameter(pairing.param).detach()
        return file_tensors(pairing, self._config, value if value.dtype in _FLOATS else value.float())
