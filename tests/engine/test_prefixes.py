"""Stored prefixes: what was processed is not processed again, and replies are those of starting over."""

from __future__ import annotations

import pytest
import torch

from hybridkv.cache import KVTypes
from hybridkv.engine import Request, RequestHandle, Scheduler
from hybridkv.engine.pieces import Pieces
from hybridkv.engine.prefixes import PrefixStore
from hybridkv.hf import EagerStep, ModelCache
from hybridkv.policy import Guard
from tests.engine.serving import (
    GREEDY,
    Q8,
    Q8_TAILED,
    TAILED,
    alone,
    drain,
    events,
    model,
    prompt,
    scheduler,
    specs_for,
    tokens,
)
from tests.families import FAMILIES
from tests.thin import slow_but

ROOM = 1 << 26


def ask(run: Scheduler, ids: tuple[int, ...], n_new: int = 10, **options: object) -> RequestHandle:
    handle = run.submit(Request(ids, n_new, GREEDY, **options))  # type: ignore[arg-type]
    drain(run)
    return handle


STORED = [("qwen3_5_text", Q8_TAILED), ("qwen3_5_text", KVTypes("f32", "f32")), ("lfm2", Q8_TAILED)]
EACH = [(family, Q8) for family in FAMILIES]


@pytest.mark.parametrize(("family", "types"), slow_but([*STORED, *EACH], [*STORED, *EACH[::2]]))
def test_a_conversation_goes_on_where_it_was(family: str, types: KVTypes) -> None:
    """Every turn processes what is new and one token of the last reply, which was drawn and never fed back."""
    run = scheduler(family, types=types, prefix_bytes=ROOM)
    ids = prompt(75)
    for turn in range(3):
        handle = ask(run, ids)
        assert tokens(handle) == alone(Request(ids, 10, GREEDY), family, types=types), turn
        assert handle.usage.cached_tokens == (0 if turn == 0 else len(ids) - 9 - 1)
        ids = (*handle.token_ids, *prompt(9, seed=turn + 1))
    stats = run.stats()
    assert stats.prompt_tokens + stats.cached_tokens == sum(75 + 19 * turn for turn in range(3))
    assert stats.prompt_tokens == 75 + 2 * 10


@pytest.mark.parametrize("types", [Q8, TAILED], ids=["q8_0", "tail"])
def test_from_a_boundary_on_it_is_the_same_to_the_bit(types: KVTypes) -> None:
    """A prompt that parts from an earlier one behind a boundary of chunks: the same pieces, so the same logits."""
    begin = prompt(70)
    run = scheduler(types=types, prefix_bytes=ROOM)
    ask(run, (*begin, *prompt(20, 1)))
    ids = (*begin, *prompt(31, 2))
    handle = ask(run, ids, logprobs=5)
    assert handle.usage.cached_tokens == 64
    fresh = scheduler(types=types)
    other = fresh.submit(Request(ids, 10, GREEDY, logprobs=5))
    drain(fresh)
    assert events(handle) == events(other)


def test_a_prompt_rewritten_near_its_end_goes_on_from_the_boundary_before() -> None:
    """As templates do that show the end of a turn in another way once there is an answer."""
    run = scheduler(prefix_bytes=ROOM)
    ids = prompt(90)
    ask(run, ids)
    changed = (*ids[:80], *prompt(25, 3))
    handle = ask(run, changed)
    assert handle.usage.cached_tokens == 64
    assert tokens(handle) == alone(Request(changed, 10, GREEDY))


def test_the_same_prompt_again_processes_one_piece() -> None:
    """The logits after the prompt are not stored: at least one token is processed."""
    run = scheduler(prefix_bytes=ROOM)
    first, second = ask(run, prompt(64)), ask(run, prompt(64))
    assert tokens(first) == tokens(second)
    assert second.usage.cached_tokens == 32
    third = ask(run, prompt(63))
    assert third.usage.cached_tokens == 32


def test_what_is_not_equal_is_not_taken() -> None:
    """Neither tokens that differ early, nor other types, nor a request that does not want it; hashes decide nothing."""

    class Alike(int):
        def __hash__(self) -> int:
            return 7

    run = scheduler(prefix_bytes=ROOM)
    ids = tuple(map(Alike, prompt(96)))
    ask(run, ids)
    other = (*ids[:10], Alike(ids[10] + 1 if ids[10] < 96 else 3), *ids[11:])
    assert hash(other) == hash(ids)
    assert ask(run, other).usage.cached_tokens == 0
    assert ask(run, ids, types=KVTypes("q4_0", "q4_0")).usage.cached_tokens == 0
    assert ask(run, ids, reuse=False).usage.cached_tokens == 0
    assert ask(run, (*ids, Alike(5))).usage.cached_tokens == 96


