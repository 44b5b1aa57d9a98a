"""The fused step: a model's layers as torch's matrix products and Triton kernels, for prompts and for single tokens.

Transformers' own code takes some thirty launches for an attention layer and sixty for a gated delta net, and for a
prompt six more for every 64 tokens of it. A family's file writes the same down in ten. A model's class stays the
source of what is computed: the file reads its modules, and tests compare each result with theirs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridkv.hf.states import StateLayer
from hybridkv.kernels import AttentionParams
from hybridkv.runtime import Answers, ModelCache, one_by_one
from hybridkv.runtime.attend import attend_new

PROMPT_ROWS = 1024
"""Tokens of all sequences in one run; more go in several. Bounds the activations' memory."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run over T tokens of B sequences, whose rows are `[B * T, ...]`, sequence after sequence.

    Attributes
    ----------
    cache
        Continued in place.
    n_seqs, n_tokens
        B and T.
    positions
        int64 `[B * T]` on the device.
    """

    cache: ModelCache
    n_seqs: int
    n_tokens: int
    positions: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store k and v `[N, Hkv, D]`, and attend q `[N, Hq, D]`: float32 or float16 `[N, Hq, Dv]`."""
        stored = self.cache.rows[layer]
        assert stored is not None
        q, k, v = (torch.unflatten(x, 0, (self.n_seqs, self.n_tokens)).transpose(1, 2) for x in (q, k, v))
        return attend_new(stored, q, k, v, AttentionParams(scale=scale)).transpose(1, 2).flatten(0, 1)

    def states(
        self, layer: int, conv: tuple[int, int], recurrent: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Convolution state `[B, channels, kernel]` and recurrent state of a layer, to continue in place."""
        stored = self.cache.states[layer]
        assert isinstance(stored, StateLayer)
        return stored.filled_states(self.n_seqs, conv, recurrent, like)

    def file_states(
        self, layer: int, conv: tuple[int, int], recurrent: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same with heads in the order of GGUF files."""
        stored = self.cache.states[layer]
        assert stored is not None
        return stored.file_states(self.n_seqs, conv, recurrent, like)


Embed = Callable[[Tensor], Tensor]
Layers = Callable[[Tensor, Run], Tensor]
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


def families() -> dict[str, FusedFamily]:
    """The families by model type; imports their kernels."""
    from hybridkv.hf.step import fused_qwen3_5

    return {family.model_type: family for family in fused_qwen3_5.FAMILIES}


FAMILY_NAMES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
"""What `families` gives, known without triton."""


def rejects_device(device: str) -> str | None:
    """Explain why the fused step runs no model on this type of device; None if it runs some."""
    if device != "cuda":
        return f"runs on cuda, not on {device}"
    return "triton is not installed" if importlib.util.find_spec("triton") is None else None


def rejects(config: Any, device: str) -> str | None:
    """Explain why the fused step cannot run a model of this config on this type of device; None if it can."""
    if (missing := rejects_device(device)) is not None:
        return missing
    text = config.get_text_config(decoder=True)
    if text.model_type not in FAMILY_NAMES:
        return f"knows no {text.model_type} layers on cuda; it knows {', '.join(FAMILY_NAMES)}"
    return families()[text.model_type].rejects(text)


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
        Tokens of all sequences in one run; `PROMPT_ROWS` if None.
    """

    takes_chunks = True

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

    def forward_many(self, tokens: Tensor, caches: Sequence[ModelCache], positions: Sequence[int]) -> Answers:
        """One sequence after the other; see `Step.forward_many`."""
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
        """One token per sequence `[B, 1]` at int64 `positions` `[B, 1]`; the logits `[B, V]` in the model's dtype."""
        return self._head(self._run(tokens, cache, positions))

    def _parts(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tokens.to(self.device), max(1, (self._prompt_rows or PROMPT_ROWS) // len(tokens)), dim=1)

    def _prompt(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Hidden states `[B, T, hidden]`."""
        positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)
        return torch.unflatten(self._run(tokens, cache, positions.expand(tokens.shape)), 0, tokens.shape)

    def _run(self, tokens: Tensor, cache: ModelCache, positions: Tensor) -> Tensor:
        """All layers over `tokens` `[B, T]`; hidden states `[B * T, hidden]`."""
        n_seqs, n_tokens = tokens.shape
        run = Run(cache, n_seqs, n_tokens, positions.flatten().contiguous())
        return self._layers(self._embed(tokens.flatten()), run)


class FusedStep(LayersStep):
    """Runs a model's layers as fused kernels; `rejects` must have said None.

    Parameters
    ----------
    model
        A Transformers causal language model.
    """

    def __init__(self, model: Any) -> None:
        embedding = model.get_input_embeddings()
        layers, head = families()[model.config.get_text_config(decoder=True).model_type].build(model)
        super().__init__(embedding, layers, head, embedding.weight.device, "native-triton")
