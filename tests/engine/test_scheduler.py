"""The scheduler: every sequence gets what it gets alone, none waits for ever, and nothing is over the budget."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.engine import Event, Request, SamplingParams
from hybridkv.engine.requests import RequestHandle
from hybridkv.engine.running_sequence import RunningSequence
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import AdmissionError, NoKernelError, UsageError
from hybridkv.hf import ModelCache
from hybridkv.kernels import cpu_native
from hybridkv.native import NativeStep
from hybridkv.policy import Guard, NonFiniteError
from hybridkv.runtime import StepResult
from tests.engine.serving import (
    GREEDY,
    Q8,
    TAILED,
    alone,
    drain,
    events,
    model,
    prompt,
    requests,
    scheduler,
    specs_for,
    tokens,
)
from tests.families import CONTROLS, FAMILIES, HYBRIDS
from tests.thin import every_other, slow_but

LENGTHS = (5, 70, 1, 33, 64)
needs_native = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")


MET = [*((family, Q8) for family in HYBRIDS), *((family, TAILED) for family in CONTROLS)]
FIRST = [("qwen3_5_text", KVTypes("f32", "f32")), ("jamba", TAILED), ("zamba2", TAILED)]


@pytest.mark.parametrize(("family", "types"), slow_but([*FIRST, *MET], [*FIRST, *MET[::2]]))
def test_sequences_get_what_they_get_alone(family: str, types: KVTypes) -> None:
    """More of them than places, of all lengths, so that they meet at every point of each other's lives."""
    asked = requests(LENGTHS, 8)
    run = scheduler(family, types=types)
    handles = [run.submit(request) for request in asked]
    drain(run)
    got = [tokens(handle) for handle in handles]
    assert got == [alone(request, family, types=types) for request in asked]
    assert len({tuple(ids) for ids in got}) >= len(got) - 1  # a small random model may repeat itself
    assert all(len(ids) == 8 for ids in got)


@pytest.mark.parametrize(("family", "chunk"), every_other(FAMILIES, (1, 2, 7, 60), 4))
def test_a_prompt_in_chunks_gets_the_tokens_of_one_chunk(family: str, chunk: int) -> None:
    """Chunks shorter than some convolutions, windows and chunks of a scan, and of odd lengths."""
    asked, types = Request(prompt(61), 8, GREEDY), KVTypes("f32", "f32")
    whole = alone(asked, family, types=types)
    assert alone(asked, family, types=types, prefill_chunk=chunk) == whole


def test_sampled_sequences_get_what_they_get_alone() -> None:
    """Each has a generator of its own; parameters are mixed, so that rows are filtered together and apart."""
    params = [
        SamplingParams(temp=1.2, seed=1),
        SamplingParams(temp=1.2, seed=2),
        GREEDY,
        SamplingParams(temp=0.7, top_k=5, seed=1),
    ]
    asked = [Request(prompt(20), 12, p) for p in params]
    run = scheduler()
    handles = [run.submit(request) for request in asked]
    drain(run)
    got = [tokens(handle) for handle in handles]
    assert got == [alone(request) for request in asked]
    assert len({tuple(ids) for ids in got}) == 4


def test_samplers_that_look_back_see_what_they_see_alone() -> None:
    params = [
        SamplingParams(temp=1.2, seed=1, repeat_penalty=1.8, repeat_last_n=-1),
        SamplingParams(temp=1.2, seed=1, presence_penalty=2.0, repeat_last_n=4),
        SamplingParams(temp=1.2, seed=1, dry_multiplier=2.0, dry_allowed_length=1),
        SamplingParams(temp=1.2, seed=1),
    ]
    asked = [Request(prompt(20), 24, p) for p in params]
    run = scheduler()
    handles = [run.submit(request) for request in asked]
    drain(run)
    got = [tokens(handle) for handle in handles]
    assert got == [alone(request) for request in asked]
    assert got[3] not in got[:2]