def test_a_longer_prompt_goes_on_from_where_its_pieces_are_cut() -> None:
    """Not from the end of the shorter one: its pieces, and so its bits, are those of starting over."""
    ids = prompt(150)
    run = scheduler(prefix_bytes=ROOM)
    ask(run, ids[:70])
    longer = ask(run, ids)
    assert longer.usage.cached_tokens == 64
    assert tokens(longer) == tokens(ask(scheduler(), ids))


def test_families_that_take_no_chunks_store_nothing() -> None:
    run = scheduler("jamba", prefix_bytes=ROOM, step=EagerStep(model("jamba")))
    first = ask(run, prompt(50))
    assert len(run.prefixes) == 0
    second = ask(run, (*first.token_ids, 5, 6))
    assert second.usage.cached_tokens == 0


def test_a_cancelled_reply_can_be_continued() -> None:
    run = scheduler(prefix_bytes=ROOM)
    handle = run.submit(Request(prompt(40), 100, GREEDY))
    for _ in range(9):
        run.iterate()
    handle.cancel()
    drain(run)
    ids = (*handle.token_ids, 4, 5, 6)
    again = ask(run, ids)
    assert again.usage.cached_tokens == len(handle.token_ids) - 1
    assert tokens(again) == alone(Request(ids, 10, GREEDY))


