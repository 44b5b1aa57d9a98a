"""A tuning over a model that is a formula: what is chosen, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import pytest

from hybridkv.cache import AttentionFacts, KVTypes
from hybridkv.errors import UsageError
from hybridkv.policy import AnyPolicy
from hybridkv_lab.measure import Trace
from hybridkv_lab.sensitivity import Meter, Pair, Part, Sensitivities, Storage, measure_sensitivities
from hybridkv_lab.tuner import Goal, Outcome, Tuner

FACTS = [AttentionFacts(layer=2 * n + 1, n_heads=4, n_kv_heads=2, head_dim_k=64, head_dim_v=64) for n in range(4)]
TYPES = ("f16", "q8_0", "q5_0", "hq4_nl", "hq3_nl", "hq2_nl")
NOISE = {"f16": 0.0, "q8_0": 1e-5, "q5_0": 7e-4, "hq4_nl": 2e-3, "hq3_nl": 9e-3, "hq2_nl": 4e-2}
UNEVEN = [(30.0, 1.0), (1.0, 0.2), (0.5, 0.1), (4.0, 0.5)]
EVEN = [(1.0, 1.0)] * 4
N_TOKENS = 2000

Truth = Callable[[Part, list[Pair]], float]


class Formula:
    """Stands for a `Meter`: a configuration's loss is a formula, spread over tokens."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.asked: list[tuple[Part, str]] = []

    def losses(self, part: Part, candidates: Mapping[str, AnyPolicy], what: str) -> dict[str, float]:
        found = {}
        for name, policy in candidates.items():
            self.asked.append((part, name))
            types = [spec.types for spec in policy.resolve(FACTS)]
            found[name] = self.truth(part, [(t.type_k, t.type_v) for t in types])
        return found

    def traces(self, part: Part, candidates: Mapping[str, AnyPolicy], what: str) -> dict[str, Trace]:
        spread = np.random.default_rng(1).exponential(1.0, N_TOKENS).astype(np.float32)
        ones = np.ones(N_TOKENS, np.float32)
        return {
            name: Trace(ones, ones, ones, spread / spread.mean() * loss, ones, ones)
            for name, loss in self.losses(part, candidates, what).items()
        }


def additive(weights: list[tuple[float, float]], factor: float = 1.0) -> Truth:
    return lambda _, pairs: (
        factor * sum(k * NOISE[pair[0]] + v * NOISE[pair[1]] for (k, v), pair in zip(weights, pairs, strict=True))
    )


def tune(formula: Formula, goal: Goal, *measured: str, types: tuple[str, ...] = TYPES) -> tuple[Sensitivities, Outcome]:
    storage, meter = Storage(), cast("Meter", formula)
    sensitivities = measure_sensitivities(meter, FACTS, storage, types, measured or types)
    return sensitivities, Tuner(meter, FACTS, storage, sensitivities, goal).solve(n_rounds=2)


@pytest.mark.parametrize("bits", [2.7, 3.5, 4.0, 4.5, 6.0, 8.0])
def test_uneven_layers_gain_and_the_budget_is_kept(bits: float) -> None:
    formula = Formula(additive(UNEVEN))
    sensitivities, found = tune(formula, Goal("bits", bits, 4096))
    assert found.tuned.bits <= bits
    assert all(m.bits <= bits for m in found.uniform)
    assert found.tuned.loss < found.uniform[0].loss
    assert found.chosen is found.tuned
    assert found.gain is not None
    assert found.gain > 0
    assert found.tuned.predicted == pytest.approx(found.tuned.loss, rel=1e-4)
    assert sensitivities.layers[0]["k", "hq3_nl"] == pytest.approx(30 * 9e-3)
    first, third = found.tuned.pairs[0], found.tuned.pairs[2]
    assert NOISE[first[0]] <= NOISE[third[1]]  # bits went where they count


def test_more_bits_never_lose_more() -> None:
    losses = [tune(Formula(additive(UNEVEN)), Goal("bits", bits, 64))[1].tuned.loss for bits in (2.5, 3, 4, 5, 6, 8.5)]
    assert losses == sorted(losses, reverse=True)


def test_one_measured_type_is_enough_where_losses_are_in_proportion() -> None:
    whole, partial = Formula(additive(UNEVEN)), Formula(additive(UNEVEN))
    (_, expected), (sensitivities, found) = (
        tune(whole, Goal("bits", 4.0, 64)),
        tune(partial, Goal("bits", 4.0, 64), "hq3_nl"),
    )
    assert found.tuned.pairs == expected.tuned.pairs
    assert sensitivities.layers[3]["v", "q8_0"] == pytest.approx(0.5 * 1e-5)
    singles = [name.split() for _, name in partial.asked if name[1] == " "]
    assert {words[2] for words in singles} == {"hq3_nl"}
    assert len(partial.asked) < len(whole.asked)