def test_what_a_sampler_looks_back_at_is_no_copy() -> None:
    """One array is filled token by token; where nothing looks back, there is none."""
    handle = RequestHandle(1, Request((5, 6, 7), 4, SamplingParams(repeat_penalty=1.5)), None)
    sequence = RunningSequence(handle, key=(), specs=(), planned_bytes=0, reuses=False)  # type: ignore[arg-type]
    before = sequence.seen
    for token in (8, 9, 10, 11):
        sequence.take(token, torch.zeros(20))
        assert list(sequence.seen) == sequence.history
        assert np.shares_memory(before, sequence.seen)
    plain = RunningSequence(RequestHandle(2, Request((5,), 4), None), key=(), specs=(), planned_bytes=0, reuses=False)  # type: ignore[arg-type]
    assert len(plain.seen) == 0


def test_types_of_a_request() -> None:
    """Sequences of other types run side by side."""
    asked = [Request(prompt(40), 16, GREEDY, types=types) for types in (None, KVTypes("q4_0", "q4_0"), TAILED, Q8)]
    run = scheduler(types=Q8)
    handles = [run.submit(request) for request in asked]
    drain(run)
    got = [tokens(handle) for handle in handles]
    assert got == [alone(request, types=Q8) for request in asked]
    assert got[0] == got[3]
    assert got[1] == alone(Request(prompt(40), 16, GREEDY), types=KVTypes("q4_0", "q4_0"))
    assert got[1] != got[0]


def test_a_long_prompt_does_not_stall_others() -> None:
    """While it is processed, every iteration gives a running sequence its token, and a short prompt has its turn."""
    run = scheduler(n_ctx=2048)
    running = run.submit(Request(prompt(4), 40, GREEDY))
    for _ in range(2):
        run.iterate()
    long = run.submit(Request(prompt(640, 1), 4, GREEDY))
    short = run.submit(Request(prompt(10, 2), 4, GREEDY))
    before, steps = running.usage.generated_tokens, 0
    while not long.usage.generated_tokens:
        run.iterate()
        steps += 1
        if steps == 2:
            assert short.usage.generated_tokens >= 1
    assert steps == 640 // 32 + 1
    assert running.usage.generated_tokens == before + steps
    drain(run)
    assert tokens(long) == alone(Request(prompt(640, 1), 4, GREEDY), n_ctx=2048)


def test_stop_ids_and_length() -> None:
    whole = alone(Request(prompt(9), 20, GREEDY))
    stop = whole[7]
    assert stop is not None
    first = whole.index(stop)
    run = scheduler()
    handle = run.submit(Request(prompt(9), 20, GREEDY, stop_ids=(stop, 1000)))
    drain(run)
    got = events(handle)
    assert [event.token for event in got] == whole[: first + 1]
    assert [event.finished for event in got] == [None] * first + ["stop"]
    assert handle.usage.generated_tokens == first + 1
    assert handle.token_ids == (*prompt(9), *whole[: first + 1])
    handle = run.submit(Request(prompt(9), 3, GREEDY))
    drain(run)
    assert [event.finished for event in events(handle)] == [None, None, "length"]


def test_logprobs_are_the_models() -> None:
    request = Request(prompt(30), 5, SamplingParams(temp=1.3, seed=4), logprobs=3)
    run = scheduler(types=KVTypes("f32", "f32"))
    handle = run.submit(request)
    drain(run)
    history = list(request.prompt_ids)
    for event in events(handle):
        with torch.inference_mode():
            exact = torch.log_softmax(model()(torch.tensor([history])).logits[0, -1], -1)
        assert event.token is not None
        assert event.logprob == pytest.approx(float(exact[event.token]), abs=1e-3)
        best = torch.topk(exact, 3)
        assert [i for i, _ in event.top_logprobs] == best.indices.tolist()
        assert [p for _, p in event.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)
        history.append(event.token)


