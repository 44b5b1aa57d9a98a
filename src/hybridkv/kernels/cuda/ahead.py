"""Kernels that other processes compile while weights load, and launches that wait for theirs.

A step's kernels are compiled one after the other where each is first launched: a minute for a model on a fresh machine,
with one core at work. Here a process lists them beforehand and as many as there are cores compile them into Triton's
directory (`recording.py`). A launch whose kernel is being compiled waits for it and finds it on disk; one whose turn
has not come, or that is not listed, is compiled by this process as ever. If the other one fails, so are all.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Condition, Thread
from typing import IO, Any


class Ahead:
    """A process that compiles, and what it has said so far.

    Parameters
    ----------
    process
        Of `hybridkv.native.rehearsal`, with pipes.
    request
        A pickled request of that module.
    mark
        Written once all is compiled.
    """

    def __init__(self, process: subprocess.Popen[bytes], request: bytes, mark: Path) -> None:
        self._process, self._mark = process, mark
        self._changed = Condition()
        self._numbers: dict[tuple[str, ...], int] | None = None
        self._begun: set[int] = set()
        self._done: dict[int, float] = {}
        self._over = False
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: its output, which ends too, says so
            process.stdin.write(request)
            process.stdin.close()
        Thread(target=self._listen, args=(process.stdout,), daemon=True).start()
        self._restore = self._stand_between()

    @property
    def progress(self) -> tuple[int, int]:
        """Kernels that are compiled, and all of them; 0 of them before they are listed."""
        with self._changed:
            return len(self._done), len(self._numbers or ())

    @property
    def seconds(self) -> float:
        """Of all processes that compiled together."""
        with self._changed:
            return sum(self._done.values())

    def close(self) -> None:
        """End the process, finished or not."""
        self._restore()
        self._process.kill()
        self._process.wait()

    def wait(self, name: tuple[str, ...]) -> None:
        """Wait for a kernel that is being compiled; return at once for all others."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._numbers is not None)
            number = (self._numbers or {}).get(name)
            if number is not None and number in self._begun:
                self._changed.wait_for(lambda: self._over or number in self._done)

    def _listen(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            message = json.loads(line)
            with self._changed:
                if "names" in message:
                    self._numbers = {tuple(name): i for i, name in enumerate(message["names"])}
                elif "begun" in message:
                    self._begun.add(message["begun"])
                elif "done" in message:
                    self._done[message["done"]] = message["s"]
                elif message.get("ended"):
                    self._mark.parent.mkdir(parents=True, exist_ok=True)
                    self._mark.touch()
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._process.wait()

    def _stand_between(self) -> Callable[[], None]:
        """Wait where Triton is about to compile; return what ends that."""
        from triton.runtime.jit import JITFunction

        compile_ = JITFunction._do_compile

        def found(function: Any, key: str, *rest: Any) -> Any:
            self.wait((function.module, function.fn.__name__, key))
            return compile_(function, key, *rest)

        def restore() -> None:
            if JITFunction._do_compile is found:
                JITFunction._do_compile = compile_

        JITFunction._do_compile = found
        return restore
