"""Steps whose arguments are kept from token to token: the same bits as steps that are worked out anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.errors import UsageError
from hybridkv.hf import ModelCache
from hybridkv.kernels import cpu_native
from hybridkv.kernels.step import StepProgram
from hybridkv.native.continuations import Continuations
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
        held, step._held = step._held, Continuations(step._embedding, 1.0, step._rope)
        worked_out = step.room(cache, 8)
        step._held = held
        assert step.room(cache, 8) == worked_out
        rooms.append((worked_out, held.has_room(8, cache, step._builders)))
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


class Together:
    """Caches of one sequence each: some that go on together, and their twins, each alone and worked out anew."""

    def __init__(self, family: str, kinds: Sequence[KVTypes]) -> None:
        model = build(family)
        self.step, self.alone = native_step(model), native_step(model)
        self.caches = [cache_of(model.config, types, 400) for types in kinds]
        self.twins = [cache_of(model.config, types, 400) for types in kinds]
        self.positions = [0] * len(kinds)
        self.asked = tokens(1, 3000, 21)[0].tolist()
        for i in range(len(kinds)):
            ids = torch.tensor([self._take(i, 12 + 7 * i)])
            self.step.forward(ids, self.caches[i], 0)
            self.alone.forward(ids, self.twins[i], 0)

    def _take(self, i: int, n: int) -> list[int]:
        self.positions[i] += n
        own, self.asked = self.asked[:n], self.asked[n:]
        return own

    def go(self, spans: dict[int, tuple[int, int]]) -> None:
        """Give each cache so many tokens, if it takes them, of which so many stay; logits and bytes are the twins'."""
        room = {i: self.step.room(self.caches[i], n) for i, (n, _) in spans.items()}
        spans = {i: (room[i], min(kept, room[i])) for i, (_, kept) in spans.items()}
        before = {i: self.positions[i] for i in spans}
        own = {i: self._take(i, n) for i, (n, _) in spans.items()}
        got = self.step.forward_drafts(list(own.values()), [self.caches[i] for i in spans], list(before.values()))
        assert not got.failed
        row = 0
        for i, (n, kept) in spans.items():
            self.step.keep(self.caches[i], kept)
            self.positions[i] -= n - kept
            for k, token in enumerate(own[i][:kept]):
                self.alone._held.forget(self.twins[i])
                expected = self.alone.forward(torch.tensor([[token]]), self.twins[i], before[i] + k)
                assert torch.equal(got.logits[row + k], expected[0])
            row += n

    def compare(self) -> None:
        for cache, twin in zip(self.caches, self.twins, strict=True):
            assert differences(cache.stored(), twin.stored()) == []


def _single(caches: Iterable[int]) -> dict[int, tuple[int, int]]:
    return dict.fromkeys(caches, (1, 1))


@pytest.mark.parametrize("family", NATIVE)
def test_several_caches_go_on_together(family: str) -> None:
    """They begin at different lengths; one rests, comes back, and the order changes."""
    together = Together(family, [Q8_0] * 3)
    for order in ((0, 1, 2), (0, 2), (2, 0), (2, 1, 0)):
        for _ in range(3):
            together.go(_single(order))
    together.compare()


def test_several_caches_of_different_types_with_guesses() -> None:
    """Some of them take several tokens, of which all stay or some; another sees its 64 tokens run out."""
    together = Together("qwen3_5_text", [Q8_0, KVTypes("q4_0", "f16"), KVTypes("f16", "q8_0")])
    for spans in ({0: (4, 2), 1: (1, 1), 2: (3, 3)}, {1: (2, 1), 2: (1, 1)}, {0: (1, 1), 1: (1, 1), 2: (5, 1)}):
        together.go(spans)
        together.go(_single(range(3)))
    for _ in range(MAX_TOKENS):
        together.go(_single((1, 2)))
    together.go({0: (2, 2), 1: (2, 2), 2: (2, 1)})
    together.compare()


def test_several_caches_take_no_preparing(runs: list[int]) -> None:
    together = Together("qwen3_5_text", [Q8_0, Q8_0])
    del runs[:]
    ids = together.asked
    for n in range(150):
        places = [position + n for position in together.positions]
        assert not together.step.forward_many(torch.tensor(ids[2 * n : 2 * n + 2]), together.caches, places).failed
    assert len(runs) < 80  # steps that the guard checks are run in parts


def test_beside_a_cache_whose_rows_move() -> None:
    """One with exact rows goes another way, and takes the others with it."""
    together = Together("qwen3_5_text", [Q8_0, KINDS["q8_0, tail of 1"]])
    for spans in (_single((0, 1)), _single((0,)), _single((0, 1)), {0: (3, 2), 1: (1, 1)}, _single((0, 1))):
        together.go(spans)
    together.compare()


def test_of_several_caches_only_the_one_with_a_bad_row_fails() -> None:
    together = Together("qwen3_5_text", [KVTypes("q8_0", "f16")] * 2)
    for _ in range(15):
        together.go(_single((0, 1)))
    layer = next(layer for layer in together.caches[1].rows if layer is not None)
    layer.store.segments[0].v[0].view(torch.float16)[:, :, 5] = torch.nan
    got = together.step.forward_many(torch.tensor([3, 4]), together.caches, together.positions)
    assert list(got.failed) == [1]
    assert isinstance(got.failed[1], NonFiniteError)
