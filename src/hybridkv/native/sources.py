"""The sources of the native backend's weights, described; and another source's weights in one type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor

from hybridkv.held import WeightKind, weight_type
from hybridkv.kernels.weights import Weight, find_bad_block, reencoded, takes_int8
from hybridkv.model import Source


class Typed(Source, Protocol):
    """A source that can be described."""

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Iterate names and shapes of all tensors."""
        ...

    def matrices(self) -> Iterable[Weight]:
        """List the matrices that were taken."""
        ...

    def vectors(self) -> Iterable[Tensor]:
        """List the vectors that were taken."""
        ...

    def forget(self, name: str) -> None:
        """Let go of a matrix that was taken and is not needed any more."""
        ...

    def shown(self, name: str) -> str:
        """Return the name that a tensor has where a user sees it."""
        ...

    def verify(self) -> None:
        """Raise an error if what was read is no longer what it was when it was opened."""
        ...


class EncodedSource:
    """Another source's matrices in one type; vectors stay what they are.

    Parameters
    ----------
    names
        Matrices that `int4` holds as q8_0: the embedding and the head.
    """

    def __init__(self, source: Typed, kind: WeightKind, names: tuple[str, ...]) -> None:
        self._source, self._kind, self._names = source, kind, names
        self._weights: dict[str, Weight] = {}

    def has(self, name: str) -> bool:
        """Check whether the source has this tensor."""
        return self._source.has(name)

    def vector(self, name: str) -> Tensor:
        """Return the source's vector."""
        return self._source.vector(name)

    def weight(self, name: str) -> Weight:
        """Encode a matrix, or keep it where its rows do not fill the type's blocks; the same object each time."""
        if name not in self._weights:
            self._weights[name] = self._encoded(name)
        return self._weights[name]

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Iterate the source's shapes."""
        return self._source.shapes()

    def vectors(self) -> Iterable[Tensor]:
        """List the vectors that were taken."""
        return self._source.vectors()

    def forget(self, name: str) -> None:
        """Free a matrix that nobody asks for again."""
        self._weights.pop(name, None)

    def shown(self, name: str) -> str:
        """Return the source's name."""
        return self._source.shown(name)

    def verify(self) -> None:
        """Verify the source."""
        self._source.verify()

    def _encoded(self, name: str) -> Weight:
        held = self._source.weight(name)
        kind = weight_type(self._kind, held.n_in, in_vocabulary=name in self._names)
        if kind is None or kind == held.format.name or held.n_out == 1:
            return held
        encoded = reencoded(held, kind)
        self._source.forget(name)  # not held in both forms
        return encoded

    def matrices(self) -> Iterable[Weight]:
        """List the matrices that were taken."""
        return self._weights.values()

    def check(self) -> str | None:
        """Name the first tensor that holds NaN or infinity; None if there is none."""
        bad = (name for name, weight in self._weights.items() if find_bad_block(weight) is not None)
        return next(map(self.shown, bad), None) or self._source.check()


def bytes_by_type(source: Typed) -> dict[str, int]:
    """Count the bytes taken from a source, by type; the type with the most comes first, vectors are float32."""
    total: dict[str, int] = {}
    vectors = sum(vector.nbytes for vector in source.vectors())
    for weight in source.matrices():
        if weight.format.name == "f32" and weight.n_out == 1:  # a single row
            vectors += weight.nbytes
        else:
            total[weight.format.name] = total.get(weight.format.name, 0) + weight.nbytes
    if vectors:
        name = "f32" if "f32" in total else "f32 (vectors)"
        total[name] = total.get(name, 0) + vectors
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def types_held(source: Typed) -> str:
    """Name the types of the matrices that were taken, as in `q4_K + q6_K`."""
    return " + ".join(name for name in bytes_by_type(source) if "(vectors)" not in name)


def activations_used(source: Typed) -> str:
    """Say what asking for 8-bit activations comes to, as in `activations int8 (int16 with q8_0)`."""
    names = {weight.format.name for weight in source.matrices() if weight.format.is_quantized}
    rest = [name for name in bytes_by_type(source) if name in names and not takes_int8(name)]
    if len(rest) == len(names):
        return f"activations int16 (no int8 with {', '.join(rest) or 'these types'})"
    return f"activations int8 (int16 with {', '.join(rest)})" if rest else "activations int8"


def source_of(model: Any) -> Typed:
    """Return the source of a model's weights: a native model's own, or a Transformers model's parameters."""
    own: Typed | None = getattr(model, "source", None)
    if own is not None:
        return own
    from hybridkv.native.parameters import ParameterSource

    return ParameterSource(model, model.get_parameter_or_buffer)
