"""What a step is, and how a family of models writes itself down as native operations.

Owns `Step`, the one interface that the engine calls, and `Builder`, in which a family's file reads like its model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridkv.hf.cache import ModelCache
from hybridkv.kernels.linear import PackedWeight
from hybridkv.kernels.step import StepProgram, Target
from hybridkv.policy import MismatchError, NonFiniteError

Fault = NonFiniteError | MismatchError
"""What a sequence can be rebuilt after, at larger types."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a step gives for sequences of separate caches.

    Attributes
    ----------
    logits
        float32 `[N, V]`; of a sequence that failed, whatever is there.
    failed
        Sequence -> what the guard found in the first of its layers that is not sound. Its cache is of no more use; the
        others are not touched by it.
    """

    logits: Tensor
    failed: dict[int, Fault]


class Step(Protocol):
    """One way to run a model over new tokens."""

    @property
    def name(self) -> str:
        """Printed wherever the choice is shown."""
        ...

    def forward(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence of the cache, which holds `position` tokens each.

        Parameters
        ----------
        tokens
            int64 `[B, T]`.

        Returns
        -------
        Tensor
            float32 `[B, V]`: the logits after the last token.
        """
        ...

    def forward_many(self, tokens: Tensor, caches: Sequence[ModelCache], positions: Sequence[int]) -> Answers:
        """Continue sequences of separate caches by one token each; every one as `forward` continues it alone.

        Parameters
        ----------
        tokens
            int64 `[N]`.
        caches, positions
            Of one sequence each; no cache twice.
        """
        ...

    def logits(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence as `forward` does; float32 `[B, T, V]`: the logits after every token."""
        ...


def one_by_one(step: Step, tokens: Tensor, caches: Sequence[ModelCache], positions: Sequence[int]) -> Answers:
    """`Step.forward_many` as so many calls of `Step.forward`."""
    logits: list[Tensor | None] = []
    failed: dict[int, Fault] = {}
    for index, (cache, position) in enumerate(zip(caches, positions, strict=True)):
        try:
            logits.append(step.forward(tokens[index].view(1, 1), cache, position))
        except (NonFiniteError, MismatchError) as error:
            logits.append(None)
            failed[index] = error
    width = max((part.shape[1] for part in logits if part is not None), default=0)
    rows = [torch.full((1, width), torch.nan) if part is None else part for part in logits]
    return Answers(torch.cat(rows), failed)


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
    """Writes a model's layers into a `StepProgram`.

    Parameters
    ----------
    rows
        Rows of every buffer.
    pack
        Gives a parameter as a packed weight, the same object each time.
    """

    def __init__(self, rows: int, pack: Callable[[Tensor], PackedWeight]) -> None:
        self.program = StepProgram()
        self.calls: list[AttentionCall] = []
        self.state_layers: list[int] = []
        self.state_shapes: list[tuple[tuple[int, int], tuple[int, ...]]] = []
        self.n_rows = rows
        self._pack = pack
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, width: int | None = None) -> Tensor:
        """The buffer of a name, float32 `[rows, width]`; layers share it. Without a width it must exist."""
        if width is not None and name not in self._buffers:
            # Poisoned, so that an operation that reads what none has written shows.
            self._buffers[name] = torch.full((self.n_rows, width), torch.nan)
        found = self._buffers[name]
        assert width is None or found.shape[1] == width, (name, found.shape, width)
        return found

    @staticmethod
    def heads(x: Tensor, n_heads: int) -> Tensor:
        """A buffer's columns `[rows, heads * D]` as `[rows, heads, D]`, without a copy."""
        return torch.unflatten(x, 1, (n_heads, -1))

    def linear(self, x: Tensor, *targets: tuple[Any, Tensor], add: bool = False) -> None:
        """`dst = module(x)` for linear modules that read the same x; `dst += module(x)` with `add`."""
        self.program.linear(x, *(Target(self._pack(module.weight), dst, add) for module, dst in targets))

    def rms_norm(self, x: Tensor, dst: Tensor, weight: Tensor, eps: float) -> None:
        """RMSNorm over the last dim."""
        self.program.norm(x, dst, weight, factor=1 / x.shape[-1], eps=eps)

    def l2_norm(self, x: Tensor, eps: float, scale: float = 1.0) -> None:
        """L2 norm over the last dim, in place, times a scale."""
        self.program.norm(x, x, torch.full(x.shape[-1:], scale), factor=1.0, eps=eps)

    def swiglu(self, mlp: Any, x: Tensor, dst: Tensor, width: int) -> None:
        """`dst += down(silu(gate(x)) * up(x))` for a module with these projections, `width` values wide in between."""
        gate, up = self.buffer("gate", width), self.buffer("up", width)
        self.linear(x, (mlp.gate_proj, gate), (mlp.up_proj, up))
        self.program.gate(up, gate, up, "silu")  # silu(gate) is gate times its sigmoid: up * silu(gate)
        self.linear(up, (mlp.down_proj, dst), add=True)

    def new_states(self, layer: int, conv: tuple[int, int], recurrent: tuple[int, ...]) -> tuple[int, int]:
        """Indices of a layer's convolution state `[B, kernel, channels]` and recurrent state, by their shapes."""
        self.state_layers.append(layer)
        self.state_shapes.append((conv, recurrent))
        return 2 * len(self.state_layers) - 2, 2 * len(self.state_layers) - 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        """Store k and v, and attend."""
        self.calls.append(AttentionCall(layer, len(self.program), q, k, v, out, scale))
        self.program.attend(q, k, v, out, scale)


Build = Callable[[Any, Builder], None]


@dataclass(frozen=True, slots=True)
class Family:
    """Models that one file writes down.

    Attributes
    ----------
    model_type
        Of the text config.
    rejects
        Why a model of this text config cannot be written down, or None.
    build
        Writes the layers: embedded tokens come in buffer `x`, hidden states are left there.
    build_head
        Writes what follows, for the tokens whose logits are asked for: from buffer `x` to buffer `logits`.
    """

    model_type: str
    rejects: Callable[[Any], str | None]
    build: Build
    build_head: Build
