"""From sensitivities to a measured answer: choose, improve on the calibration tokens, verify on held-out ones.

Puts `lab.tune`'s search and `lab.sensitivity`'s meter together. The answer is types per layer only where they beat,
beyond two standard errors, every uniform pair of types that was measured beside them at no more bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hybridkv.cache import AttentionFacts, KVSpec
from hybridkv.errors import UsageError
from hybridkv.policy import KVConfig
from hybridkv.policy.labels import label
from hybridkv_lab.knapsack import Choice, Frontier, Picks, neighbours, tightened
from hybridkv_lab.measure import Summary, Trace, summarize
from hybridkv_lab.sensitivity import Meter, Pair, Sensitivities, Storage, mean_loss

GoalKind = Literal["bits", "memory", "kld"]

STANDARD_ERRORS = 2.0
"""By how many standard errors of the paired difference layers of their own must beat a uniform pair."""

N_UNIFORM = 3
"""Uniform pairs that are measured beside the solution: the best by prediction."""

_N_NEIGHBOURS = 8


@dataclass(frozen=True, slots=True)
class Goal:
    """The aim of a tuning.

    Attributes
    ----------
    kind
        `bits` per value of packed rows, `memory` in bytes of KV at `n_ctx` tokens, or mean divergence `kld` in nats.
    limit
        At most so much of it.
    n_ctx
        Tokens that bytes are counted at.
    """

    kind: GoalKind
    limit: float
    n_ctx: int

    def cost(self, spec: KVSpec) -> int:
        """Count a layer's cost: bytes per token for `bits`, else bytes at `n_ctx` tokens."""
        return spec.bytes_per_token if self.kind == "bits" else spec.bytes_at(self.n_ctx)

    def check(self, facts: Sequence[AttentionFacts], storage: Storage, types: Sequence[str]) -> None:
        """Refuse a limit that no combination of types is within, before anything is measured.

        Raises
        ------
        UsageError
            With what the smallest types need.
        """
        if self.kind == "kld":
            return
        pairs = [(k, v) for k in types for v in types]
        least = sum(min(self.cost(KVSpec(f, storage.types(*pair))) for pair in pairs) for f in facts)
        n_values = sum(f.n_kv_heads * (f.head_dim_k + f.head_dim_v) for f in facts)
        unit, asked = (8 / n_values, self.limit) if self.kind == "bits" else (1, int(self.limit))
        if least * unit > asked:
            what = "bits per value" if self.kind == "bits" else f"bytes at {self.n_ctx} tokens"
            need = f"{least * unit:.4g}" if self.kind == "bits" else str(least)
            raise UsageError(
                f"{asked} {what} is less than the smallest types need: {need}", hint="give more, or smaller --types"
            )


