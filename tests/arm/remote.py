"""A pytest plugin: tests that call `hybridkv._cpu` reach the kernels of another processor under its emulator.

The program is that of `tests/arm/run.py`. It reads and writes this process's memory while a call waits for it, so that
tests need not know. `HYBRIDKV_REMOTE_CPU` is the command that starts it.
"""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType

import hybridkv

_ERRORS = {"A": AttributeError, "V": ValueError, "I": IndexError, "R": RuntimeError}
_APART = 4 << 30  # bytes between this process's memory and whatever the emulator keeps for itself
_ATTEMPTS = 50


def pack(value: object) -> bytes:
    """One value as the program reads it."""
    if isinstance(value, str):
        return b"s" + struct.pack("q", len(value.encode())) + value.encode()
    if isinstance(value, Integral):
        number = int(value)
        return b"i" + struct.pack("Q" if number >= 1 << 63 else "q", number)
    if isinstance(value, Real):
        return b"d" + struct.pack("d", float(value))
    assert isinstance(value, list | tuple), type(value)
    return b"l" + struct.pack("q", len(value)) + b"".join(map(pack, value))


def unpack(data: bytes, at: int = 0) -> tuple[object, int]:
    """The value at a place, and where the next one is."""
    tag, at = chr(data[at]), at + 1
    if tag == "n":
        return None, at
    if tag == "d":
        return struct.unpack_from("d", data, at)[0], at + 8
    (number,), at = struct.unpack_from("q", data, at), at + 8
    if tag == "i":
        return number, at
    if tag == "s":
        return data[at : at + number].decode(), at + number
    items = []
    for _ in range(number):
        item, at = unpack(data, at)
        items.append(item)
    return items, at


class Server:
    """The program, and its functions."""

    def __init__(self, command: list[str]) -> None:
        self._turn = threading.Lock()
        memory = os.open("/proc/self/mem", os.O_RDWR)
        for _ in range(_ATTEMPTS):
            self._process = subprocess.Popen(
                [*command, str(memory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(memory,)
            )
            self.call("isas")
            if _apart(self._process.pid):
                return
            self._process.kill()
            self._process.communicate()
        raise RuntimeError(f"the emulator's memory lay within {_APART} bytes of this process's {_ATTEMPTS} times")

    def call(self, name: str, *arguments: object) -> object:
        question = pack(name) + b"".join(map(pack, arguments))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._turn:
            self._process.stdin.write(struct.pack("q", len(question)) + question)
            self._process.stdin.flush()
            size = self._process.stdout.read(8)
            if len(size) < 8:
                raise RuntimeError(f"the kernels' program ended with status {self._process.wait()} in {name}")
            answer = self._process.stdout.read(struct.unpack("q", size)[0])
        value, _ = unpack(answer, 1)
        if answer[:1] != b"=":
            raise _ERRORS[chr(answer[0])](value)
        return value


def _maps(process: int | str) -> list[tuple[int, int]]:
    """What a process has mapped."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    ranges = [line.split(maxsplit=1)[0].split("-") for line in lines if "vsyscall" not in line]
    return [(int(begin, 16), int(end, 16)) for begin, end in ranges]


def _apart(pid: int) -> bool:
    """Whether no address of this process, now or soon, means something else to the program."""
    theirs = _maps(pid)
    return all(b + _APART <= c or d + _APART <= a for a, b in _maps("self") for c, d in theirs)


class Remote(ModuleType):
    """What stands for the extension."""

    def __init__(self, server: Server) -> None:
        super().__init__("hybridkv._cpu")
        self.FORMATS = server.call("FORMATS")
        self.Program = type("Program", (_Program,), {"server": server})
        self._server = server

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments: self._server.call(name, *arguments)


class _Program:
    """An object of the server's, by its number."""

    server: Server

    def __init__(self, *arguments: object) -> None:
        self._number = self.server.call("Program", *arguments)

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *arguments: self.server.call(f"Program.{name}", self._number, *arguments)

    def __len__(self) -> int:
        length = self.server.call("Program.__len__", self._number)
        assert isinstance(length, int)
        return length

    def __del__(self) -> None:
        self.server.call("Program.free", self._number)


def _install() -> None:
    module = Remote(Server(shlex.split(os.environ["HYBRIDKV_REMOTE_CPU"])))
    sys.modules["hybridkv._cpu"] = module
    hybridkv._cpu = module


_install()
