"""Score labels as continuations of prompts: token ids in, log-likelihoods out.

Owns what is computed once: the tokens that all prompts begin with are processed once, in a cache that is copied for
each batch; a prompt's own tokens once for all its labels; what several labels begin with once for them all.
The prompts of a batch are equally long, so nothing is padded and nothing masked. Knows no text;
`hybridkv.cli.classify` turns rows into tokens.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from hybridkv.cache import KVSpec
from hybridkv.engine.caches import new_cache
from hybridkv.engine.ladder import labels_of, raised_specs
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import ContextError, UsageError
from hybridkv.model.protocols import LanguageModel
from hybridkv.policy import Guard, NonFiniteError
from hybridkv.runtime import ModelCache, Step, is_finite

Ids = Sequence[int]
T = TypeVar("T")


@dataclass(slots=True)
class Figures:
    """The cost of scoring.

    Attributes
    ----------
    n_rows
        Prompts scored.
    n_shared
        Tokens that all prompts begin with, processed once.
    n_processed
        Tokens that the model ran over, those of every sequence counted.
    kv_bytes, state_bytes
        Most that was held at once.
    seconds
        Wall time.
    n_rebuilds
        Times that the types were raised because values were not finite.
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
class Node:
    """A run of tokens that labels go through together, in a tree of what is processed of them.

    Attributes
    ----------
    tokens
        The run; empty at the root, which is the end of the prompt.
    ends
        `(label, offset, token)`: a label's next token, whose probability the logits after the run's token of that
        offset give. A label's last token is scored and never processed.
    children
        Where labels part, or the run is as long as it may be.
    """

    tokens: tuple[int, ...]
    ends: tuple[tuple[int, int, int], ...]
    children: tuple[Node, ...]

    @property
    def height(self) -> int:
        """Tokens that are processed from here to the end of the longest label."""
        return len(self.tokens) + max((child.height for child in self.children), default=0)