def test_cancel_running_and_waiting() -> None:
    run = scheduler(n_parallel=2)
    handles = [run.submit(request) for request in requests((8, 40, 12, 6))]
    for _ in range(4):
        run.iterate()
    handles[0].cancel()
    handles[3].cancel()
    run.iterate()
    assert handles[0].finished
    assert handles[3].finished
    assert events(handles[0])[-1].finished == events(handles[3])[-1].finished == "cancelled"
    assert handles[3].usage.generated_tokens == 0
    drain(run)
    for handle in handles[1:3]:
        assert tokens(handle) == alone(handle.request)
    stats = run.stats()
    assert (stats.n_finished, stats.n_cancelled, stats.n_failed) == (2, 2, 0)
    assert (stats.running, stats.waiting, stats.kv_bytes, stats.state_bytes, stats.reserved_bytes) == (0, 0, 0, 0, 0)
    handles[0].cancel()
    assert not run.iterate()


@pytest.mark.parametrize("types", [Q8, TAILED], ids=["q8_0", "tail"])
@pytest.mark.parametrize("spare", [0.0, 0.5])
def test_never_over_the_budget(types: KVTypes, spare: float) -> None:
    """Planned bytes are those that caches allocate, and sequences wait for them in their order.

    A budget that two sequences fill to the last byte lets two run.
    """
    specs = specs_for(model(), types)
    planned = scheduler(types=types).admission.planned_bytes(specs, 100 + 12)
    budget = 2 * planned + int(spare * planned)
    run = scheduler(types=types, memory_bytes=budget)
    handles = [run.submit(request) for request in requests((100, 100, 100, 100))]
    most = 0
    while run.iterate():
        stats = run.stats()
        most = max(most, stats.running)
        assert stats.kv_bytes + stats.state_bytes <= stats.reserved_bytes <= budget
    assert most == 2
    assert [tokens(t) for t in handles] == [alone(t.request, types=types) for t in handles]


def test_rows_that_wait_are_planned() -> None:
    """Beside a tail, the rows of a piece of the prompt are held in f16 until the next call."""
    specs = specs_for(model(), TAILED)
    few, many = (scheduler(types=TAILED, prefill_chunk=n).admission.planned_bytes(specs, 112) for n in (8, 32))
    assert many - few == 24 * sum(spec.exact_bytes_per_token for spec in specs) > 0


def test_what_cannot_fit_is_refused_with_numbers() -> None:
    run = scheduler()
    planned = run.admission.planned_bytes(specs_for(model()), 112)
    run = scheduler(memory_bytes=planned)
    run.submit(Request(prompt(100), 12, GREEDY))
    with pytest.raises(
        AdmissionError, match=r"100 prompt tokens and 13 new ones take \d+ bytes, and \d+ are"
    ) as caught:
        run.submit(Request(prompt(100), 13, GREEDY))
    error = caught.value
    assert error.reason == "too_large"
    assert error.planned_bytes > planned == error.budget_bytes
    assert (error.n_tokens, error.most_tokens) == (113, 112)
    with pytest.raises(AdmissionError, match="do not fit a context of 512") as caught:
        scheduler().submit(Request(prompt(500), 13, GREEDY))
    assert caught.value.most_tokens == 512
    scheduler().submit(Request(prompt(500), 12, GREEDY))


