"""A step's work on the CPU: at once, or between recorded parts, in the order of the device's needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from hybridkv.hf.step import graph
from hybridkv.hf.step.host_work import Waits, host_work, sent_to

LOG = list[str]


def body(log: LOG) -> None:
    """Two parts of a device's step that the CPU works between, the second without anything meanwhile."""
    log.append("router")
    host_work(torch.device("cpu")).run(lambda: log.append("experts"), lambda: log.append("shared"))
    log.append("sum")
    host_work(torch.device("cpu")).run(lambda: log.append("more"))
    log.append("head")


def test_work_is_done_at_once_where_nobody_records() -> None:
    log: LOG = []
    body(log)
    assert log == ["router", "shared", "experts", "sum", "more", "head"]


class FakeGraph:
    """What the device is asked while it captures, and a replay that asks for it again."""

    log: LOG

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self.first = len(self.log)

    def capture_end(self) -> None:
        self.own = self.log[self.first :]
        assert self.own  # torch warns of an empty graph
        del self.log[self.first :]

    def replay(self) -> None:
        self.log.append(f"graph of {'+'.join(self.own)}")


class FakeEvent:
    log: LOG

    def record(self) -> None:
        self.log.append("mark")

    def synchronize(self) -> None:
        self.log.append("wait")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> LOG:
    """A device that only notes what it is asked."""
    found: LOG = []
    for fake in (FakeGraph, FakeEvent):
        monkeypatch.setattr(fake, "log", found, raising=False)
    stands: dict[str, Any] = {
        "CUDAGraph": FakeGraph,
        "Event": FakeEvent,
        "Stream": object,
        "stream": lambda _: nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, value in stands.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def test_a_recording_has_a_part_for_each_stretch(log: LOG) -> None:
    """What is done meanwhile is asked for before the CPU waits; recording runs nothing of the work."""
    replay = graph.CudaRecorder().record(partial(body, log))
    assert log == []
    replay()
    once = [
        "graph of router", "mark", "graph of shared", "wait", "experts", "graph of sum", "mark", "wait", "more",
        "graph of head",
    ]  # fmt: skip
    assert log == once
    replay()
    assert log == once + once


def test_a_trial_lets_the_work_wait_for_the_device(log: LOG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other waiting is an error in a trial's second run."""
    modes: list[int | str] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(graph, "set_sync_debug_mode", modes.append)
    seen: list[tuple[str, int | str]] = []

    def asks() -> None:
        seen.append(("device", modes[-1]))
        log.append("a")
        host_work(torch.device("cuda")).run(lambda: seen.append(("CPU", modes[-1])))
        seen.append(("device", modes[-1]))
        log.append("b")

    assert graph.CudaRecorder().trial(asks) is None
    first, second = seen[:3], seen[3:6]
    assert first == [("device", 0), ("CPU", 0), ("device", 0)]
    assert second == [("device", "error"), ("CPU", 0), ("device", "error")]
    assert modes[-1] == 0


def test_the_place_of_work_ends_with_its_block() -> None:
    class Elsewhere:
        def run(self, work: Callable[[], None], meanwhile: Callable[[], None] | None = None) -> None:
            pass

    place = Elsewhere()
    with sent_to(place):
        assert host_work(torch.device("cpu")) is place
    assert isinstance(host_work(torch.device("cpu")), Waits)
