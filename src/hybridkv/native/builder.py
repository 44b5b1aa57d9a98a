"""Writes a model's graph as native operations: buffers, weights by name, and the places where attention runs.

Owns the buffers and the program. What a record becomes is in `cpu.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridkv.kernels.step import StepProgram, Target
from hybridkv.kernels.weights import Activations, Weight
from hybridkv.model import Norm, Rope, Source


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A place in the operations where attention runs, over the cache.

    Attributes
    ----------
    layer
        Index of the model's layer.
    index
        Of the operation that does it natively.
    q, k, v, out
        Buffers `[rows, heads, head dim]`.
    scale
        Factor on the scores.
    """

    layer: int
    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float


class Builder:
    """Writes operations into a `StepProgram`.

    Parameters
    ----------
    rows
        Rows of every buffer.
    source
        Holds the weights.
    activations
        What quantized weights are multiplied with.
    """

    def __init__(self, rows: int, source: Source, activations: Activations = "int16") -> None:
        self.program = StepProgram(activations)
        self.calls: list[AttentionCall] = []
        self.state_layers: list[int] = []
        self.state_shapes: list[tuple[tuple[int, int], tuple[int, ...]]] = []
        self.ropes: list[str | None] = []
        """Kinds of RoPE, in the order of the program's tables of angles."""
        self.n_rows = rows
        self.source = source
        self.prefix = ""
        """Of the block that is being written: `blk.3.`."""
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, width: int | None = None) -> Tensor:
        """Return the buffer of a name, float32 `[rows, width]`; layers share it. Without a width it must exist."""
        if width is not None and name not in self._buffers:
            # Poisoned, so that an operation that reads what none has written shows.
            self._buffers[name] = torch.full((self.n_rows, width), torch.nan)
        found = self._buffers[name]
        assert width is None or found.shape[1] == width, (name, found.shape, width)
        return found

    @staticmethod
    def heads(x: Tensor, n_heads: int) -> Tensor:
        """View a buffer's columns `[rows, heads * D]` as `[rows, heads, D]`, without a copy."""
        return torch.unflatten(x, 1, (n_heads, -1))

    def has(self, name: str) -> bool:
        """Check whether the block has a tensor of this name."""
        return self.source.has(self.prefix + name)

    def weight(self, name: str) -> Weight:
        """Return a matrix or a stack of the block."""
        return self.source.weight(self.prefix + name)

    def vector(self, name: str) -> Tensor:
        """Return a small tensor of the block, float32."""
        return self.source.vector(self.prefix + name)

    def either(self, names: Sequence[str]) -> str:
        """Choose the first of these names that the block has."""
        return next(name for name in names if self.has(name))

    def linear(self, x: Tensor, *targets: tuple[str | Weight, Tensor], add: bool = False) -> None:
        """Add `dst = W x` for weights that read the same x; `dst += W x` with `add`."""
        weights = ((self.weight(w) if isinstance(w, str) else w, dst) for w, dst in targets)
        self.program.linear(x, *(Target(weight, dst, add) for weight, dst in weights))

    def rms_norm(self, x: Tensor, dst: Tensor, norm: Norm, scale: float = 1.0) -> None:
        """Add RMSNorm over the last dim, times a scale; the weight is of all heads or of each."""
        # Some files leave out the suffix.
        weight = self.vector(self.either((norm.weight, norm.weight.removesuffix(".weight")))).flatten() * scale
        each = weight if weight.numel() == x.shape[-1] else weight.view(x.shape[1:])
        self.program.norm(x, dst, each, factor=1 / x.shape[-1], eps=norm.eps)

    def bias(self, x: Tensor, weight: str) -> None:
        """Add the bias that lies beside a weight."""
        self.program.bias(x, self.vector(weight.removesuffix(".weight") + ".bias").flatten())

    def rope(self, x: Tensor, rope: Rope) -> None:
        """Turn heads by their positions, in place."""
        if rope.kind not in self.ropes:
            self.ropes.append(rope.kind)
        self.program.rope(x, rope.n_rotated, rope.pairs, self.ropes.index(rope.kind))

    def l2_norm(self, x: Tensor, eps: float, scale: float = 1.0) -> None:
        """Add L2 norm over the last dim, in place, times a scale."""
        self.program.norm(x, x, torch.full(x.shape[-1:], scale), factor=1.0, eps=eps)

    def new_states(self, layer: int, conv: tuple[int, int], recurrent: tuple[int, ...] = ()) -> tuple[int, int]:
        """Reserve a layer's convolution state `[B, kernel, channels]` and recurrent state; give their indices.

        Without a shape there is no recurrent state, and its index means nothing.
        """
        first = sum(1 + bool(shape) for _, shape in self.state_shapes)
        self.state_layers.append(layer)
        self.state_shapes.append((conv, recurrent))
        return first, first + 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        """Store k and v, and attend."""
        self.calls.append(AttentionCall(layer, len(self.program), q, k, v, out, scale))
        self.program.attend(q, k, v, out, scale)
