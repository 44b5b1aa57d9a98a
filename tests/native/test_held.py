"""Steps whose arguments are kept from token to token: the same bits as steps that are worked out anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.errors import UsageError
from hybridkv.hf import ModelCache
from hybridkv.kernels import cpu_native
from hybridkv.kernels.step import StepProgram
from hybridkv.native.held import MAX_TOKENS
from hybridkv.policy import NonFiniteError
from tests.families import build
from tests.native.test_drafts import KINDS, cache_of, differences
from tests.native.test_step import NATIVE, native_step, tokens

needs_native = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")
pytestmark = [needs_native, pytest.mark.usefixtures("_inference")]

Q8_0 = KVTypes("q8_0", "q8_0")


@pytest.fixture
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every run of operations whose arguments were worked out for it."""
    found: list[int] = []
    run = StepProgram.run
    monkeypatch.setattr(StepProgram, "run", lambda *a, **k: (found.append(1), run(*a, **k))[1])
    return found


class Twins:
    """A cache that is continued at one go, and one that another cache interrupts at every token."""

    def __init__(
        self, family: str, types: KVTypes, n_seqs: int = 1, n_ctx: int | None = 400, n_prompt: int = 20
    ) -> None:
        model = build(family)
        self.straight, self.interrupted = native_step(model), native_step(model)
        self.caches = [cache_of(model.config, types, n_ctx) for _ in range(3)]
        self.position, self.n_seqs = 0, n_seqs
        self.take(tokens(n_seqs, n_prompt, 1))

    def take(self, ids: Tensor) -> None:
        """Continue both, and compare their logits."""
        one, two, other = self.caches
        if ids.shape[1] == 1:
            other.reset()
            self.interrupted.forward(ids, other, 0)
        got = self.straight.forward(ids, one, self.position)
        expected = self.interrupted.forward(ids, two, self.position)
        assert torch.equal(got, expected)
        self.position += ids.shape[1]

    def take_many(self, n: int, seed: int) -> None:
        """Continue both by single tokens; what they hold is the same to the byte."""
        for ids in tokens(self.n_seqs, n, seed).split(1, dim=1):
            self.take(ids)
        assert differences(self.caches[0].stored(), self.caches[1].stored()) == []

    def change(self, how: Callable[[ModelCache], ModelCache | None]) -> None:
        """Do something to both caches, or put others in their places."""
        self.caches[:2] = [how(cache) or cache for cache in self.caches[:2]]


@pytest.mark.parametrize("family", NATIVE)
def test_kept_arguments_give_the_same_bits(family: str) -> None:
    twins = Twins(family, Q8_0)
    twins.take_many(16, seed=2)


@pytest.mark.parametrize("types", KINDS.values(), ids=KINDS)
def test_of_every_kind_of_rows(types: KVTypes) -> None:
    twins = Twins("qwen3_5_text", types, n_seqs=2)
    twins.take_many(MAX_TOKENS + 10, seed=3)


def test_most_tokens_take_no_preparing(runs: list[int]) -> None:
    model = build("qwen3_5_text")
    step, cache, ids = native_step(model), cache_of(model.config, Q8_0, 400), tokens(1, 220, 4)
    step.forward(ids[:, :20], cache, 0)
    del runs[:]
    for position in range(20, 220):
        step.forward(ids[:, position : position + 1], cache, position)
    assert len(runs) < 60  # layers and head of some steps, and the parts of those that the guard checks


def test_room_behind_a_held_token_is_what_it_is_worked_out_to_be() -> None:
    """Also where single tokens are held, without memory for guesses' states; up to where the guard looks."""
    model = build("qwen3_5_text")
    step, cache, ids = native_step(model), cache_of(model.config, Q8_0, 400), tokens(1, 180, 4)
    step.forward(ids[:, :20], cache, 0)
    rooms = []
    for position in range(20, 180):
        step.forward(ids[:, position : position + 1], cache, position)
        held, step._held = step._held, None
        worked_out = step.room(cache, 8)
        step._held = held
        assert step.room(cache, 8) == worked_out
        rooms.append((worked_out, held is not None and held.has_room(8, cache, (step._layers, step._head))))
    assert rooms.count((8, True)) > 100
    assert min(room for room, _ in rooms) < 8


