"""The requests of other threads to a scheduler: sequences that wait to begin, and work between two iterations.

Owns the queue and its lock. `hybridkv.engine.scheduler` takes from it on its own thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from hybridkv.engine.requests import RequestHandle
from hybridkv.engine.running_sequence import RunningSequence
from hybridkv.errors import AdmissionError, HybridKVError

T = TypeVar("T")


class Intake:
    """Sequences that wait, and commands.

    Parameters
    ----------
    most
        Sequences that may wait.

    Attributes
    ----------
    is_open
        Whether requests are still taken.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[RunningSequence] = deque()
        self._commands: deque[tuple[Future[Any], Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._n_taken = 0
        self.is_open, self._stopped = True, False

    def __len__(self) -> int:
        """Count the sequences that wait."""
        return len(self._waiting)

    # ---- From any thread.

    def take(self, make: Callable[[int], RunningSequence], refusal: Callable[[int], AdmissionError]) -> RequestHandle:
        """Queue a sequence; its handle.

        Parameters
        ----------
        make
            Makes it, from the number that it gets.
        refusal
            The error where as many wait as may.

        Raises
        ------
        AdmissionError
            If too many wait, or no more requests are taken.
        """
        with self._changed:
            if not self.is_open:
                raise AdmissionError(
                    "the scheduler is shutting down and takes no more requests",
                    reason="closed",
                    hint="send it again once the server is back",
                )
            if len(self._waiting) >= self._most:
                raise refusal(len(self._waiting))
            self._n_taken += 1
            sequence = make(self._n_taken)
            self._waiting.append(sequence)
            self._changed.notify()
        return sequence.handle

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have something done between two iterations, on the scheduler's thread.

        Raises
        ------
        AdmissionError
            If the scheduler has stopped.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except HybridKVError as error:
                    future.set_exception(error)
                except BaseException as error:
                    future.set_exception(error)
                    raise

        with self._changed:
            if self._stopped:
                raise AdmissionError(
                    "the scheduler has stopped", reason="closed", hint="send it again once the server is back"
                )
            self._commands.append((future, run))
            self._changed.notify()
        return future

    def close(self, running: Callable[[], tuple[RunningSequence, ...]] | None) -> None:
        """Take no more requests; cancel what waits and what runs, unless `running` is None."""
        with self._changed:
            self.is_open = False
            for sequence in () if running is None else (*running(), *self._waiting):
                sequence.handle.cancel()
            self._changed.notify()

    # ---- On the scheduler's thread.

    def run_commands(self) -> None:
        """Do what was asked for."""
        while self._commands:
            self._commands.popleft()[1]()

    def wait(self) -> bool:
        """Sleep until there is something to do; False if nothing will come any more."""
        with self._changed:
            if not (self.is_open or self._waiting or self._commands):
                return False
            self._changed.wait_for(lambda: self._waiting or self._commands or not self.is_open)
        return True

    def pop(
        self, fits: Callable[[RunningSequence], bool], enter: Callable[[RunningSequence], None]
    ) -> RunningSequence | None:
        """Take out the first sequence, if it fits, and let it enter elsewhere; `close` misses none in between."""
        with self._changed:
            if not self._waiting or not fits(self._waiting[0]):
                return None
            sequence = self._waiting.popleft()
            enter(sequence)
        return sequence

    def put_back(self, sequence: RunningSequence) -> None:
        """Put a sequence before all others."""
        with self._changed:
            self._waiting.appendleft(sequence)

    def drop_cancelled(self) -> list[RunningSequence]:
        """Take out the sequences that nobody waits for any more."""
        with self._changed:
            gone = [s for s in self._waiting if s.handle.cancelled]
            self._waiting = deque(s for s in self._waiting if not s.handle.cancelled)
        return gone

    def stop(self) -> list[RunningSequence]:
        """End everything; the sequences that still waited."""
        with self._changed:
            self.is_open, self._stopped = False, True
            left = list(self._waiting)
            self._waiting.clear()
        for future, _ in self._commands:
            future.cancel()
        return left
