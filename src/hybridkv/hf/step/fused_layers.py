"""A model's layers as functions of rows, whoever wrote them down, and the step that runs them.

A family's file (`fused_qwen3_5.py`) and the native lowering for CUDA give the functions; `fused.py` chooses a family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridkv.hf.states import StateLayer
from hybridkv.kernels import AttentionParams
from hybridkv.runtime import ModelCache, StepResult, one_by_one
from hybridkv.runtime.attend import attend_new

PROMPT_ROWS = 1024
"""Tokens of all sequences in one step; more go in several. Bounds the activations' memory."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step over T tokens of B sequences, whose rows are `[B * T, ...]`, sequence after sequence.

    Attributes
    ----------
    cache
        Continued in place.
    n_seqs, n_tokens
        B and T.
    positions
        int64 `[B * T]` on the device.
    embedded
        The rows as they were embedded, for models whose layers read them.
    """

    cache: ModelCache
    n_seqs: int
    n_tokens: int
    positions: Tensor
    embedded: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store k and v `[N, Hkv, D]`, and attend q `[N, Hq, D]`: float32 or float16 `[N, Hq, Dv]`."""
        stored = self.cache.rows[layer]
        assert stored is not None
        q, k, v = (torch.unflatten(x, 0, (self.n_seqs, self.n_tokens)).transpose(1, 2) for x in (q, k, v))
        return attend_new(stored, q, k, v, AttentionParams(scale=scale)).transpose(1, 2).flatten(0, 1)

    def states(
        self, layer: int, conv: tuple[int, int], recurrent: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return convolution state `[B, channels, kernel]` and recurrent state of a layer, to continue in place."""
        stored = self.cache.states[layer]
        assert isinstance(stored, StateLayer)
        return stored.filled_states(self.n_seqs, conv, recurrent, like)

    def file_states(
        self, layer: int, conv: tuple[int, int], recurrent: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the same states with heads in the order of GGUF files; the first alone if `recurrent` is empty."""
        stored = self.cache.states[layer]
        assert stored is not None
        return stored.file_states(self.n_seqs, conv, recurrent, like)


Embed = Callable[[Tensor], Tensor]
Layers = Callable[[Tensor, StepContext], Tensor]
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class FusedFamily:
    """Models that one file writes down.

    Attributes
    ----------
    model_type
        Of the text config.
    rejects
        Why a model of this text config cannot be compiled, or None.
    build
        From a model to its layers (embedded rows `[N, hidden]` to hidden states), and its head (hidden states
        `[N, hidden]` to logits `[N, V]`).
    """

    model_type: str
    rejects: Callable[[Any], str | None]
    build: Callable[[Any], tuple[Layers, Head]]


class LayersStep:
    """Runs a model that was compiled to functions of rows.

    Parameters
    ----------
    embed
        From token ids `[N]` to rows `[N, hidden]`.
    layers, head
        As `FusedFamily.build` gives them.
    name
        Printed wherever the choice is shown.
    prompt_rows
        Tokens of all sequences in one step; `PROMPT_ROWS` if None.
    """

    takes_chunks = True
    makes_masks = False

    def __init__(
        self,
        embed: Embed,
        layers: Layers,
        head: Head,
        device: torch.device,
        name: str,
        prompt_rows: int | None = None,
    ) -> None:
        self._embed, self._layers, self._head = embed, layers, head
        self.device, self.name, self._prompt_rows = device, name, prompt_rows

    def forward(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence; see `Step.forward`."""
        for part in self._parts(tokens):
            hidden = self._prompt(part, cache, position)
            position += part.shape[1]
        return self._head(hidden[:, -1]).float()

    def forward_many(self, tokens: Tensor, caches: Sequence[ModelCache], positions: Sequence[int]) -> StepResult:
        """Run one sequence after the other; see `Step.forward_many`."""
        return one_by_one(self, tokens, caches, positions)

    def logits(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence; see `Step.logits`."""
        logits = []
        for part in self._parts(tokens):
            hidden = self._prompt(part, cache, position)
            position += part.shape[1]
            logits.append(torch.unflatten(self._head(hidden.flatten(0, 1)).float(), 0, part.shape))
        return torch.cat(logits, dim=1)

    def decode(self, tokens: Tensor, cache: ModelCache, positions: Tensor) -> Tensor:
        """Decode a token per sequence `[B, 1]` at int64 `positions` `[B, 1]`; logits `[B, V]` in the model's dtype."""
        return self._head(self._run(tokens, cache, positions))

    def _parts(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tokens.to(self.device), max(1, (self._prompt_rows or PROMPT_ROWS) // len(tokens)), dim=1)

    def _prompt(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Process a prompt; return hidden states `[B, T, hidden]`."""
        positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)
        return torch.unflatten(self._run(tokens, cache, positions.expand(tokens.shape)), 0, tokens.shape)

    def _run(self, tokens: Tensor, cache: ModelCache, positions: Tensor) -> Tensor:
        """Run all layers over `tokens` `[B, T]`; return hidden states `[B * T, hidden]`."""
        n_seqs, n_tokens = tokens.shape
        context = StepContext(cache, n_seqs, n_tokens, positions.flatten().contiguous())
        return self._layers(self._embed(tokens.flatten()), context)
