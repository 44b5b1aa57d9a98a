"""Score labels as continuations of prompts: token ids in, log-likelihoods out.

Owns what is computed once: the tokens that all prompts begin with are processed once, in a cache that is copied for
each batch; a prompt's own tokens once for all its labels; the beginning that several labels share once for them all.
The prompts of a batch are equally long, so nothing is padded and nothing masked. Knows no text;
`hybridkv.cli.classify` turns rows into tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from hybridkv.cache import KVSpec
from hybridkv.errors import ContextError, GuardError, UsageError
from hybridkv.hf import ModelCache, Step, is_finite, resolve_step, takes_chunks
from hybridkv.policy import Guard, NonFiniteError, next_types

Ids = Sequence[int]
T = TypeVar("T")


@dataclass(slots=True)
class Figures:
    """What scoring took.

    Attributes
    ----------
    n_rows
        Prompts scored.
    n_shared
        Tokens that all prompts begin with, processed once.
    n_processed
        Tokens that the model ran over, those of every sequence counted.
    kv_bytes, state_bytes
        Largest cache of a batch.
    seconds
        Wall time.
    n_rebuilds
        Times that the types were raised because numbers were not finite.
    """

    n_rows: int = 0
    n_shared: int = 0
    n_processed: int = 0
    kv_bytes: int = 0
    state_bytes: int = 0
    seconds: float = 0.0
    n_rebuilds: int = 0

    @property
    def n_saved(self) -> int:
        """Prompt tokens that were not processed again."""
        return max(0, self.n_rows - 1) * self.n_shared

    @property
    def rows_s(self) -> float:
        """Rows per second."""
        return self.n_rows / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Level:
    """Labels at one depth, as a tree: a node is a beginning of labels, and nodes of one beginning have one parent.

    Attributes
    ----------
    parents, tokens
        Per node: the node above, and the token that leads from there; empty at the root.
    ends
        `(label, node, token)`: the label's next token, whose probability the node's logits give.
    """

    parents: tuple[int, ...]
    tokens: tuple[int, ...]
    ends: tuple[tuple[int, int, int], ...]


def label_levels(labels: Sequence[Ids]) -> tuple[Level, ...]:
    """The labels' tree. The last token of a label is scored and never processed, so it is no node."""
    levels: list[Level] = []
    parents: tuple[int, ...] = ()
    nodes: dict[tuple[int, ...], int] = {(): 0}
    for depth in range(max(map(len, labels))):
        ends = [(i, nodes[tuple(ids[:depth])], ids[depth]) for i, ids in enumerate(labels) if len(ids) > depth]
        levels.append(Level(parents, tuple(node[-1] for node in nodes if node), tuple(ends)))
        longer = dict.fromkeys(tuple(ids[: depth + 1]) for ids in labels if len(ids) > depth + 1)
        parents = tuple(nodes[node[:-1]] for node in longer)
        nodes = {node: index for index, node in enumerate(longer)}
    return tuple(levels)


