"""Work on the CPU in the middle of a device's step: between two kernels, or between two recordings.

A step's code says where the CPU needs what the device has computed, what it does with it, and what the device does
meanwhile. Whoever runs the code decides how: `Waits` waits for the device, a recorder ends one recording and begins
the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch

Work = Callable[[], None]


class HostWork(Protocol):
    """The place for a step's work on the CPU."""

    def run(self, work: Work, meanwhile: Work | None = None) -> None:
        """Do the work once the device has done what it was asked up to now.

        Parameters
        ----------
        meanwhile
            Asks the device for something that overlaps with the work; None for nothing.
        """
        ...


class Waits:
    """Waits for the device, and does the work at once.

    Parameters
    ----------
    device
        Whose step it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def run(self, work: Work, meanwhile: Work | None = None) -> None:
        """Ask the device for the rest, wait for an event before that, and work."""
        if self._event is not None:
            self._event.record()
        if meanwhile is not None:
            meanwhile()
        if self._event is not None:
            self._event.synchronize()
        work()


_current: ContextVar[HostWork | None] = ContextVar("a step's work on the CPU", default=None)


def host_work(device: torch.device) -> HostWork:
    """Return where work on the CPU goes in the step that is running."""
    found = _current.get()
    return Waits(device) if found is None else found


@contextmanager
def sent_to(place: HostWork) -> Iterator[None]:
    """Send the work of steps inside the block there."""
    token = _current.set(place)
    try:
        yield
    finally:
        _current.reset(token)