@dataclass(frozen=True, slots=True)
class Measured:
    """A configuration and what it does to held-out tokens.

    Attributes
    ----------
    label
        `q5_0/hq4_nl+kv` of a uniform pair, `per layer` of any other.
    pairs
        Types of K and V in each KV layer.
    bits, kv_bytes
        Bits per value of packed rows, and bytes of KV at the goal's context.
    predicted
        Divergence, if losses add up.
    trace
        Of the held-out tokens.
    """

    label: str
    pairs: tuple[Pair, ...]
    bits: float
    kv_bytes: int
    predicted: float
    trace: Trace

    @property
    def loss(self) -> float:
        """Mean divergence on held-out tokens, nats; infinite if any is not finite."""
        return mean_loss(self.trace)

    @property
    def summary(self) -> Summary:
        """All figures."""
        return summarize(self.trace)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a tuning.

    Attributes
    ----------
    chosen
        What to use: `tuned`, or `rival` if tuning gains nothing that can be told from chance.
    tuned
        The best found with layers of their own types.
    uniform
        Pairs for all layers, of at most the same bytes, least loss first.
    gain, gain_se
        Mean divergence of the best uniform pair less that of `tuned`, and its standard error; None if there is none of
        finite numbers, or if the best found is one.
    """

    chosen: Measured
    tuned: Measured
    uniform: tuple[Measured, ...]
    gain: float | None
    gain_se: float | None


class Tuner:
    """Finds types for a goal.

    Parameters
    ----------
    meter
        Measures.
    facts
        The model's KV layers.
    storage
        What holds for all layers.
    sensitivities
        What each type does to each layer.
    goal
        What is asked for.
    """

    def __init__(
        self, meter: Meter, facts: Sequence[AttentionFacts], storage: Storage, sensitivities: Sensitivities, goal: Goal
    ) -> None:
        self._meter = meter
        self._facts = facts
        self._storage = storage
        self._sensitivities = sensitivities
        self._goal = goal
        self._n_values = sum(f.n_kv_heads * (f.head_dim_k + f.head_dim_v) for f in facts)
        all_pairs = [(k, v) for k in sensitivities.types for v in sensitivities.types]
        self._pairs = [self._useful(i, all_pairs) for i in range(len(facts))]
        self._groups = [[self._choice(i, pair) for pair in pairs] for i, pairs in enumerate(self._pairs)]
        self._uniform = [tuple([pair] * len(facts)) for pair in all_pairs]

    def solve(self, *, n_rounds: int) -> Outcome:
        """Find the best configuration, and measure it beside uniform ones.

        Parameters
        ----------
        n_rounds
            At most so many times, neighbours of the best so far are measured on the calibration tokens.

        Raises
        ------
        UsageError
            If no combination of the types reaches the goal.
        """
        frontier = Frontier(self._groups)
        if self._goal.kind == "kld":
            tuned = self._smallest(frontier)
            budget = self._cost(tuned.pairs)
        else:
            budget = self._budget
            found = frontier.within_cost(budget)
            if found is None:  # types that gave no finite numbers are not among the choices
                raise UsageError("no types that give finite numbers are within the limit", hint="give more")
            (tuned,) = self._held_out([self._improved(found, budget, n_rounds)])
        if not math.isfinite(tuned.loss) and not self._ranked_uniform(budget):
            raise UsageError("the types found give non-finite values", hint="allow more, or add larger --types")
        rivals = [pairs for pairs in self._ranked_uniform(budget) if pairs != tuned.pairs][:N_UNIFORM]
        return _outcome(tuned, sorted(self._held_out(rivals), key=lambda m: m.loss), self._goal)

    def config(self, pairs: Sequence[Pair], name: str, model: str) -> KVConfig:
        """Build a configuration of this model."""
        return self._storage.config(name, model, self._facts, pairs)

    @property
    def _budget(self) -> int:
        """In the unit of `_cost`."""
        limit = self._goal.limit
        return int(limit * self._n_values / 8) if self._goal.kind == "bits" else int(limit)

    def _spec(self, layer: int, pair: Pair) -> KVSpec:
        return KVSpec(self._facts[layer], self._storage.types(*pair))

    def _choice(self, layer: int, pair: Pair) -> Choice:
        return Choice(self._goal.cost(self._spec(layer, pair)), self._sensitivities.loss(layer, pair))

    def _useful(self, layer: int, pairs: Sequence[Pair]) -> list[Pair]:
        """Select the pairs that no other beats in this layer."""
        kept, least = [], float("inf")
        choices = [(self._choice(layer, pair), pair) for pair in pairs]
        for choice, pair in sorted(choices, key=lambda c: (c[0].cost, c[0].loss)):
            if choice.loss < least:
                kept.append(pair)
                least = choice.loss
        if not kept:
            raise UsageError(
                f"no type gives finite numbers in layer {self._facts[layer].layer}", hint="add f16 to --types"
            )
        return kept

    def _cost(self, pairs: Sequence[Pair]) -> int:
        return sum(self._choice(i, pair).cost for i, pair in enumerate(pairs))

    def _named(self, picks: Picks) -> tuple[Pair, ...]:
        return tuple(self._pairs[layer][i] for layer, i in enumerate(picks))

    def _ranked_uniform(self, budget: int) -> list[tuple[Pair, ...]]:
        """Rank uniform pairs within a budget, the best by prediction first."""
        fits = [pairs for pairs in self._uniform if self._cost(pairs) <= budget]
        finite = [pairs for pairs in fits if math.isfinite(self._sensitivities.predicted(pairs))]
        return sorted(finite, key=self._sensitivities.predicted)

    def _improved(self, picks: Picks, budget: int, n_rounds: int) -> tuple[Pair, ...]:
        """Find the best on the calibration tokens among the first solution, the best uniform pairs, and neighbours."""
        start = [self._named(picks), *self._ranked_uniform(budget)[:N_UNIFORM]]
        losses = self._calibrated(start, "first solution and uniform pairs")
        best = min(losses, key=lambda pairs: losses[pairs])
        for number in range(n_rounds):
            here = self._picks(best)
            near = () if here is None else neighbours(self._groups, here, budget, len(losses) + _N_NEIGHBOURS)
            fresh = [pairs for pairs in map(self._named, near) if pairs not in losses][:_N_NEIGHBOURS]
            if not fresh:
                break
            losses |= self._calibrated(fresh, f"neighbours, round {number + 1}")
            better = min(losses, key=lambda pairs: losses[pairs])
            if better == best:
                break
            best = better
        return best

    def _picks(self, pairs: Sequence[Pair]) -> Picks | None:
        """Find the indices of pairs among the choices; None for a combination that has one which another beats."""
        if not all(pair in self._pairs[i] for i, pair in enumerate(pairs)):
            return None
        return tuple(self._pairs[i].index(pair) for i, pair in enumerate(pairs))

    def _smallest(self, frontier: Frontier) -> Measured:
        """Find the smallest whose measured divergence is within the limit."""
        limit = self._goal.limit
        asking = tightened(frontier, limit)
        within: list[Measured] = []
        measured = None
        picks = next(asking, None)
        while picks is not None:
            (measured,) = self._held_out([self._named(picks)])
            if measured.loss <= limit:
                within.append(measured)
            try:
                picks = asking.send(measured.loss)
            except StopIteration:
                break
        if not within:
            least = "" if measured is None else f"; the best measured has {measured.loss:.2e}"
            raise UsageError(
                f"no combination of these types stays within a mean KLD of {limit:g}{least}",
                hint="allow more, or add larger --types, up to f16",
            )
        return min(within, key=lambda m: m.kv_bytes)

    def _policies(self, configurations: Sequence[tuple[Pair, ...]]) -> dict[str, KVConfig]:
        return {_name(pairs): self.config(pairs, "tuning", "") for pairs in configurations}

    def _calibrated(self, configurations: Sequence[tuple[Pair, ...]], what: str) -> dict[tuple[Pair, ...], float]:
        losses = self._meter.losses("calibration", self._policies(configurations), what)
        return {pairs: losses[_name(pairs)] for pairs in configurations}

    def _held_out(self, configurations: Sequence[tuple[Pair, ...]]) -> list[Measured]:
        traces = self._meter.traces("held-out", self._policies(configurations), "held-out tokens")
        return [self._measured(pairs, traces) for pairs in configurations]

    def _measured(self, pairs: tuple[Pair, ...], traces: Mapping[str, Trace]) -> Measured:
        specs = [self._spec(i, pair) for i, pair in enumerate(pairs)]
        uniform = len(set(pairs)) == 1
        return Measured(
            label=label(specs[0].types) if uniform else "per layer",
            pairs=pairs,
            bits=8 * sum(spec.bytes_per_token for spec in specs) / self._n_values,
            kv_bytes=sum(spec.bytes_at(self._goal.n_ctx) for spec in specs),
            predicted=self._sensitivities.predicted(pairs),
            trace=traces[_name(pairs)],
        )


def _name(pairs: Sequence[Pair]) -> str:
    """Name a configuration for the journal."""
    if len(set(pairs)) == 1:
        return "/".join(pairs[0])
    return hashlib.sha256(repr(tuple(pairs)).encode()).hexdigest()[:16]


def _outcome(tuned: Measured, uniform: Sequence[Measured], goal: Goal) -> Outcome:
    """Choose between the solution and the best uniform pair."""
    if goal.kind == "kld":  # the smallest uniform pair that keeps the limit, if any does
        uniform = sorted(uniform, key=lambda m: (m.loss > goal.limit, m.kv_bytes, m.loss))
    if not uniform or not math.isfinite(uniform[0].loss) or len(set(tuned.pairs)) == 1:
        return Outcome(tuned, tuned, tuple(uniform), None, None)
    rival = uniform[0]
    if not math.isfinite(tuned.loss):
        return Outcome(rival, tuned, tuple(uniform), None, None)
    gain, error = paired(rival.trace, tuned.trace)
    if goal.kind == "kld":
        wins = rival.loss <= goal.limit and rival.kv_bytes <= tuned.kv_bytes
    else:
        wins = not gain > STANDARD_ERRORS * error
    return Outcome(rival if wins else tuned, tuned, tuple(uniform), gain, error)


def paired(worse: Trace, better: Trace) -> tuple[float, float]:
    """Average the difference of the divergence over the same tokens, and give its standard error."""
    difference = worse.kld.astype(np.float64) - better.kld.astype(np.float64)
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