class Classifier:
    """Scores the same labels after many prompts.

    Parameters
    ----------
    model
        A Transformers causal language model, loaded with `attn_implementation="hybridkv"`.
    specs
        How its KV layers are stored at first.
    labels
        Token ids of each label, as they follow a prompt.
    n_ctx
        Most tokens of a prompt and a label.
    batch
        Prompts processed side by side; labels of several tokens then take a sequence each.
    guard
        What is watched. What it measures, it measures on the longest prompt, before any is scored, so that all are
        stored alike.
    notify
        Where fallbacks and rebuilds are reported.
    step
        Runs the model over new tokens; the best that runs it by default.

    Raises
    ------
    UsageError
        For labels that have no tokens, or the same.
    """

    def __init__(
        self,
        model: Any,
        specs: Sequence[KVSpec],
        labels: Sequence[Ids],
        *,
        n_ctx: int,
        guard: Guard,
        notify: Callable[[str], None],
        batch: int = 8,
        step: Step | None = None,
    ) -> None:
        if not all(labels) or len({tuple(ids) for ids in labels}) < len(labels):
            raise UsageError("labels need tokens, and each other ones than the rest")
        self._model = model
        self._levels = label_levels(labels)
        self._n_labels = len(labels)
        self._n_ctx, self._batch, self._guard, self._notify = n_ctx, batch, guard, notify
        self._device = next(model.parameters()).device
        self._start: ModelCache | None = None
        self.step = resolve_step(model.config, self._device.type)(model) if step is None else step
        self.specs = tuple(specs)
        self.figures = Figures()

    @torch.inference_mode()
    def score(self, prompts: Sequence[Ids]) -> Tensor:
        """Sums of the log probabilities of each label's tokens after each prompt.

        Returns
        -------
        Tensor
            float32 `[prompts, labels]`, finite.

        Raises
        ------
        UsageError
            For no prompts, or one without tokens.
        ContextError
            For a prompt that does not fit, by its number from 1.
        GuardError
            If no type of the ladder gives finite numbers, or the mode forbids a fallback.
        """
        self._check(prompts)
        start = time.perf_counter()
        n_shared = shared_length(prompts) if takes_chunks(self._model.config) else 0
        self._start, self.figures = None, Figures(n_rows=len(prompts), n_shared=n_shared)
        if self._guard.measures:
            self._finite(partial(self._measure, max(prompts, key=len)))
        scores = torch.empty(len(prompts), self._n_labels)
        for rows in batches(prompts, self._batch):
            texts = torch.tensor([prompts[row] for row in rows])
            scores[list(rows)] = self._finite(partial(self._score, texts, n_shared))
        self.figures.seconds = time.perf_counter() - start
        return scores

    def _check(self, prompts: Sequence[Ids]) -> None:
        if not prompts:
            raise UsageError("there are no rows to score")
        deepest = len(self._levels)
        for number, prompt in enumerate(prompts, 1):
            if not prompt:
                raise UsageError(f"row {number} has no tokens", hint="give it a text, or the prompt words around it")
            if len(prompt) + deepest > self._n_ctx:
                raise ContextError(
                    f"row {number}: its prompt of {len(prompt)} tokens and a label of {deepest} do not fit a context "
                    f"of {self._n_ctx}",
                    hint=f"try -c {len(max(prompts, key=len)) + deepest}, or shorten the text",
                )

    def _measure(self, prompt: Ids) -> None:
        """Let the guard see a whole prompt; what it raises stays raised."""
        cache = self._cache(self._guard, len(prompt))
        self._forward(torch.tensor([list(prompt)]), cache, 0)
        self.specs = cache.specs

    def _score(self, texts: Tensor, n_shared: int) -> Tensor:
        """Log-likelihoods float32 `[B, labels]` after equally long prompts, int64 `[B, T]`."""
        n_rows, position = texts.shape
        cache = self._shared(texts[:1, :n_shared]).copy(n_ctx=position + len(self._levels) - 1)
        cache.batch_repeat_interleave(n_rows)
        logits = self._forward(texts[:, n_shared:], cache, n_shared)
        scores, n_nodes = torch.zeros(n_rows, self._n_labels), 1
        for level in self._levels:
            if level.tokens:
                if level.parents != tuple(range(n_nodes)):
                    rows = torch.arange(n_rows).unsqueeze(1) * n_nodes + torch.tensor(level.parents)
                    cache.batch_select_indices(rows.flatten())
                n_nodes = len(level.tokens)
                logits = self._forward(torch.tensor(level.tokens).repeat(n_rows).unsqueeze(1), cache, position)
                position += 1
            labels, nodes, tokens = (list(column) for column in zip(*level.ends, strict=True))
            after = logits.view(n_rows, n_nodes, -1)
            scores[:, labels] += (after[:, nodes, tokens] - after.logsumexp(-1)[:, nodes]).cpu()
        return scores

    def _shared(self, tokens: Tensor) -> ModelCache:
        """The cache after what all prompts begin with, int64 `[1, T]`; to be copied, never continued."""
        if self._start is None:
            # A fallback would change the layers of some batches and not of others: measured once, then only watched.
            watching = replace(self._guard, mode="warn") if self._guard.measures else self._guard
            start = self._cache(watching, tokens.shape[1])
            if tokens.shape[1]:
                self._forward(tokens, start, 0)
            self._start = start
        return self._start

    def _cache(self, guard: Guard, n_ctx: int) -> ModelCache:
        return ModelCache(
            self._model.config,
            self.specs,
            device=self._device.type,
            n_ctx=n_ctx,
            guard=guard,
            notify=self._notify,
        )

    def _forward(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Logits float32 `[B, V]` after `tokens` `[B, T]`.

        Raises
        ------
        NonFiniteError
            From the layer where it arose, or for the logits.
        """
        figures = self.figures
        figures.n_processed += tokens.numel()
        logits = self.step.forward(tokens, cache, position)
        figures.kv_bytes = max(figures.kv_bytes, cache.kv_bytes)
        figures.state_bytes = max(figures.state_bytes, cache.state_bytes)
        if not is_finite(logits):
            label, kernel = ("none", "none")
            if cache.kv_layers:
                label, kernel = cache.kv_layers[0].types.label, cache.kv_layers[0].kernels.label
            n_tokens = position + tokens.shape[1]
            raise NonFiniteError(layer=None, label=label, kernel=kernel, n_tokens=n_tokens, source="cache")
        return logits

    def _finite(self, run: Callable[[], T]) -> T:
        """What `run` gives, again at the next types of the ladder while its numbers are not finite."""
        while True:
            try:
                return run()
            except NonFiniteError as error:
                self._climb(error)

    def _climb(self, error: NonFiniteError) -> None:
        raised = tuple(replace(s, types=next_types(s.types) or s.types) for s in self.specs)
        if self._guard.mode in ("strict", "off") or raised == self.specs:
            why = "and no larger type is left" if raised == self.specs else f"and the guard is {self._guard.mode!r}"
            raise GuardError(f"{error.message}, {why}", hint=error.hint) from error
        self._notify(f"{error.message}; going on at {', '.join(dict.fromkeys(s.types.label for s in raised))}")
        self.specs, self._start = raised, None
        self.figures.n_rebuilds += 1


def shared_length(prompts: Sequence[Ids]) -> int:
    """Tokens that all prompts begin with, one less than the shortest has at most: its logits are needed."""
    first, last = min(prompts, key=tuple), max(prompts, key=tuple)  # in order, so all others lie between them
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def batches(prompts: Sequence[Ids], most: int) -> Iterator[tuple[int, ...]]:
    """Indices of equally long prompts, at most so many at once, the shortest first."""
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for _, group in groupby(by_length, key=lambda row: len(prompts[row])):
        rows = list(group)
        for begin in range(0, len(rows), most):
            yield tuple(rows[begin : begin + most])
