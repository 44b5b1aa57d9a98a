"""Sensitivity of a model to each type in each KV layer: one layer and side at a time, everything else as the reference.

Owns the measuring of `hybridkv tune`, on two parts of a text that share no token: what is chosen by on one, what is
claimed on the other. Every number is kept in a journal, so that an interrupted run continues. Chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from hybridkv.cache import AttentionFacts, KVSpec, KVTypes
from hybridkv.formats import get_format
from hybridkv.policy import AnyPolicy, KVConfig, Policy, config_of, with_types
from hybridkv.policy.labels import Rotation
from hybridkv_lab.candidates import Candidate
from hybridkv_lab.corpus import Corpus
from hybridkv_lab.evaluate import Evaluator, Mode
from hybridkv_lab.journal import Journal
from hybridkv_lab.measure import Trace, summarize
from hybridkv_lab.run import Evaluation, Tick

REFERENCE = "f16"
"""The reference of all divergences."""

Side = Literal["k", "v"]
SIDES: tuple[Side, ...] = get_args(Side)

Part = Literal["calibration", "held-out"]

Pair = tuple[str, str]
"""Types of K and V."""

_BATCH = 12  # candidates that run side by side; what a batch has measured is kept

_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Storage:
    """The settings that hold for all layers, whatever their types.

    Attributes
    ----------
    rotate
        Sides that are rotated where they are quantized.
    common
        Scale rule, tail, sink and center; its types are not read.
    """

    rotate: Rotation = "kv"
    common: KVTypes = field(default_factory=KVTypes)

    def types(self, k: str, v: str) -> KVTypes:
        """Combine a layer's types."""
        rotated = replace(
            self.common,
            rotate_k="k" in self.rotate and get_format(k).is_quantized,
            rotate_v="v" in self.rotate and get_format(v).is_quantized,
        )
        return with_types(rotated, k, v)

    def config(self, name: str, model: str, facts: Sequence[AttentionFacts], pairs: Sequence[Pair]) -> KVConfig:
        """Build the config with types for each layer."""
        specs = [KVSpec(f, self.types(k, v)) for f, (k, v) in zip(facts, pairs, strict=True)]
        return config_of(name, model, specs)


Begin = Callable[[str, int], Tick]
"""Told what is measured next and how many ticks it will take; gives what counts them."""


class Meter:
    """Measures candidates on a part of the text, once.

    Parameters
    ----------
    evaluator
        Runs candidates.
    parts
        The two parts of the text.
    mode
        As in `Evaluator.run`.
    journal
        Where traces are kept.
    begin
        Who watches.
    """

    def __init__(
        self, evaluator: Evaluator, parts: Mapping[Part, Corpus], mode: Mode, journal: Journal, begin: Begin
    ) -> None:
        self.evaluator = evaluator
        self._parts = parts
        self._mode = mode
        self._journal = journal
        self._begin = begin

    def traces(self, part: Part, candidates: Mapping[str, AnyPolicy], what: str) -> dict[str, Trace]:
        """Measure the trace of each, by its name. The policy of a name is always the same.

        Raises
        ------
        KeyboardInterrupt
            After what was measured has been kept.
        """
        reference = Candidate(f"{part}: reference", Policy(KVTypes(REFERENCE, REFERENCE)), "reference")
        asked = [Candidate(f"{part}: {name}", policy) for name, policy in candidates.items()]
        corpus = self._parts[part]
        runs = [
            Evaluation(self.evaluator, corpus, [reference, *asked[i : i + _BATCH]], self._mode, self._journal)
            for i in range(0, len(asked), _BATCH)
        ]
        tick = self._begin(what, sum(run.n_window_ticks for run in runs))
        for run in runs:
            run.windows(tick)
        found = {name: self._journal.trace(c.label) for name, c in zip(candidates, asked, strict=True)}
        return {name: trace for name, trace in found.items() if trace is not None}

    def losses(self, part: Part, candidates: Mapping[str, AnyPolicy], what: str) -> dict[str, float]:
        """Measure each one's mean divergence, nats; infinite where logits were not finite."""
        return {name: mean_loss(trace) for name, trace in self.traces(part, candidates, what).items()}


