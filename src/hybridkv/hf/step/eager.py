"""The eager step: Transformers' own forward pass, for every model that it runs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridkv.hf import cache_argument
from hybridkv.hf.step.weights import types_held
from hybridkv.kernels.mapped import verify_maps
from hybridkv.model.facts import takes_chunks
from hybridkv.runtime import ModelCache, StepResult, one_by_one

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass; bounds the activations' memory."""


class EagerStep:
    """Calls the model.

    Parameters
    ----------
    model
        A Transformers causal language model, loaded with `attn_implementation="hybridkv"`.
    """

    makes_masks = True

    def __init__(self, model: Any) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        self._cache_argument = cache_argument(model)
        self._takes_positions = "position_ids" in parameters
        self.takes_chunks = takes_chunks(model.config)
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @property
    def name(self) -> str:
        """With the weights' types, if they are packed."""
        types = types_held(self._model)
        return f"eager, weights {types}" if types else "eager"

    def forward(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence; see `Step.forward`."""
        for chunk in self._chunks(tokens):
            logits = self._call(chunk, cache, position, self._last_only)
            position += chunk.shape[1]
        return logits[:, -1].float()

    def forward_many(self, tokens: Tensor, caches: Sequence[ModelCache], positions: Sequence[int]) -> StepResult:
        """Run one sequence after the other: Transformers' layers take one cache; see `Step.forward_many`."""
        return one_by_one(self, tokens, caches, positions)

    def logits(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence; see `Step.logits`."""
        parts = []
        for chunk in self._chunks(tokens):
            parts.append(self._call(chunk, cache, position, {}).float())
            position += chunk.shape[1]
        return torch.cat(parts, dim=1)

    def _chunks(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tokens, PREFILL_CHUNK if self.takes_chunks else tokens.shape[1], dim=1)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        found: torch.device = next(self._model.parameters()).device
        return found

    def decode(self, tokens: Tensor, cache: ModelCache, positions: Tensor) -> Tensor:
        """Decode a token per sequence `[B, 1]` at int64 `positions` `[B, 1]`; logits `[B, V]` in the model's dtype."""
        return self._model_logits(tokens, cache, positions, self._last_only)[:, -1]

    def _call(self, tokens: Tensor, cache: ModelCache, position: int, options: dict[str, Any]) -> Tensor:
        """Run one forward pass; the logits are in the model's dtype."""
        device = self.device
        positions = torch.arange(position, position + tokens.shape[1], device=device)
        return self._model_logits(tokens.to(device), cache, positions.expand(tokens.shape), options)

    def _model_logits(self, tokens: Tensor, cache: ModelCache, positions: Tensor, options: dict[str, Any]) -> Tensor:
        arguments = {**options, self._cache_argument: cache}
        if self._takes_positions:
            # Not every model counts the past itself: Bamba would start each call at position 0.
            arguments["position_ids"] = positions
        logits: Tensor = self._model(input_ids=tokens, use_cache=True, **arguments).logits
        verify_maps()
        return logits
