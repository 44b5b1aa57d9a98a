"""Guesses from a small model of the same vocabulary.

Owns that model's cache of one sequence: it reads what the text has become, guesses its likeliest tokens one by one, and
goes back to the text. What it guesses need not be exact, only cheap: wrong guesses cost time and never change the text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from hybridkv.cache import KVTypes, LayerFacts
from hybridkv.engine.caches import new_cache
from hybridkv.engine.drafts import GoesOn, Guess
from hybridkv.engine.pace import moved
from hybridkv.errors import ModelError
from hybridkv.model import kv_facts, layer_facts, vocab_size_of
from hybridkv.planner import plan
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import Step

_CAUGHT_UP = 64
"""New tokens of a text that are read along with guesses; more are a prompt, or what came in a pause."""


_TYPES = KVTypes("f16", "f16")


def sequence_bytes(facts: tuple[LayerFacts, ...], n_ctx: int) -> int:
    """Count what a draft model of these layers takes for a sequence: its cache, and states to go back to."""
    planned = plan(Policy(_TYPES).resolve(kv_facts(facts)), facts, n_ctx=n_ctx)
    return planned.total_bytes + planned.state_bytes


class DraftModel:
    """A loaded model that guesses for another.

    Parameters
    ----------
    model, step
        What runs, and what runs it.
    n_ctx
        Tokens of a sequence at most.

    Raises
    ------
    ModelError
        For a model whose windows let rows go: it could not go back.
    """

    def __init__(self, model: Any, step: Step, *, n_ctx: int) -> None:
        self.model, self.step, self._n_ctx = model, step, n_ctx
        facts = kv_facts(layer_facts(model.config))
        if any(layer.window is not None for layer in facts) or not step.takes_chunks:
            raise ModelError(
                "the draft model cannot go back over its guesses: it has a sliding window, or takes prompts whole",
                hint="give another draft model with -md, or --spec ngram",
            )
        self._specs = Policy(_TYPES).resolve(facts)
        self.seconds_each = 0.0

    @property
    def sequence_bytes(self) -> int:
        """Bytes that guessing for a sequence takes beside the weights."""
        return sequence_bytes(layer_facts(self.model.config), self._n_ctx)

    def check_vocabulary(self, own: Any | None, other_model: Any, other: Any | None) -> None:
        """Refuse a draft model of another vocabulary.

        Parameters
        ----------
        own, other
            Tokenizers of the draft model and of the model that it guesses for.

        Raises
        ------
        ModelError
            Saying in what they differ.
        """
        mine, theirs = vocab_size_of(self.model.config), vocab_size_of(other_model.config)
        problem = None if mine == theirs else f"{mine} tokens, not {theirs}"
        if problem is None and own is not None and other is not None:
            words, others = (t.backend_tokenizer.get_vocab(with_added_tokens=True) for t in (own, other))
            changed = sorted(word for word, token in words.items() if others.get(word) != token)
            problem = f"other ids of {len(changed)} tokens, {changed[0]!r} among them" if changed else None
        if problem is not None:
            raise ModelError(
                f"the draft model has another vocabulary: {problem}", hint="take a smaller model of the same family"
            )

    def guesser(self) -> DraftGuesser:
        """Begin a sequence."""
        guard = Guard(mode="off")
        cache = new_cache(self.model, self._specs, n_ctx=self._n_ctx, guard=guard, notify=lambda _: None)
        return DraftGuesser(self, cache)


class DraftGuesser:
    """One sequence's guesses by a draft model."""

    name = "draft"
    plans = True

    def __init__(self, owner: DraftModel, cache: Any) -> None:
        self._owner, self._cache, self._n_held = owner, cache, 0

    @property
    def seconds_each(self) -> float:
        """What a guess takes, as measured."""
        return self._owner.seconds_each

    @torch.inference_mode()
    def guess(self, text: Sequence[int], n: int, goes_on: GoesOn | None = None) -> Guess:
        """Guess `n` tokens after the text, which only ever grows."""
        del goes_on  # their number was chosen before
        step, cache, start = self._owner.step, self._cache, time.perf_counter()
        n_new = len(text) - self._n_held
        new = torch.tensor([list(text[self._n_held :])])
        logits = step.forward(new, cache, self._n_held)
        self._n_held = len(text)
        held = [layer.stored() for layer in cache.stateful]
        guesses = [int(logits[0].argmax())]
        while len(guesses) < n:
            token = torch.tensor([[guesses[-1]]])
            guesses.append(int(step.forward(token, cache, self._n_held + len(guesses) - 1)[0].argmax()))
        self._go_back(len(guesses) - 1, held)
        if n_new <= _CAUGHT_UP:
            self._note((time.perf_counter() - start) / n)
        return Guess(guesses, [0] * n)

    def _go_back(self, n_tokens: int, states: Sequence[Any]) -> None:
        """Forget the guesses."""
        if not n_tokens:
            return
        for layer in self._cache.kv_layers:
            layer.crop(n_tokens)
        for layer, own in zip(self._cache.stateful, states, strict=True):
            layer.load(own)

    def _note(self, seconds: float) -> None:
        known = self._owner.seconds_each
        self._owner.seconds_each = moved(known, seconds) if known else seconds