def mean_loss(trace: Trace) -> float:
    """Average the divergence, nats; infinite if any token's is not finite."""
    found = summarize(trace)
    return math.inf if found.n_non_finite else found.kld_mean


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """Mean divergence, nats, with one side of one layer at a type and everything else at the reference.

    Attributes
    ----------
    types
        The ladder.
    measured
        Those of them that were measured layer by layer.
    layers
        For each KV layer, `(side, type)` -> loss.
    """

    types: tuple[str, ...]
    measured: tuple[str, ...]
    layers: tuple[Mapping[tuple[Side, str], float], ...]

    def loss(self, layer: int, pair: Pair) -> float:
        """Return the divergence that a pair of types adds in the KV layer of that index."""
        return sum(self.layers[layer][side, name] for side, name in zip(SIDES, pair, strict=True))

    def predicted(self, pairs: Sequence[Pair]) -> float:
        """Predict the divergence of a configuration, if losses add up."""
        return sum(self.loss(i, pair) for i, pair in enumerate(pairs))


def measure_sensitivities(
    meter: Meter,
    facts: Sequence[AttentionFacts],
    storage: Storage,
    types: Sequence[str],
    measured: Sequence[str],
) -> Sensitivities:
    """Measure `measured`, layer by layer and side by side, and derive the other types from them.

    A type that is not measured in a layer is one that is measured for all layers at once. How a layer compares with all
    layers together is interpolated between the measured types next to it: a divergence grows with the square of the
    rounding error, for one layer and for all, as long as it is small.
    """
    quantized = [name for name in types if name != REFERENCE]
    measured = [name for name in measured if name in quantized]
    derived = [name for name in quantized if name not in measured]
    n = len(facts)

    def policy(side: Side, name: str, layers: Sequence[int]) -> KVConfig:
        pair = (name, REFERENCE) if side == "k" else (REFERENCE, name)
        pairs = [pair if i in layers else (REFERENCE, REFERENCE) for i in range(n)]
        return storage.config("sensitivity", "", facts, pairs)

    whole = {(side, name): f"all {side} {name}" for side in SIDES for name in quantized} if derived else {}
    every = meter.losses(
        "calibration", {label: policy(*key, range(n)) for key, label in whole.items()}, "all layers at once"
    )
    single = {(i, side, name): f"{i} {side} {name}" for i in range(n) for side in SIDES for name in measured}
    one = meter.losses(
        "calibration", {label: policy(key[1], key[2], [key[0]]) for key, label in single.items()}, "layer by layer"
    )
    layers = []
    for i in range(n):
        losses: dict[tuple[Side, str], float] = {(side, REFERENCE): 0.0 for side in SIDES}
        for side in SIDES:
            own = {name: one[single[i, side, name]] for name in measured}
            together = {name: every[whole[side, name]] for name in quantized} if derived else {}
            losses |= {(side, name): loss for name, loss in own.items()}
            losses |= {(side, name): derive(own, together, name) for name in derived}
        layers.append(losses)
    return Sensitivities(tuple(types), tuple(measured), tuple(layers))


def derive(own: Mapping[str, float], together: Mapping[str, float], name: str) -> float:
    """Derive a layer's loss at `name`, from its losses at other types and from those of all layers together.

    Parameters
    ----------
    own
        Measured losses of the layer by type, at least one.
    together
        Losses of all layers at once, of these types and of `name`.
    """
    if not math.isfinite(together[name]):
        return math.inf
    known = sorted((max(together[t], _TINY), max(loss, _TINY)) for t, loss in own.items() if math.isfinite(loss))
    if not known:
        return math.inf
    x, y = np.log(np.array(known)).T
    at = math.log(max(together[name], _TINY))
    inside = min(max(at, float(x[0])), float(x[-1]))
    return math.exp(float(np.interp(inside, x, y)) + at - inside)  # beyond the ends, in proportion