def label_tree(labels: Sequence[Ids], longest_run: int) -> Node:
    """Build the labels' tree, in runs of at most `longest_run` tokens."""

    def grow(among: dict[int, Ids], depth: int, tokens: tuple[int, ...], longest: int) -> Node:
        ends: list[tuple[int, int, int]] = []
        for offset in itertools.count():
            ends += [(label, offset, ids[depth]) for label, ids in among.items()]
            parts: dict[int, dict[int, Ids]] = {}
            for label, ids in among.items():
                if len(ids) > depth + 1:
                    parts.setdefault(ids[depth], {})[label] = ids
            depth += 1
            if len(parts) != 1 or len(tokens) >= longest:
                break
            [(token, among)] = parts.items()
            tokens += (token,)
        children = (grow(part, depth, (token,), longest_run) for token, part in parts.items())
        return Node(tokens, tuple(ends), tuple(children))

    return grow(dict(enumerate(labels)), 0, (), 0)


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
        Prompts processed side by side; labels that are several tokens long then take a sequence each.
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
        model: LanguageModel,
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
            raise UsageError("every label must tokenize to at least one token, and no two labels to the same tokens")
        self._model = model
        self.step = resolve_step(model.config, model.device.type)(model) if step is None else step
        self._root = label_tree(labels, max(map(len, labels)) if self.step.takes_chunks else 1)
        self._n_labels = len(labels)
        self._n_ctx, self._batch, self._guard, self._notify = n_ctx, batch, guard, notify
        self._device = model.device
        self._start: ModelCache | None = None
        self.specs = tuple(specs)
        self.figures = Figures()

    @torch.inference_mode()
    def score(self, prompts: Sequence[Ids]) -> Tensor:
        """Sum the log probabilities of each label's tokens after each prompt.

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
            If no type of the ladder gives finite values, or the mode forbids a fallback.
        """
        self._check(prompts)
        start = time.perf_counter()
        n_shared = shared_length(prompts) if self.step.takes_chunks else 0
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
        deepest = self._root.height + 1
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
        self._run(self.step.forward, torch.tensor([list(prompt)]), 0, cache)
        self.specs = cache.specs

    def _score(self, texts: Tensor, n_shared: int) -> Tensor:
        """Return log-likelihoods float32 `[B, labels]` after equally long prompts, int64 `[B, T]`."""
        n_rows, position = texts.shape
        start = self._shared(texts[:1, :n_shared])
        cache = start.copy(n_ctx=position + self._root.height)
        cache.batch_repeat_interleave(n_rows)
        logits = self._run(self.step.forward, texts[:, n_shared:], n_shared, start, cache)
        scores = torch.zeros(n_rows, self._n_labels)
        _add_ends(scores, self._root, logits.unsqueeze(1))
        self._descend(scores, self._root, position, start, cache)
        return scores

    def _descend(self, scores: Tensor, node: Node, position: int, *caches: ModelCache) -> None:
        """Add what the labels below a node score; the last cache is at the node, one sequence a row, and is used up."""
        n_rows, n_ctx = len(scores), position + node.height - len(node.tokens)
        groups = [list(group) for _, group in itertools.groupby(sorted(node.children, key=_length), key=_length)]
        for children in groups:
            last = children is groups[-1]
            held = caches if last else (*caches, caches[-1].copy(n_ctx=n_ctx))
            if len(children) > 1:
                held[-1].batch_repeat_interleave(len(children))
            tokens = torch.tensor([child.tokens for child in children]).repeat(n_rows, 1)
            logits = self._run(self.step.logits, tokens, position, *held)
            logits = logits.view(n_rows, len(children), *logits.shape[1:])
            for index, child in enumerate(children):
                _add_ends(scores, child, logits[:, index])
                if child.children:
                    below = held[-1].copy(n_ctx=n_ctx)
                    below.batch_select_indices(torch.arange(n_rows) * len(children) + index)
                    self._descend(scores, child, position + len(child.tokens), *held, below)

    def _shared(self, tokens: Tensor) -> ModelCache:
        """Process once what all prompts begin with, int64 `[1, T]`; the cache is copied, never continued."""
        if self._start is None:
            # A fallback would change the layers of some batches and not of others: measured once, then only watched.
            watching = replace(self._guard, mode="warn") if self._guard.measures else self._guard
            start = self._cache(watching, tokens.shape[1])
            if tokens.shape[1]:
                self._run(self.step.forward, tokens, 0, start)
            self._start = start
        return self._start

    def _cache(self, guard: Guard, n_ctx: int) -> ModelCache:
        return new_cache(self._model, self.specs, n_ctx=n_ctx, guard=guard, notify=self._notify)

    def _run(
        self, run: Callable[[Tensor, ModelCache, int], Tensor], tokens: Tensor, position: int, *caches: ModelCache
    ) -> Tensor:
        """Run the step over `tokens` `[B, T]` after the last of the caches that are held now.

        Raises
        ------
        NonFiniteError
            From the layer where it arose, or for the logits.
        """
        figures, cache = self.figures, caches[-1]
        figures.n_processed += tokens.numel()
        logits = run(tokens, cache, position)
        figures.kv_bytes = max(figures.kv_bytes, sum(held.kv_bytes for held in caches))
        figures.state_bytes = max(figures.state_bytes, sum(held.state_bytes for held in caches))
        if not is_finite(logits):
            label, kernel = ("none", "none")
            if cache.kv_layers:
                label, kernel = cache.kv_layers[0].types.label, cache.kv_layers[0].kernels.label
            n_tokens = position + tokens.shape[1]
            raise NonFiniteError(layer=None, label=label, kernel=kernel, n_tokens=n_tokens, source="cache")
        return logits

    def _finite(self, run: Callable[[], T]) -> T:
        """Call `run`, again at the next types of the ladder while its values are not finite."""
        while True:
            try:
                return run()
            except NonFiniteError as error:
                self._climb(error)

    def _climb(self, error: NonFiniteError) -> None:
        raised = raised_specs(self.specs, self._guard, error)
        self._notify(f"{error.message}; going on at {labels_of(raised)}")
        self.specs, self._start = raised, None
        self.figures.n_rebuilds += 1


def _length(node: Node) -> int:
    return len(node.tokens)


def _add_ends(scores: Tensor, node: Node, logits: Tensor) -> None:
    """Add the log probabilities of a node's ends, from the logits after its tokens, float32 `[B, T, V]`."""
    labels, offsets, tokens = (list(column) for column in zip(*node.ends, strict=True))
    added = logits[:, offsets, tokens] - logits.logsumexp(-1)[:, offsets]
    scores.index_add_(1, torch.tensor(labels), added.cpu())  # a label may be there more than once


def shared_length(prompts: Sequence[Ids]) -> int:
    """Count the tokens that all prompts begin with, at least one short of each prompt: its last logits are needed."""
    first, last = min(prompts, key=tuple), max(prompts, key=tuple)  # in order, so all others lie between them
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def batches(prompts: Sequence[Ids], most: int) -> Iterator[tuple[int, ...]]:
    """Yield indices of equally long prompts, at most `most` at once, the shortest first."""
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for _, group in itertools.groupby(by_length, key=lambda row: len(prompts[row])):
        rows = list(group)
        for begin in range(0, len(rows), most):
            yield tuple(rows[begin : begin + most])
