"""An evaluation spread over a Ray cluster: each candidate is a task of its own, with the reference beside it.

A task holds a model and two caches, whatever the number of candidates. The reference is run again in every task: its
logits are far too large to be handed around (at 8192 tokens and 152 000 words, 5 GB a window). What a task finds is put
into the same journal as without Ray, so that either kind of run resumes from the other; figures are equal to the last
digit where the number of threads is.

Owns the tasks; `hybridkv_lab.cli.eval_ray` starts Ray and says how a task comes to its model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import ray

from hybridkv.errors import ModelError
from hybridkv_lab.candidates import Candidate
from hybridkv_lab.corpus import Corpus
from hybridkv_lab.evaluate import PIECE, Evaluator, Mode, Speeds
from hybridkv_lab.journal import Journal
from hybridkv_lab.measure import Trace
from hybridkv_lab.run import N_PROMPTS, Evaluation, Extras, Tick


class ModelLoader(Hashable, Protocol):
    """A task's way to its model; hashable, pickled, carried out where the task is."""

    def __call__(self) -> Evaluator:
        """Load the model."""


@dataclass(frozen=True, slots=True)
class Found:
    """A task's measurements of its candidate: traces by window, and the rest."""

    traces: dict[int, Trace]
    extras: Extras
    speeds: Speeds


class RayEvaluation(Evaluation):
    """An evaluation whose candidates are tasks.

    Parameters
    ----------
    loader
        Loads a task's model.
    resources
        What Ray reserves for a task: `num_cpus`, `num_gpus`.
    others
        As of `Evaluation`.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        corpus: Corpus,
        candidates: Sequence[Candidate],
        mode: Mode,
        journal: Journal,
        *,
        loader: ModelLoader,
        resources: dict[str, Any],
        n_greedy: int = 0,
    ) -> None:
        super().__init__(evaluator, corpus, candidates, mode, journal, n_greedy=n_greedy)
        self._loader, self._resources = loader, resources

    @property
    def n_ticks(self) -> int:
        """Tokens that `execute` will count: those of the candidates, the references beside them left out."""
        return sum(self._ticks(candidate) for candidate in self._candidates)

    def execute(self, tick: Tick) -> bool:
        """Run what is missing, as many tasks at once as the cluster holds; False if it was interrupted.

        Raises
        ------
        ModelError
            If a task fails.
        """
        start: Callable[..., Any] = ray.remote(**self._resources)(_measure).remote
        corpus = ray.put(self._corpus)
        running = {
            start(self._loader, corpus, self._beside(c), self._mode, self._lacks(c), self._n_greedy): c
            for c in self._candidates
        }
        try:
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                candidate = running.pop(done)
                n_ticks = self._ticks(candidate)
                self._take(candidate, ray.get(done))
                tick(n_ticks)
        except KeyboardInterrupt:
            return False
        except ray.exceptions.RayError as error:
            raise ModelError(f"the task of {candidate.label} failed: {error}") from error
        finally:
            for task in running:
                ray.cancel(task, force=True)
        return True

    def _beside(self, candidate: Candidate) -> tuple[Candidate, ...]:
        """Put a candidate behind the reference."""
        reference = self._candidates[0]
        return (reference,) if candidate is reference else (reference, candidate)

    def _lacks(self, candidate: Candidate) -> tuple[int, ...]:
        """List the windows that nobody has measured."""
        windows = range(len(self._corpus.windows))
        return tuple(i for i in windows if not self._journal.holds(candidate.label, i, self._corpus.n_ctx))

    def _ticks(self, candidate: Candidate) -> int:
        extra = min(2 * PIECE, self._corpus.n_ctx) + N_PROMPTS * self._n_greedy
        return len(self._lacks(candidate)) * self._corpus.n_ctx + extra

    def _take(self, candidate: Candidate, found: Found) -> None:
        for window, trace in found.traces.items():
            self._journal.put(candidate.label, window, trace)
        self._journal.save()
        self._extras[candidate.label] = found.extras
        self._evaluator.speeds[candidate.label] = found.speeds


def _measure(
    loader: ModelLoader,
    corpus: Corpus,
    candidates: Sequence[Candidate],
    mode: Mode,
    windows: Sequence[int],
    n_greedy: int,
) -> Found:
    """Run the task: what `Evaluation` does, of one candidate."""
    evaluator = _evaluator(loader)
    evaluator.speeds.clear()  # of the candidate that this process had before
    own = candidates[-1]
    journal = _Unwritten(own.label, windows)
    run = Evaluation(evaluator, corpus, candidates, mode, journal, n_greedy=n_greedy)
    run.windows(lambda _: None)
    return Found(journal.found, run.extras(own), evaluator.speeds.get(own.label, Speeds()))


@lru_cache(maxsize=1)
def _evaluator(loader: ModelLoader) -> Evaluator:
    """Load a model once per process: Ray's run one task after the other."""
    return loader()


class _Unwritten(Journal):
    """A task's journal: of one candidate, without a file, knowing which windows are to be run."""

    def __init__(self, label: str, wanted: Sequence[int]) -> None:
        super().__init__(Path("never-written.npz"), {})
        self.found: dict[int, Trace] = {}
        self._label, self._wanted = label, wanted

    def holds(self, label: str, window: int, n_tokens: int) -> bool:
        """Check whether a window need not be run: for the reference's own sake, none."""
        del n_tokens
        return label != self._label or window not in self._wanted

    def put(self, label: str, window: int, trace: Trace) -> None:
        """Keep the candidate's trace."""
        if label == self._label:
            self.found[window] = trace

    def save(self) -> None:
        """Do nothing: the run that started the task writes."""
