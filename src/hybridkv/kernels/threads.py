"""The threads of native calls, and how torch's are kept out of their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_kept: ContextVar[int | None] = ContextVar("threads of native calls", default=None)


def native_threads() -> int:
    """Count the threads of a native call that names none: torch's, those outside of `torch_on_one_thread`."""
    return _kept.get() or torch.get_num_threads()


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Run torch's own operations on one thread, native ones on as many as before; also a decorator.

    After every operation that torch shares out, its threads spin for milliseconds, on the cores where ours should run:
    with two cores, a step of eight layers of a 35B-A3B took 27 ms instead of 20.
    """
    before = torch.get_num_threads()
    token = _kept.set(native_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _kept.reset(token)