def test_even_layers_stay_uniform() -> None:
    _, found = tune(Formula(additive(EVEN)), Goal("bits", 4.5, 64), types=("q8_0", "hq4_nl"))
    assert found.chosen.label == "hq4_nl+kv"
    assert found.gain is None


def test_what_does_not_hold_on_other_tokens_is_not_written() -> None:
    """The calibration says that layer 1 minds most; held-out tokens say that all mind alike."""

    def truth(part: Part, pairs: list[Pair]) -> float:
        return additive(UNEVEN if part == "calibration" else EVEN)(part, pairs)

    _, found = tune(Formula(truth), Goal("bits", 4.5, 64))
    assert len(set(found.tuned.pairs)) > 1
    assert found.gain is not None
    assert found.gain < 0
    assert found.chosen is found.uniform[0]
    assert len(set(found.chosen.pairs)) == 1


def test_measured_neighbours_mend_a_wrong_prediction() -> None:
    """Two layers that are coarse together lose far more than their sum."""

    def truth(_: Part, pairs: list[Pair]) -> float:
        coarse = sum(NOISE[k] >= NOISE["hq3_nl"] for k, _ in pairs[1:3])
        return additive(UNEVEN)(_, pairs) + (0.5 if coarse == 2 else 0.0)

    goal = Goal("bits", 3.5, 64)
    storage, meter = Storage(), cast("Meter", Formula(truth))
    sensitivities = measure_sensitivities(meter, FACTS, storage, TYPES, TYPES)
    rough, mended = (Tuner(meter, FACTS, storage, sensitivities, goal).solve(n_rounds=n).tuned for n in (0, 3))
    assert mended.loss < rough.loss
    assert mended.bits <= 3.5


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("limit", [1e-3, 1e-2, 0.1])
def test_a_divergence_is_kept_as_measured(limit: float, factor: float) -> None:
    """Together, layers lose `factor` times the sum of what they lose alone."""

    def truth(_: Part, pairs: list[Pair]) -> float:
        alone = sum(pair != ("f16", "f16") for pair in pairs) == 1
        return additive(UNEVEN, 1.0 if alone else factor)(_, pairs)

    _, found = tune(Formula(truth), Goal("kld", limit, 4096))
    assert found.chosen.loss <= limit
    assert found.chosen.kv_bytes <= found.tuned.kv_bytes
    assert found.tuned.loss > limit / 2  # not far below it: bytes were saved where they could be


def test_bytes_are_those_of_the_planner() -> None:
    _, found = tune(Formula(additive(UNEVEN)), Goal("memory", 1 << 20, 2048))
    config = Storage().config("x", "y", FACTS, found.tuned.pairs)
    assert found.tuned.kv_bytes == sum(spec.bytes_at(2048) for spec in config.resolve(FACTS)) <= 1 << 20


def test_goals_that_cannot_be_reached() -> None:
    with pytest.raises(UsageError, match=r"2.0 bits per value is less than the smallest types need: 2.5"):
        Goal("bits", 2.0, 64).check(FACTS, Storage(), TYPES)
    with pytest.raises(UsageError, match="100 bytes at 64 tokens is less than the smallest types need: 20480"):
        Goal("memory", 100, 64).check(FACTS, Storage(), TYPES)
    Goal("bits", 2.5, 64).check(FACTS, Storage(), TYPES)
    Goal("memory", 20480, 64).check(FACTS, Storage(), TYPES)
    with pytest.raises(UsageError, match="no combination of these types stays within a mean KLD of 1e-09; the best"):
        tune(Formula(additive(EVEN)), Goal("kld", 1e-9, 64), types=("q8_0", "q5_0"))


def test_a_type_that_is_not_finite_is_not_taken() -> None:
    def truth(_: Part, pairs: list[Pair]) -> float:
        return math.inf if pairs[1][0] != "f16" else additive(UNEVEN)(_, pairs)

    _, found = tune(Formula(truth), Goal("bits", 6.0, 64))
    assert found.chosen.pairs[1][0] == "f16"
    assert math.isfinite(found.chosen.loss)


def test_rotation_is_for_what_is_quantized() -> None:
    assert Storage("kv").types("f16", "q4_0") == KVTypes("f16", "q4_0", rotate_v=True)
    assert Storage("none").types("hq3_nl", "q4_0") == KVTypes("hq3_nl", "q4_0", rotate_k=True)
    assert Storage("k", KVTypes(tail=128)).types("q8_0", "q8_0") == KVTypes("q8_0", "q8_0", rotate_k=True, tail=128)