def test_one_of_several_caches_alone(runs: list[int]) -> None:
    model = build("qwen3_5_text")
    step, cache, ids = native_step(model), cache_of(model.config, Q8_0, 400), tokens(1, 220, 4)
    step.forward(ids[:, :20], cache, 0)
    del runs[:]
    for position in range(20, 220):
        assert not step.forward_many(ids[0, position : position + 1], [cache], [position]).failed
    assert len(runs) < 60


def test_memory_that_grows() -> None:
    twins = Twins("qwen3_5_text", Q8_0, n_ctx=None, n_prompt=240)
    twins.take_many(40, seed=5)  # across the 256 rows that were there at first


def test_a_context_to_its_last_token() -> None:
    twins = Twins("qwen3_5_text", Q8_0, n_ctx=90)
    twins.take_many(70, seed=6)


def test_a_window_that_fills() -> None:
    twins = Twins("gemma3_text", Q8_0)
    twins.take_many(80, seed=7)


def _reversed(cache: ModelCache) -> None:
    cache.batch_select_indices(torch.tensor([1, 0]))


def _again(cache: ModelCache) -> None:
    cache.load([cache.stored()])


CHANGES: dict[str, Callable[[ModelCache], ModelCache | None]] = {
    "sequences in another order": _reversed,
    "a copy": lambda cache: cache.copy(),
    "stored and loaded": _again,
}


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_moves_rows_or_states(change: Callable[[ModelCache], ModelCache | None], family: str) -> None:
    """Rows alone in a model without states."""
    n_seqs = 1 if change is _again else 2
    twins = Twins(family, Q8_0, n_seqs=n_seqs)
    for seed in (8, 9, 10):
        twins.take_many(12, seed)
        twins.change(change)
    twins.take_many(12, seed=11)


def test_a_cache_that_was_emptied_and_filled_to_the_same_length() -> None:
    twins = Twins("qwen3_5_text", Q8_0)
    twins.take_many(12, seed=8)
    twins.change(lambda cache: cache.reset())
    length, twins.position = twins.position, 0
    twins.take(tokens(1, length, 9))
    twins.take_many(12, seed=10)


def test_a_cache_is_not_kept_alive() -> None:
    model = build("qwen3_5_text")
    step, cache = native_step(model), cache_of(model.config, Q8_0, 400)
    ids = tokens(1, 30, 12)
    step.forward(ids[:, :20], cache, 0)
    for position in range(20, 30):
        step.forward(ids[:, position : position + 1], cache, position)
    layer = next(layer for layer in cache.rows if layer is not None)
    planes = [weakref.ref(plane) for plane in layer.store.segments[0].k]
    del cache, layer
    gc.collect()
    assert all(plane() is None for plane in planes)


def test_a_row_that_went_bad_is_found_at_the_next_token() -> None:
    model = build("qwen3_5_text")
    step, cache, ids = native_step(model), cache_of(model.config, KVTypes("q8_0", "f16"), 400), tokens(1, 40, 13)
    step.forward(ids[:, :20], cache, 0)
    for position in range(20, 39):
        step.forward(ids[:, position : position + 1], cache, position)
    layer = next(layer for layer in cache.rows if layer is not None)
    layer.store.segments[0].v[0].view(torch.float16)[:, :, 5] = torch.nan
    with pytest.raises(NonFiniteError):
        step.forward(ids[:, 39:], cache, 39)


def test_a_token_that_the_model_does_not_have() -> None:
    model = build("qwen3_5_text")
    step, cache, ids = native_step(model), cache_of(model.config, Q8_0, 400), tokens(1, 40, 14)
    step.forward(ids[:, :20], cache, 0)
    for position in range(20, 30):
        step.forward(ids[:, position : position + 1], cache, position)
    held = cache.stored()
    with pytest.raises(UsageError, match="10000"):
        step.forward(torch.tensor([[10000]]), cache, 30)
    assert differences(cache.stored(), held) == []


def test_steps_of_their_own_threads() -> None:
    twins = Twins("qwen3_5_text", Q8_0)
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3, 1):
            torch.set_num_threads(n_threads)
            twins.take_many(8, seed=n_threads)
    finally:
        torch.set_num_threads(before)