def test_nothing_resumes_from_a_sequence_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out when some layers hold the next token and others do not."""
    run = scheduler(prefix_bytes=ROOM)
    step = run.step_of_model
    handle = run.submit(Request(prompt(40), 100, GREEDY))
    for _ in range(9):
        run.iterate()
    for name in ("forward", "forward_many"):
        whole = getattr(step, name)
        monkeypatch.setattr(step, name, lambda *given, whole=whole: (whole(*given), _no_memory()))
    drain(run)
    monkeypatch.undo()
    assert events(handle)[-1].finished == "error"
    ids = (*handle.token_ids, 4, 5, 6)
    again = ask(run, ids)
    assert again.usage.cached_tokens == 32
    assert tokens(again) == alone(Request(ids, 10, GREEDY))


def _no_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize("types", [Q8, Q8_TAILED], ids=["q8_0", "tail"])
def test_side_by_side_with_reuse_under_load(types: KVTypes) -> None:
    """Conversations with a common beginning, several at once, each turn checked against one that starts over."""
    run = scheduler(types=types, prefix_bytes=ROOM, n_parallel=3)
    histories = [(*prompt(66), *prompt(5 + 9 * i, seed=i)) for i in range(5)]
    for turn in range(3):
        handles = [run.submit(Request(ids, 6 + i, GREEDY)) for i, ids in enumerate(histories)]
        drain(run)
        for handle in handles:
            assert tokens(handle) == alone(handle.request, types=types)
        histories = [(*t.token_ids, *prompt(7, seed=turn)) for t in handles]
    assert run.stats().cached_tokens > 3 * 5 * 64


def test_the_budget_holds_and_the_oldest_go_first() -> None:
    """All bytes are counted: the sum over the tree is what the store says; the newest is the last to go."""
    run = scheduler(prefix_bytes=ROOM)
    ask(run, prompt(100))
    one = run.stats().prefix_bytes
    run = scheduler(prefix_bytes=one + one // 2)
    for seed in range(6):
        handle = ask(run, prompt(100, seed))
        stats = run.stats()
        assert 0 < stats.prefix_bytes <= one + one // 2
        assert stats.prefix_bytes == held_bytes(run.prefixes)
    assert ask(run, (*handle.token_ids, 9)).usage.cached_tokens == 109
    assert ask(run, (*prompt(100, 0), 9)).usage.cached_tokens == 0
    tiny = scheduler(prefix_bytes=100)
    ask(tiny, prompt(100))
    assert (len(tiny.prefixes), tiny.prefixes.nbytes) == (0, 0)
    run.prefixes.clear()
    assert (len(run.prefixes), run.prefixes.nbytes, held_bytes(run.prefixes)) == (0, 0, 0)


def held_bytes(store: PrefixStore) -> int:
    """Counted anew, node by node; nothing is held that no checkpoint needs."""
    total, reached = 0, list(store._roots.values())
    while reached:
        for alike in reached.pop()._by_length.values():
            for node in alike.values():
                assert node.kept
                assert node.children or node in store._order
                total += node.stored.nbytes
                reached.append(node.children)
    return total


def test_rows_are_held_once() -> None:
    """Ten checkpoints along one sequence take the bytes of its rows once, and of its states ten times."""
    specs = specs_for(model())
    store, cache = PrefixStore(ROOM), ModelCache(model().config, specs, n_ctx=512, guard=Guard())
    step = scheduler().step_of_model
    ids, last = prompt(320), None
    with torch.inference_mode():
        for end in range(32, 321, 32):
            step.forward(torch.tensor([ids[end - 32 : end]]), cache, end - 32)
            last = store.add(specs, ids[:end], cache, last)
    assert store.nbytes == 320 * sum(s.bytes_per_token for s in specs) + 10 * cache.state_bytes
    assert len(store) == 10


def test_a_copy_is_never_changed() -> None:
    """Going on from a checkpoint twice gives the same twice, whatever the first did with its cache."""
    run = scheduler(types=TAILED, prefix_bytes=ROOM)
    first = ask(run, prompt(90))
    ids = (*first.token_ids, 8, 9)
    expected = alone(Request(ids, 30, GREEDY), types=TAILED)
    for _ in range(3):
        assert tokens(ask(run, ids, 30)) == expected


def test_no_room_in_the_middle_of_a_conversation() -> None:
    """Checkpoints vanish while a sequence runs that lies behind them; what it leaves is whole all the same."""
    run = scheduler(prefix_bytes=ROOM)
    handle = run.submit(Request(prompt(100), 20, GREEDY))
    for _ in range(8):
        run.iterate()
    run.prefixes.clear()
    drain(run)
    assert len(run.prefixes) == 1
    again = ask(run, (*handle.token_ids, 5))
    assert again.usage.cached_tokens == 119
    assert tokens(again) == alone(Request((*handle.token_ids, 5), 10, GREEDY))


def test_a_checkpoint_is_left_before_each_mark() -> None:
    """A question that is changed goes on from the last boundary before it, not from the last 1024 tokens."""
    run = scheduler(prefix_bytes=ROOM, prefill_chunk=8)
    first, other = prompt(60, seed=1), prompt(60, seed=2)
    ask(run, first, marks=(35,))
    changed = ask(run, (*first[:35], *other[35:]))
    assert changed.usage.cached_tokens == 32
    unmarked = scheduler(prefix_bytes=ROOM, prefill_chunk=8)
    ask(unmarked, first)
    assert ask(unmarked, (*first[:35], *other[35:])).usage.cached_tokens == 0
    assert tokens(changed) == tokens(ask(unmarked, (*first[:35], *other[35:]), reuse=False))


@pytest.mark.parametrize("types", [Q8, TAILED], ids=["q8_0", "tail"])
def test_a_prompt_shorter_than_a_chunk_leaves_something(types: KVTypes) -> None:
    """A question of its own behind a short beginning, the same prompt again, and a longer one: to the bit."""
    begin = prompt(100)
    run = scheduler(types=types, prefix_bytes=ROOM, prefill_chunk=256)
    first = (*begin, *prompt(50, 1))
    for ids, n_cached in (
        (first, 0),
        (first, 128),
        ((*begin, *prompt(40, 2)), 64),
        ((*first[:140], *prompt(9, 3)), 128),
        ((*begin, *prompt(90, 4)), 64),
    ):
        handle = ask(run, ids, marks=(100,), logprobs=5)
        assert handle.usage.cached_tokens == n_cached
        fresh = scheduler(types=types, prefill_chunk=256)
        other = fresh.submit(Request(ids, 10, GREEDY, logprobs=5))
        drain(fresh)
        assert events(handle) == events(other)


def test_cuts() -> None:
    assert (Pieces.on("cpu", 256).first, Pieces.on("cuda", 256).first, Pieces.on("cpu", 32).first) == (64, 256, 32)
    assert [Pieces(100, 64).after(place) for place in (0, 64, 99, 100)] == [64, 100, 100, 200]
    pieces = Pieces(256, 64)
    cuts = [0]
    while cuts[-1] < 800:
        cuts.append(pieces.after(cuts[-1]))
    assert cuts == [0, 64, 128, 192, 256, 512, 768, 1024]
    assert [place for place in range(1025) if pieces.cuts_at(place)] == cuts
    assert all(pieces.after(place) == min(cut for cut in cuts if cut > place) for place in range(1024))


def test_a_prefix_without_room_is_said_once() -> None:
    said: list[str] = []
    run = scheduler(prefix_bytes=1000, notify=said.append)
    for seed in range(3):
        ask(run, prompt(40, seed=seed))
    assert len(run.prefixes) == 0
    [line] = [line for line in said if "found no room" in line]
    assert "in 0 MiB of stored prefixes: the next turn of such a conversation starts over" in line
    roomy: list[str] = []
    ask(scheduler(prefix_bytes=ROOM, notify=roomy.append), prompt(40, seed=1))
    assert roomy == []