def test_queue_is_bounded() -> None:
    run = scheduler(max_waiting=2)
    for request in requests((3, 3)):
        run.submit(request)
    with pytest.raises(AdmissionError, match="2 requests wait") as caught:
        run.submit(Request(prompt(3), 4, GREEDY))
    assert caught.value.reason == "queue_full"
    run.iterate()
    run.submit(Request(prompt(3), 4, GREEDY))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_ids": ()}, UsageError, "prompt is empty"),
        ({"max_tokens": 0}, UsageError, "max_tokens 0"),
        ({"logprobs": 21}, UsageError, "logprobs 21; allowed: 0 to 20"),
        ({"prompt_ids": (3, 97)}, UsageError, "token id 97; allowed: 0 to 96"),
        ({"prompt_ids": (-1,)}, UsageError, "token id -1"),
        ({"types": KVTypes("q9", "q9")}, UsageError, "q9"),
        ({"types": KVTypes("q8_KV", "q8_KV", rotate_k=True)}, None, ""),
    ],
)
def test_bad_requests(options: dict[str, Any], error: type[Exception] | None, message: str) -> None:
    run = scheduler()
    if error is None:
        run.submit(Request(**{"prompt_ids": (3, 4), "max_tokens": 2, **options}))
        return
    with pytest.raises((error, NoKernelError), match=message):
        run.submit(Request(**{"prompt_ids": (3, 4), "max_tokens": 2, **options}))
    assert not run.iterate()


def test_bad_settings() -> None:
    with pytest.raises(UsageError, match="n_parallel 0"):
        scheduler(n_parallel=0)
    with pytest.raises(UsageError, match="prefill_chunk 0"):
        scheduler(prefill_chunk=0)
    with pytest.raises(UsageError, match="prefill_chunk 100; allowed: 1 to 64"):
        scheduler(n_ctx=64, prefill_chunk=100)


def test_a_short_context_has_a_chunk_that_fits_it() -> None:
    run = scheduler(n_ctx=64, prefill_chunk=None)
    ticket = run.submit(Request(prompt(50), max_tokens=4))
    drain(run)
    assert len(tokens(ticket)) == 4


class Faulty:
    """A step in which the attention of one sequence is not finite, at types of so few bits."""

    def __init__(self, victim: int, at: int, bad_types: tuple[str, ...], *, told: bool = True) -> None:
        self.inner = resolve_step(model().config, "cpu")(model())
        self.name, self.takes_chunks = "faulty", True
        self.victim, self.at, self.bad_types, self.told = victim, at, bad_types, told
        self.fired = 0

    def forward(self, ids: Tensor, cache: ModelCache, position: int) -> Tensor:
        return self.inner.forward(ids, cache, position)

    def logits(self, ids: Tensor, cache: ModelCache, position: int) -> Tensor:
        return self.inner.logits(ids, cache, position)

    def forward_many(self, ids: Tensor, caches: list[ModelCache], positions: list[int]) -> StepResult:
        answers = self.inner.forward_many(ids, caches, positions)
        for index, cache in enumerate(caches):
            due = positions[index] >= self.at and cache.specs[0].types.type_k in self.bad_types
            if due and cache.kv_layers[0]._n_ctx == self.victim:
                self.fired += 1
                answers.logits[index] = torch.nan
                if self.told:
                    error = NonFiniteError(layer=1, label="q8_0", kernel="k", n_tokens=1, source="cache")
                    answers.failed[index] = error
        return answers


@pytest.mark.parametrize("told", [True, False], ids=["the step says so", "the logits show it"])
def test_a_fault_in_one_sequence_is_rebuilt_and_hurts_no_other(told: bool) -> None:
    """The sequence with 20 + 12 tokens fails at its 25th; it goes on at f16 without losing a token."""
    said: list[str] = []
    step = Faulty(32, 24, ("q8_0",), told=told)
    run = scheduler(step=step, notify=said.append, prefix_bytes=1 << 24)
    handles = [run.submit(request) for request in requests((7, 20, 40, 9))]
    drain(run)
    assert step.fired == 1
    assert run.stats().n_rebuilds == 1
    assert len(said) == 1
    assert said[0].endswith("rebuilding 25 tokens at f16")
    for handle in (handles[0], handles[2], handles[3]):
        assert tokens(handle) == alone(handle.request)
    got = tokens(handles[1])
    assert len(got) == 12
    assert got[:5] == alone(handles[1].request)[:5]
    with torch.inference_mode():
        exact = model()(torch.tensor([list(handles[1].token_ids[:-1])])).logits[0, -8:].argmax(-1).tolist()
    assert got[5:] == exact[-7:]


