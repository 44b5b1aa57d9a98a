"""The eager step: Transformers' own forward pass, for every model that it runs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hybridkv.hf.cache import ModelCache
from hybridkv.hf.facts import takes_chunks
from hybridkv.hf.step.weights import packed_types

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass; bounds the activations' memory."""


class EagerStep:
    """Calls the model.

    Parameters
    ----------
    model
        A Transformers causal language model, loaded with `attn_implementation="hybridkv"`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        # Mamba's own classes call the same thing by another name.
        self._cache_argument = "past_key_values" if "past_key_values" in parameters else "cache_params"
        self._takes_positions = "position_ids" in parameters
        self._takes_chunks = takes_chunks(model.config)
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @property
    def name(self) -> str:
        """With the weights' types, if they are packed."""
        types = packed_types(self._model)
        return f"eager, weights {' + '.join(types)}" if types else "eager"

    def forward(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence; see `Step.forward`."""
        device = next(self._model.parameters()).device
        for chunk in torch.split(tokens, PREFILL_CHUNK if self._takes_chunks else tokens.shape[1], dim=1):
            arguments = {**self._last_only, self._cache_argument: cache}
            if self._takes_positions:
                # Not every model counts the past itself: Bamba would start each call at position 0.
                positions = torch.arange(position, position + chunk.shape[1], device=device)
                arguments["position_ids"] = positions.expand(chunk.shape)
            output = self._model(input_ids=chunk.to(device), use_cache=True, **arguments)
            position += chunk.shape[1]
        logits: Tensor = output.logits[:, -1].float()
        return logits
