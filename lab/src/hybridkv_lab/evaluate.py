"""Run candidates over the same tokens as a reference, side by side, and keep what they differ by.

All caches are alive at once and see the text chunk by chunk: the reference's logits of a chunk are compared with every
candidate's and dropped, so that memory is bounded at any vocabulary and length, no logits are written anywhere, and an
interrupted run has the same tokens of all. `prefill` gives a chunk at once, `decode` token by token, as generation
does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hybridkv.cache import AttentionFacts
from hybridkv.engine.caches import new_cache
from hybridkv.errors import GuardError
from hybridkv.model.protocols import LanguageModel
from hybridkv.policy import Guard
from hybridkv.runtime import ModelCache, Step
from hybridkv_lab.candidates import Candidate
from hybridkv_lab.measure import Expected, Trace

Mode = Literal["prefill", "decode"]
MODES: tuple[Mode, ...] = ("prefill", "decode")

PIECE = 512
"""Most tokens of a chunk."""

LOGITS_BYTES = 64 << 20  # of a chunk, float32: fewer tokens where the vocabulary is large
_LAYER_TOKENS = 1024  # over which the layers' errors are measured


@dataclass(slots=True)
class Speed:
    """Tokens and seconds of one kind of work."""

    n_tokens: int = 0
    seconds: float = 0.0

    @property
    def tok_s(self) -> float | None:
        """Tokens per second, or None if none were run."""
        return self.n_tokens / self.seconds if self.n_tokens else None


@dataclass(slots=True)
class Speeds:
    """Of one candidate."""

    prefill: Speed = field(default_factory=Speed)
    decode: Speed = field(default_factory=Speed)


class Evaluator:
    """Runs candidates of one model.

    Parameters
    ----------
    model, step
        A model and what runs it.
    facts
        Its KV layers.
    n_ctx
        Tokens of a window.
    """

    def __init__(self, model: LanguageModel, step: Step, facts: Sequence[AttentionFacts], n_ctx: int) -> None:
        self._model = model
        self._step = step
        self.facts = facts
        self._n_ctx = n_ctx
        self._device = model.device.type
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.piece = max(1, min(PIECE, LOGITS_BYTES // (4 * vocabulary)))
        self.speeds: dict[str, Speeds] = {}

    def cache(self, candidate: Candidate, guard: Guard | None = None) -> ModelCache:
        """Build an empty cache; nothing is watched unless a guard is given."""
        specs = candidate.policy.resolve(self.facts)
        guard = Guard(mode="off") if guard is None else guard
        return new_cache(self._model, specs, n_ctx=self._n_ctx, guard=guard)

    def run(self, window: Tensor, candidates: Sequence[Candidate], mode: Mode) -> Iterator[dict[str, Trace]]:
        """Process a window, int64 `[n_ctx + 1]`, chunk by chunk; yields each candidate's trace of a chunk.

        The first candidate is the reference.
        """
        caches = [self.cache(candidate) for candidate in candidates]
        self._warm_up(window, candidates[0])
        for first in range(0, len(window) - 1, self.piece):
            tokens = window[first : min(first + self.piece, len(window) - 1)].unsqueeze(0)
            following = window[first + 1 : first + 1 + tokens.shape[1]]
            expected: Expected | None = None
            traces = {}
            for candidate, cache in zip(candidates, caches, strict=True):
                logits = self._logits(candidate, cache, tokens, first, mode)
                expected = Expected(logits, following, first) if expected is None else expected
                traces[candidate.label] = expected.compare(logits)
            yield traces

    @torch.inference_mode()
    def _warm_up(self, window: Tensor, candidate: Candidate) -> None:
        """Run a chunk as warm-up, so that the first candidate's speed is not that of cold buffers."""
        if not self.speeds:
            self._step.logits(window[:-1][: self.piece].unsqueeze(0), self.cache(candidate), 0)

    @torch.inference_mode()
    def _logits(self, candidate: Candidate, cache: ModelCache, tokens: Tensor, position: int, mode: Mode) -> Tensor:
        """Compute the logits after each token, float32 `[T, V]`, on the CPU."""
        speeds = self.speeds.setdefault(candidate.label, Speeds())
        start = time.perf_counter()
        if candidate.role == "floor":
            logits = self._otherwise(cache, tokens, position, mode)
        elif mode == "prefill":
            logits = self._step.logits(tokens, cache, position)
        else:
            logits = self._one_by_one(cache, tokens, position)
        speed = speeds.prefill if mode == "prefill" else speeds.decode
        if candidate.role != "floor":
            speed.n_tokens += tokens.shape[1]
            speed.seconds += time.perf_counter() - start
        return logits[0].float().cpu()

    def _one_by_one(self, cache: ModelCache, tokens: Tensor, position: int) -> Tensor:
        steps = [
            self._step.forward(token, cache, position + i) for i, token in enumerate(torch.split(tokens, 1, dim=1))
        ]
        return torch.stack(steps, dim=1)

    def _otherwise(self, cache: ModelCache, tokens: Tensor, position: int, mode: Mode) -> Tensor:
        """Compute the same logits by other kernels or in other chunks: what differs is the arithmetic alone."""
        if mode == "decode":
            return self._step.logits(tokens, cache, position)
        parts = []
        for part in torch.split(tokens, max(1, tokens.shape[1] // 3), dim=1):
            parts.append(self._step.logits(part, cache, position))
            position += part.shape[1]
        return torch.cat(parts, dim=1)

    @torch.inference_mode()
    def greedy(self, candidate: Candidate, prompt: Tensor, n_tokens: int) -> list[int]:
        """Generate the likeliest tokens after a prompt, int64 `[T]`, each fed back; fewer if logits are not finite."""
        cache = self.cache(candidate)
        speeds = self.speeds.setdefault(candidate.label, Speeds())
        start = time.perf_counter()
        logits = self._step.forward(prompt.unsqueeze(0), cache, 0)
        middle = time.perf_counter()
        found: list[int] = []
        for position in range(len(prompt), len(prompt) + n_tokens):
            if not torch.isfinite(logits).all():
                break
            found.append(int(logits.argmax()))
            logits = self._step.forward(torch.tensor([found[-1:]]), cache, position)
        _count(speeds.prefill, len(prompt), middle - start)
        _count(speeds.decode, len(found), time.perf_counter() - middle)
        return found

    @torch.inference_mode()
    def layer_errors(self, candidate: Candidate, window: Tensor) -> dict[int, float]:
        """Measure each layer's relative RMSE of attention output against float attention on the same activations.

        Measured by the guard's own means on the first tokens of a window; infinite for a layer whose output is not
        finite, and then the layers behind it are not measured.
        """
        cache = self.cache(candidate, Guard(mode="strict", limit=math.inf))
        try:
            position = 0
            for tokens in torch.split(window[: min(_LAYER_TOKENS, len(window) - 1)], PIECE):
                self._step.forward(tokens.unsqueeze(0), cache, position)
                position += len(tokens)
        except GuardError:
            return {**cache.errors}
        return cache.errors


def _count(speed: Speed, n_tokens: int, seconds: float) -> None:
    speed.n_tokens += n_tokens
    speed.seconds += seconds


def agreement(reference: Sequence[int], found: Sequence[int]) -> tuple[float, int]:
    """Measure the part of a trajectory before the first difference, and where that is (its length if there is none)."""
    same = next((i for i, (a, b) in enumerate(zip(reference, found, strict=False)) if a != b), len(found))
    return (same / len(reference) if reference else 1.0), same