def test_a_fault_that_stays_ends_its_sequence_alone() -> None:
    step = Faulty(32, 24, ("q8_0", "f16"))
    run = scheduler(step=step)
    handles = [run.submit(request) for request in requests((7, 20, 40))]
    drain(run)
    last = events(handles[1])[-1]
    assert last.finished == "error"
    assert last.message is not None
    assert "no larger type is left" in last.message
    assert handles[1].usage.generated_tokens == 6  # the sixth came of the rebuild, and the step after it fails again
    for handle in (handles[0], handles[2]):
        assert tokens(handle) == alone(handle.request)
    assert run.stats().n_failed == 1


def test_a_fault_of_the_program_ends_all_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    run = scheduler()
    handles = [run.submit(request) for request in requests((7, 20))]

    def broken(*_: object) -> StepResult:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(run.step_of_model, "forward_many", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run.run_forever()
    assert [events(t)[-1].finished for t in handles] == ["error", "error"]
    with pytest.raises(AdmissionError, match="shutting down"):
        run.submit(Request(prompt(3), 3, GREEDY))
    with pytest.raises(AdmissionError, match="has stopped"):
        run.call(lambda: 1)


def test_types_raised_by_the_guard_are_counted() -> None:
    """With a limit that 4 bits do not hold, each sequence is stored at larger types, and waits for their bytes."""
    said: list[str] = []
    q4 = KVTypes("q4_0", "q4_0")
    strict = Guard(limit=0.02)
    room = scheduler().admission.planned_bytes(specs_for(model(), Q8), 82)
    run = scheduler(types=q4, guard=strict, notify=said.append, memory_bytes=room + room // 2)
    handles = [run.submit(request) for request in requests((70, 70))]
    while run.iterate():
        assert run.stats().reserved_bytes <= room + room // 2
    assert said
    assert all(len(tokens(t)) == 12 for t in handles)
    ample = scheduler(types=q4, guard=strict)
    others = [ample.submit(request) for request in requests((70, 70))]
    drain(ample)
    assert [t.token_ids for t in handles] == [t.token_ids for t in others]


def test_a_thread_runs_it_and_shutdown_drains() -> None:
    run = scheduler(n_parallel=2)
    worker = threading.Thread(target=run.run_forever)
    worker.start()
    heard: list[Event] = []
    asked = requests((8, 40, 12, 6))
    handles = [run.submit(request) for request in asked[:3]]
    last = run.submit(asked[3], heard.append)
    assert run.call(lambda: 7).result(10) == 7
    run.shutdown(drain=True)
    with pytest.raises(AdmissionError) as caught:
        run.submit(asked[0])
    assert caught.value.reason == "closed"
    got = [[event.token for event in handle] for handle in handles]
    assert last.wait(30)
    worker.join(30)
    assert not worker.is_alive()
    assert got == [alone(request) for request in asked[:3]]
    assert [event.token for event in heard] == alone(asked[3])


def test_shutdown_without_draining_cancels() -> None:
    run = scheduler(n_ctx=4096)
    worker = threading.Thread(target=run.run_forever)
    worker.start()
    handle = run.submit(Request(prompt(5), 4000, GREEDY))
    stream = iter(handle)
    next(stream)
    run.shutdown(drain=False)
    worker.join(30)
    assert not worker.is_alive()
    assert [event.finished for event in stream][-1] == "cancelled"


@needs_native
def test_the_native_step_takes_them_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of the program for all that decode, not one each."""
    run = scheduler()
    assert isinstance(run.step_of_model, NativeStep)
    sizes: list[int] = []
    original = run.step_of_model._decode_many

    def spy(ids: Tensor, *rest: Any) -> Any:
        sizes.append(len(ids))
        return original(ids, *rest)

    monkeypatch.setattr(run.step_of_model, "_decode_many", spy)
    for request in requests((3, 4, 5, 6)):
        run.submit(request)
    drain(run)
    assert max(sizes) == 4
