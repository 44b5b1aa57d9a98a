"""Embeddings of texts: the last layer's output, pooled as the model's file says.

Transformers' own class runs the whole text at once: nothing is generated, and so nothing is cached.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridkv.engine.requests import Event, Request, RequestHandle, SchedulerStats
from hybridkv.errors import SessionError, UsageError
from hybridkv.gguf.pooling import Pooling

_WHAT = "this is an embedding model: it generates no text"


class Embedder:
    """Makes embeddings.

    Parameters
    ----------
    model
        Of Transformers, with a head for the next token that is not run.
    pooling
        What becomes of a text's states: their mean, the first or the last.
    n_ctx
        Tokens of a text at most.

    Attributes
    ----------
    n_embd
        Numbers of an embedding.
    """

    def __init__(self, model: Any, pooling: Pooling, n_ctx: int) -> None:
        self._base, self.pooling, self.n_ctx = model.base_model, pooling, n_ctx
        self.n_embd = int(model.config.get_text_config(decoder=True).hidden_size)

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embed a text: float32 `[n_embd]`, of length 1.

        Raises
        ------
        UsageError
            For a text without tokens, or with too many.
        """
        if not 0 < len(ids) <= self.n_ctx:
            raise UsageError(f"a text of {len(ids)} tokens; allowed: 1 to {self.n_ctx}", hint="a larger -c allows more")
        device = next(self._base.parameters()).device
        states = self._base(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state[0].float()
        pooled = {"mean": lambda: states.mean(0), "cls": lambda: states[0], "last": lambda: states[-1]}[self.pooling]()
        return torch.nn.functional.normalize(pooled, dim=0).cpu()


class NoScheduler:
    """In a scheduler's place where nothing is generated."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    def run_forever(self) -> None:
        """Wait for the end."""
        self._ended.wait()

    def shutdown(self, *, drain: bool) -> None:  # noqa: ARG002
        """End."""
        self._ended.set()

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> RequestHandle:  # noqa: ARG002
        """Refuse: there is nothing that generates."""
        raise UsageError(_WHAT)

    def save(self, handle: RequestHandle, path: Path) -> int:  # noqa: ARG002
        """Refuse."""
        raise SessionError(_WHAT)

    def restore(self, path: Path) -> tuple[int, ...]:  # noqa: ARG002
        """Refuse."""
        raise SessionError(_WHAT)

    def stats(self) -> SchedulerStats:
        """Return zeros: there is no scheduler."""
        numbers = dict.fromkeys(SchedulerStats.__dataclass_fields__, 0)
        return SchedulerStats(**{**numbers, "budget_bytes": None, "step_s": ()})  # type: ignore[arg-type]
