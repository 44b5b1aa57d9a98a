"""The bytes of a model's tensors, read from its files as they are asked for.

Owns open files and reading rows. Does not own headers (`reader.py`) or what the bytes mean (`decode.py`). Called by
`load.py` and `metadata.py`.

Files are read and not mapped: a file that another program truncates meanwhile gives a short read, which is an error
that says so; pages of a map that are gone would end the process with a bus error, however recently the size was
checked. A file that is rewritten in place at the same size is not noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from hybridkv.errors import ModelFileError
from hybridkv.gguf.reader import Header, TensorInfo


class TensorRows:
    """Rows of bytes that lie one behind the other in a file.

    A slice of them is uint8 `[n, row_bytes]`, read at that moment.
    """

    __slots__ = ("_file", "_header", "_n_rows", "_offset", "row_bytes")

    def __init__(self, file: FileIO, header: Header, offset: int, n_rows: int, row_bytes: int) -> None:
        self._file, self._header = file, header
        self._offset, self._n_rows, self.row_bytes = offset, n_rows, row_bytes

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, rows: slice) -> NDArray[np.uint8]:
        start, stop, step = rows.indices(self._n_rows)
        assert step == 1, rows
        data = np.empty((max(0, stop - start), self.row_bytes), np.uint8)
        left = data.reshape(-1).data
        try:
            self._file.seek(self._offset + start * self.row_bytes)
            while left:
                n_read = self._file.readinto(left)
                if not n_read:
                    self._shrunk()
                left = left[n_read:]
        except OSError as error:
            raise ModelFileError(f"{self._header.path} cannot be read: {error.strerror}") from error
        return data

    def stack(self, n: int) -> list[TensorRows]:
        """Cut into `n` matrices of as many rows each."""
        each = self._n_rows // n
        assert each * n == self._n_rows, (self._n_rows, n)
        step = each * self.row_bytes
        return [TensorRows(self._file, self._header, self._offset + i * step, each, self.row_bytes) for i in range(n)]

    def _shrunk(self) -> NoReturn:
        _changed(self._header, self._file.seek(0, 2))


class OpenModel:
    """A model's files, open for reading; see `open_model`."""

    def __init__(self, parts: Sequence[Header], files: Sequence[FileIO]) -> None:
        self._parts, self._files = parts, files

    def rows(self, info: TensorInfo, n_rows: int | None = None) -> TensorRows:
        """Return a tensor as `n_rows` rows, those of its shape by default; nothing is read yet."""
        n_rows = math.prod(info.shape[:-1]) if n_rows is None else n_rows
        return TensorRows(self._files[info.part], self._parts[info.part], info.offset, n_rows, info.nbytes // n_rows)


@contextmanager
def open_model(header: Header) -> Iterator[OpenModel]:
    """Open all files of a model.

    Raises
    ------
    ModelFileError
        If a file is gone or no longer has the size that its header was checked against.
    """
    parts = header.parts or (header,)
    with ExitStack() as stack:
        yield OpenModel(parts, [stack.enter_context(_open(part)) for part in parts])


def _open(header: Header) -> FileIO:
    try:
        file = FileIO(header.path)
        if (size := file.seek(0, 2)) != header.file_bytes:
            file.close()
            _changed(header, size)
    except OSError as error:
        raise ModelFileError(f"{header.path} cannot be opened: {error.strerror}") from error
    return file


def _changed(header: Header, size: int) -> NoReturn:
    raise ModelFileError(
        f"{header.path} changed from {header.file_bytes} to {size} bytes while it was being read",
        hint="another program writes this file, a download for instance; wait until it is done",
    )
