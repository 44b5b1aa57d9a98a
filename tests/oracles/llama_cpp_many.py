"""Oracle: llama.cpp over many small files, without a start of Python for each.

A process that has llama.cpp loaded forks one child for every file, which may end as it likes: llama.cpp calls `abort`
over some metadata.
"""

from __future__ import annotations

import importlib.util
import io
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.oracles.llama_cpp import _logits

_LENGTH = struct.Struct("<q")


class Server:
    """Logits of files, one after the other."""

    def __init__(self, process: subprocess.Popen[bytes], ids: Sequence[int]) -> None:
        self._process, self.ids = process, tuple(ids)

    def logits(self, path: Path) -> npt.NDArray[np.float32] | None:
        """Return logits `[len(ids), n_vocab]`, None where llama.cpp takes no such file."""
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        to.write(f"{path}\n".encode())
        to.flush()
        (length,) = _LENGTH.unpack(back.read(_LENGTH.size))
        return None if length == 0 else np.load(io.BytesIO(back.read(length)))


@contextmanager
def server(ids: Sequence[int]) -> Iterator[Server]:
    """Start the process for the length of a `with` block; the calling test is skipped where there is no llama.cpp."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: no llama.cpp to compare with")
    command = [sys.executable, "-m", "tests.oracles.llama_cpp_many", *map(str, ids)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    ) as process:
        yield Server(process, ids)


def _forked(path: Path, ids: list[int]) -> bytes:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as out:
                out.write(_logits(path, ids))
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    return data if os.waitpid(child, 0)[1] == 0 else b""


def _serve(ids: list[int]) -> None:
    import llama_cpp  # noqa: F401  # loaded once, before the forks

    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # the library prints there
        for line in sys.stdin:
            data = _forked(Path(line.rstrip("\n")), ids)
            out.write(_LENGTH.pack(len(data)) + data)
            out.flush()


if __name__ == "__main__":
    _serve([int(word) for word in sys.argv[1:]])
