"""One evaluation from start to end: windows, greedy trajectories, layers' errors, and what they come to.

`hybridkv eval` calls it; `hybridkv tune` asks the same of many candidates. Ctrl-C ends it early and loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from hybridkv.cache import AttentionFacts
from hybridkv.options import COMMON
from hybridkv.policy.labels import rotation
from hybridkv_lab import measure
from hybridkv_lab.candidates import Candidate
from hybridkv_lab.corpus import Corpus
from hybridkv_lab.evaluate import PIECE, Evaluator, Mode, Speeds, agreement
from hybridkv_lab.journal import Journal
from hybridkv_lab.measure import Trace
from hybridkv_lab.results import Result

N_PROMPTS = 4
"""Greedy trajectories start after this many prompts, evenly spaced in the first window."""

Tick = Callable[[int], None]


@dataclass(slots=True)
class Extras:
    """The measurements of a candidate beside the windows."""

    greedy: tuple[float, float] | None = None
    layers: dict[int, float] = field(default_factory=dict)


class Evaluation:
    """An evaluation.

    Parameters
    ----------
    evaluator
        Runs candidates.
    corpus
        What they are run on.
    candidates
        The reference first.
    n_greedy
        Tokens of each greedy trajectory; 0 for none.
    journal
        Where traces are kept; what it holds already is not run again.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        corpus: Corpus,
        candidates: Sequence[Candidate],
        mode: Mode,
        journal: Journal,
        *,
        n_greedy: int = 0,
    ) -> None:
        self._evaluator = evaluator
        self._corpus = corpus
        self._candidates = candidates
        self._mode = mode
        self._journal = journal
        self._n_greedy = n_greedy
        self._extras = {candidate.label: Extras() for candidate in candidates}

    @property
    def n_ticks(self) -> int:
        """Tokens that `execute` will count, all candidates together."""
        extra = min(2 * PIECE, self._corpus.n_ctx) + N_PROMPTS * self._n_greedy
        return self.n_window_ticks + len(self._candidates) * extra

    @property
    def n_window_ticks(self) -> int:
        """Those that `windows` will count."""
        return sum(len(self._missing(i)) for i in range(len(self._corpus.windows))) * self._corpus.n_ctx

    def execute(self, tick: Tick) -> bool:
        """Run what is missing; False if it was interrupted. `tick` is told tokens as they are done."""
        try:
            self.windows(tick)
            self._greedy(tick)
            self._layers(tick, self._candidates)
        except KeyboardInterrupt:
            return False
        return True

    def windows(self, tick: Tick) -> None:
        """Run what is missing of the windows alone. An interrupted run leaves its results in the journal."""
        for index in range(len(self._corpus.windows)):
            self._window(index, tick)

    def extras(self, candidate: Candidate) -> Extras:
        """Measure the rest of a candidate, beside the reference."""
        self._greedy(lambda _: None)
        self._layers(lambda _: None, [candidate])
        return self._extras[candidate.label]

    def results(self, facts: Sequence[AttentionFacts], snippet: Callable[[int, int], str]) -> list[Result]:
        """Summarize what is known of each candidate; `snippet` gives the text at a window and position."""
        found = []
        for candidate in self._candidates:
            trace = self._journal.trace(candidate.label)
            if trace is not None:
                speeds = self._evaluator.speeds.get(candidate.label, Speeds())
                found.append(self._result(candidate, trace, speeds, facts, snippet))
        return found

    def _missing(self, index: int) -> list[Candidate]:
        """List the candidates without this window; if there are any, the reference is run beside them."""
        n_ctx = self._corpus.n_ctx
        missing = [c for c in self._candidates if not self._journal.holds(c.label, index, n_ctx)]
        reference = self._candidates[0]
        return missing if not missing or reference in missing else [reference, *missing]

    def _window(self, index: int, tick: Tick) -> None:
        candidates = self._missing(index)
        if not candidates:
            return
        pieces: list[dict[str, Trace]] = []
        try:
            for traces in self._evaluator.run(self._corpus.windows[index], candidates, self._mode):
                pieces.append(traces)
                tick(sum(trace.n for trace in traces.values()))
        finally:  # of an interrupted window, the chunks that all candidates have seen
            for candidate in candidates if pieces else ():
                trace = measure.join([piece[candidate.label] for piece in pieces])
                self._journal.put(candidate.label, index, trace)
            self._journal.save()

    def _greedy(self, tick: Tick) -> None:
        if not self._n_greedy:
            return
        window = self._corpus.windows[0]
        length = max(1, min(PIECE, len(window) // 2, self._corpus.n_ctx - self._n_greedy))
        starts = [i * (len(window) - length) // N_PROMPTS for i in range(N_PROMPTS)]
        expected: list[list[int]] = []
        for candidate in self._candidates:
            texts = []
            for start in starts:
                texts.append(self._evaluator.greedy(candidate, window[start : start + length], self._n_greedy))
                tick(self._n_greedy)
            expected = expected or texts
            same = [agreement(a, b) for a, b in zip(expected, texts, strict=True)]
            self._extras[candidate.label].greedy = (
                sum(part for part, _ in same) / len(same),
                sum(first for _, first in same) / len(same),
            )

    def _layers(self, tick: Tick, candidates: Sequence[Candidate]) -> None:
        for candidate in candidates:
            self._extras[candidate.label].layers = self._evaluator.layer_errors(candidate, self._corpus.windows[0])
            tick(min(2 * PIECE, self._corpus.n_ctx))

    def _result(
        self,
        candidate: Candidate,
        trace: Trace,
        speeds: Speeds,
        facts: Sequence[AttentionFacts],
        snippet: Callable[[int, int], str],
    ) -> Result:
        types, extras = candidate.policy.types, self._extras[candidate.label]
        specs = candidate.policy.resolve(facts)
        n_ctx = self._corpus.n_ctx
        per_token = sum(spec.bytes_per_token for spec in specs)
        values = sum(f.n_kv_heads * (f.head_dim_k + f.head_dim_v) for f in facts)
        worst = [(i, int(trace.position[i]), kld) for i, kld in measure.worst(trace)]
        return Result(
            label=candidate.label,
            type_k=types.type_k,
            type_v=types.type_v,
            rotate=rotation(specs[0].types),  # a type may ask for its rotation itself
            **{option.name: getattr(types, option.name) for option in COMMON},
            config=candidate.config,
            role=candidate.role,
            bytes_per_token=float(per_token),
            bits_per_value=8 * per_token / values if values else 0.0,
            kv_bytes=sum(spec.bytes_at(n_ctx) for spec in specs),
            **asdict(measure.summarize(trace)),
            greedy_agreement=None if extras.greedy is None else extras.greedy[0],
            greedy_first_divergence=None if extras.greedy is None else extras.greedy[1],
            prefill_tok_s=speeds.prefill.tok_s,
            decode_tok_s=speeds.decode.tok_s,
            positions=measure.by_position(trace, n_ctx),
            histogram=measure.histogram(trace),
            worst=tuple((position, kld, snippet(i // n_ctx, position)) for i, position, kld in worst),
            layers=tuple(sorted(extras.layers.items())),
        )
