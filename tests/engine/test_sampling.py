"""Filters against llama.cpp's own samplers, token by token; the order; the draw by its seed."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hybridkv.engine import filters, sampling
from hybridkv.engine.sampler_order import NAMES, in_order, order_from
from hybridkv.engine.sampling import Sampler, SamplingParams, draw_each
from hybridkv.errors import UsageError

VOCAB = 97
OFF: dict[str, Any] = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def some_logits(seed: int, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def peer(make: Callable[[Any], Any], logits: torch.Tensor, accepted: Sequence[int] = ()) -> dict[int, float]:
    """What a sampler of llama.cpp leaves of logits, by token."""
    lib = pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")
    data = (lib.llama_token_data * VOCAB)(*[(i, float(x), 0.0) for i, x in enumerate(logits)])
    array = lib.llama_token_data_array(data=data, size=VOCAB, selected=-1, sorted=False)
    sampler = make(lib)
    for token in accepted:
        lib.llama_sampler_accept(sampler, token)
    lib.llama_sampler_apply(sampler, ctypes.byref(array))
    left = {array.data[i].id: float(array.data[i].logit) for i in range(array.size)}
    lib.llama_sampler_free(sampler)
    return {token: logit for token, logit in left.items() if logit != -math.inf}


def ours(logits: torch.Tensor) -> dict[int, float]:
    return {i: float(x) for i, x in enumerate(logits) if x != filters.OUT}


def same(mine: torch.Tensor, theirs: dict[int, float]) -> None:
    assert ours(mine) == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def chain(lib: Any, samplers: Sequence[Any]) -> Any:
    """Samplers of llama.cpp behind one another."""
    whole = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for sampler in samplers:
        lib.llama_sampler_chain_add(whole, sampler)
    return whole


PEERS: dict[str, Callable[[Any], Any]] = {
    "top_k": lambda lib: lib.llama_sampler_init_top_k(20),
    "top_p": lambda lib: lib.llama_sampler_init_top_p(0.7, 0),
    "min_p": lambda lib: lib.llama_sampler_init_min_p(0.1, 0),
    "typ_p": lambda lib: lib.llama_sampler_init_typical(0.9, 0),
    "temperature": lambda lib: lib.llama_sampler_init_temp(2.0),
    "top_n_sigma": lambda lib: lib.llama_sampler_init_top_n_sigma(1.5),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "names",
    [
        "top_k;top_p;min_p;temperature",
        "temperature;top_p;top_k",
        "min_p;temperature;top_k;top_n_sigma",
        "temperature;typ_p;min_p",
        "top_p;temp",
        "temperature",
    ],
)
def test_filters_in_another_order_are_llama_cpps(names: str, seed: int) -> None:
    order = order_from(names, None)
    assert order is not None
    logits = some_logits(seed, 2.0)
    params = SamplingParams(temp=2.0, top_k=20, top_p=0.7, min_p=0.1, typical_p=0.9, top_n_sigma=1.5)
    kept, ids = sampling._kept([], in_order(params, order), logits[None])
    mine = torch.full_like(logits, filters.OUT)
    mine[slice(None) if ids is None else ids[0]] = kept[0]
    same(mine, peer(lambda lib: chain(lib, [PEERS[name](lib) for name in order]), logits))


def test_orders_are_read_as_llama_cpp_writes_them() -> None:
    assert order_from(None, None) is None
    assert order_from("Top-K; temp;top_k", None) == ("top_k", "temperature")
    assert order_from(None, "edskypmxt") == NAMES
    assert in_order(SamplingParams(), NAMES) == SamplingParams()
    assert in_order(SamplingParams(), None) == SamplingParams()
    last = in_order(SamplingParams(top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.1), ("top_k", "penalties"))
    assert last.repeat_penalty == 1.1  # behind a filter that is off, as before it


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("value", [0.05, 0.3, 0.9, 0.999])
def test_filters_are_llama_cpps(seed: int, value: float) -> None:
    logits = some_logits(seed, 1.0 + seed)
    same(filters.typical(logits[None], value)[0], peer(lambda lib: lib.llama_sampler_init_typical(value, 0), logits))
    same(filters.top_p(logits[None], value)[0], peer(lambda lib: lib.llama_sampler_init_top_p(value, 0), logits))
    same(filters.min_p(logits[None], value)[0], peer(lambda lib: lib.llama_sampler_init_min_p(value, 0), logits))
    sigma = 3 * value
    same(
        filters.top_n_sigma(logits[None], sigma)[0],
        peer(lambda lib: lib.llama_sampler_init_top_n_sigma(sigma), logits),
    )
    same(
        filters.xtc(logits[None], value / 4)[0],
        peer(lambda lib: lib.llama_sampler_init_xtc(1.0, value / 4, 0, 1), logits),
    )


@pytest.mark.parametrize("last_n", [0, 1, 7, 64, 300])
@pytest.mark.parametrize(("repeat", "frequency", "presence"), [(1.3, 0.0, 0.0), (0.8, 0.5, -0.7), (1.0, 0.2, 1.5)])
def test_penalties_are_llama_cpps(last_n: int, repeat: float, frequency: float, presence: float) -> None:
    logits = some_logits(3)
    history = torch.randint(0, 30, (120,), generator=torch.Generator().manual_seed(last_n)).tolist()
    params = SamplingParams(
        **OFF, repeat_penalty=repeat, frequency_penalty=frequency, presence_penalty=presence, repeat_last_n=last_n
    )
    mine = logits.clone()
    params.adjust(mine, history)
    theirs = peer(
        lambda lib: lib.llama_sampler_init_penalties(VOCAB, last_n, repeat, frequency, presence),
        logits,
        accepted=history,
    )
    same(mine, theirs)
    assert bool((mine != logits).any()) is (last_n > 0)


@pytest.mark.parametrize("allowed", [1, 2, 4])
@pytest.mark.parametrize("last_n", [-1, 0, 3, 40])
@pytest.mark.parametrize("kinds", [1, 2, 3, 12])
def test_dry_is_llama_cpps(allowed: int, last_n: int, kinds: int) -> None:
    logits = some_logits(5)
    for seed, length in enumerate((1, 2, 5, 60, 200)):
        history = torch.randint(0, kinds, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        params = SamplingParams(**OFF, dry_multiplier=0.8, dry_allowed_length=allowed, dry_last_n=last_n)
        mine = logits.clone()
        params.adjust(mine, history)

        def make(lib: Any) -> Any:
            return lib.llama_sampler_init_dry(None, 0.8, 1.75, allowed, 4096 if last_n < 0 else last_n, None, 0)

        same(mine, peer(make, logits, accepted=history))


def plain_dry(history: list[int], allowed: int, breakers: frozenset[int]) -> dict[int, int]:
    """The rule itself: each token, and the longest repetition that it would prolong."""
    found: dict[int, int] = {}
    for token in set(history):
        if token in breakers:
            continue
        best = 0
        for end in range(1, len(history)):
            if history[end] != token:
                continue
            n = 0
            while n < end and history[end - 1 - n] == history[-1 - n] and history[-1 - n] not in breakers:
                n += 1
            best = max(best, n)
        if best >= allowed:
            found[token] = best
    return found


@pytest.mark.parametrize("seed", range(12))
def test_no_repetition_reaches_across_a_breaker(seed: int) -> None:
    history = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    for breakers in (frozenset(), frozenset({0}), frozenset({1, 2})):
        mine = torch.zeros(VOCAB)
        filters.dry(mine, history, multiplier=1.0, base=2.0, allowed=2, breakers=breakers)
        wanted = {token: -(2.0 ** min(n - 2, 128)) for token, n in plain_dry(history, 2, breakers).items()}
        assert {i: float(x) for i, x in enumerate(mine) if x} == pytest.approx(wanted)


def test_a_bias_is_added_before_everything() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 5.0
    greedy = SamplingParams(temp=0)
    assert Sampler(greedy).draw(logits).tolist() == [7]
    assert Sampler(SamplingParams(temp=0, logit_bias=((7, -100.0), (9, 1.0)))).draw(logits).tolist() == [9]
    banned = SamplingParams(**OFF, seed=1, logit_bias=tuple((i, -1e9) for i in range(VOCAB) if i != 3))
    assert [Sampler(banned).draw(logits).item() for _ in range(5)] == [3] * 5
    # A bias joins the logit that a repetition then divides: (5 - 3) / 4 is below 1.
    both = SamplingParams(temp=0, logit_bias=((7, -3.0), (9, 1.0)), repeat_penalty=4.0)
    assert Sampler(both).draw(logits, [[7]]).tolist() == [9]


def test_greedy_heeds_what_moves_the_likeliest() -> None:
    logits = torch.tensor([[4.0, 3.9, 0.0, -1.0]])
    assert Sampler(SamplingParams(temp=0, presence_penalty=1.0)).draw(logits, [[0, 0]]).tolist() == [1]
    assert Sampler(SamplingParams(temp=0, xtc_probability=1.0, min_p=0.0)).draw(logits).tolist() == [1]
    assert Sampler(SamplingParams(temp=0, xtc_probability=1.0, xtc_threshold=0.6)).draw(logits).tolist() == [0]


EVERYTHING = SamplingParams(
    temp=0.9,
    seed=11,
    typical_p=0.95,
    top_n_sigma=2.0,
    repeat_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    logit_bias=((4, 1.0),),
    dry_multiplier=0.8,
    xtc_probability=0.5,
)


def test_a_seed_gives_the_same_tokens() -> None:
    def run(params: SamplingParams) -> list[int]:
        sampler, history = Sampler(params), [1, 2, 3]
        for step in range(60):
            history.append(int(sampler.draw(some_logits(step)[None], [history])))
        return history

    from dataclasses import replace

    assert run(EVERYTHING) == run(EVERYTHING)
    assert run(EVERYTHING) != run(replace(EVERYTHING, seed=12))


def test_rows_together_are_rows_alone() -> None:
    from dataclasses import replace

    params = [EVERYTHING, replace(EVERYTHING, seed=5), SamplingParams(temp=0), SamplingParams(seed=4), EVERYTHING]
    logits = torch.stack([some_logits(i) for i in range(len(params))])
    histories = [[i, i, 1, 2, i, i] for i in range(len(params))]
    together = [draw_each([Sampler(p) for p in params], logits, histories) for _ in range(2)]
    alone = [int(Sampler(p).draw(logits[i : i + 1], histories[i : i + 1])) for i, p in enumerate(params)]
    assert together == [alone, alone]


class Only:
    """Lets one token through and notes what came."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.came = torch.tensor(tokens), []

    def allowed(self) -> torch.Tensor:
        return self.tokens

    def accept(self, token: int) -> None:
        self.came.append(token)


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_only_what_is_allowed_is_drawn(temp: float) -> None:
    steering = Only(3, 50)
    sampler = Sampler(SamplingParams(temp=temp, seed=1, logit_bias=((3, -1e9), (50, -1e9))), steering)
    drawn = [int(sampler.draw(some_logits(step)[None])) for step in range(30)]
    assert set(drawn) <= {3, 50}
    assert steering.came == drawn


def test_frequencies_follow_the_probabilities() -> None:
    """The draw itself: a thousand tokens at temperature 2 come as often as softmax(logits / 2) says."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampler = Sampler(SamplingParams(temp=2.0, top_k=3, top_p=1.0, min_p=0.0, seed=3))
    counts = np.bincount([int(sampler.draw(logits)) for _ in range(4000)], minlength=4)
    assert counts / 4000 == pytest.approx([0.5065, 0.3072, 0.1863, 0.0], abs=0.03)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -2),
        ("typical_p", 0.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", 101.0),
        ("dry_base", 0.5),
        ("dry_allowed_length", 0),
        ("xtc_probability", 1.5),
        ("logit_bias", ((5, math.inf),)),
        ("top_n_sigma", math.inf),
    ],
)
def test_nonsense_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match="allowed:"):
        SamplingParams(**{field: value})
