"""A GGUF file as a source of weights: its tensors as they lie in the mapped file, without a copy.

Owns the maps and hands out views of them. Does not own the header's checks (`reader.py`, `load.py`), which come first.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Collection, Iterable, Iterator, Sequence
from threading import Thread, main_thread
from typing import Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from hybridkv.errors import ModelFileError
from hybridkv.formats.weights import WEIGHTS, get_weight_format
from hybridkv.gguf.reader import Header, TensorInfo
from hybridkv.kernels.cpu_native import allocate
from hybridkv.kernels.mapped import WatchedMap, lock_memory, populate
from hybridkv.kernels.weights import Weight, find_bad_block

Memory = Literal["mapped", "copied"]

_PIECE = 64 << 20
"""Bytes of a file whose pages are entered at once: as long as the end of a program may have to wait."""

_MULTIPLIED = frozenset(fmt.ggml_type for fmt in WEIGHTS.values())


def is_multiplied(type_: GGMLQuantizationType) -> bool:
    """Check whether native products read rows of a tensor type."""
    return int(type_) in _MULTIPLIED


def check_multiplied(header: Header, names: Collection[str]) -> None:
    """Check that native products read all of these tensors.

    Raises
    ------
    ModelFileError
        For the first that has another type, with what the eager backend would take.
    """
    infos = [info for info in header.tensors if info.name in names]
    bad = next((info for info in infos if not is_multiplied(info.type)), None)
    if bad is not None:
        n_bytes = 4 * sum(math.prod(info.shape) for info in infos)
        raise ModelFileError(
            f"{header.path}: tensor {bad.name!r} has type {bad.type.name}, which the native backend does not multiply; "
            f"allowed: {', '.join(WEIGHTS)}",
            hint=f"--backend eager decodes all weights to float32 ({n_bytes / 2**30:.2f} GiB), or requantize the model",
        )


class GgufSource:
    """The tensors of a file, or of a split model's files.

    Parameters
    ----------
    header
        Checked against the files.
    memory
        `mapped` reads the weights where the system's page cache has them; `copied` reads the files once into memory of
        this process.
    """

    def __init__(self, header: Header, memory: Memory = "mapped") -> None:
        parts = header.parts or (header,)
        self._watches: list[WatchedMap] = []
        self._populates = False
        self._runs = 0
        self._files = [
            self._viewed(part, data) if memory == "mapped" else _copied(data)
            for part, data in zip(parts, map(_mapped, parts), strict=True)
        ]
        self._infos = {info.name: info for info in header.tensors}
        self._weights: dict[str, Weight] = {}
        self._vectors: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        """Check whether the file has this tensor."""
        return name in self._infos

    def weight(self, name: str) -> Weight:
        """Return a matrix or a stack of matrices, as it lies; the same object each time."""
        if name not in self._weights:
            self._weights[name] = self._lying(name)
        return self._weights[name]

    def vector(self, name: str) -> Tensor:
        """Decode a small tensor: float32 in the file's shape; the same object each time."""
        if name not in self._vectors:
            info = self._infos[name]
            values = dequantize(_rows(self._files[info.part], info), info.type)
            self._vectors[name] = torch.from_numpy(np.array(values, np.float32)).view(info.shape)
        return self._vectors[name]

    def vectors(self) -> Iterable[Tensor]:
        """List the vectors that were taken."""
        return self._vectors.values()

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(data.size for data in self._files)

    def matrices(self) -> Iterable[Weight]:
        """List the matrices that were taken."""
        return self._weights.values()

    def forget(self, name: str) -> None:
        """Leave a matrix out of those that were taken."""
        self._weights.pop(name, None)

    def shown(self, name: str) -> str:
        """Return the file's own name."""
        return name

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Iterate names and shapes of all tensors of the file."""
        return ((info.name, info.shape) for info in self._infos.values())

    def verify(self) -> None:
        """Refuse to use files that have shrunk since they were mapped; called after every run over the weights.

        Raises
        ------
        ModelFileError
            If pages were gone when they were read: what was computed from them is wrong.
        """
        for watch in self._watches:
            watch.verify()
        self._runs += 1
        if self._populates and self._runs == 2:
            Thread(target=_populate, args=(self._files,)).start()

    def populate_after_use(self) -> None:
        """Bring the files' pages into this process's tables after the first tokens: using them is faster then.

        Not before: a short prompt needs few experts, and entering all pages delays the thread that needs those.
        """
        self._populates = True

    def lock(self) -> None:
        """Keep all files' pages in memory.

        Raises
        ------
        UsageError
            If the system refuses.
        """
        for data in self._files:
            lock_memory(data.ctypes.data, data.size)

    def check(self) -> str | None:
        """Name the first tensor that holds NaN or infinity, and where; None if there is none."""
        for name, info in self._infos.items():
            if not is_multiplied(info.type):
                continue  # of an image encoder: no run reads it
            where = find_bad_block(self._lying(name))
            if where is not None:
                expert, row, block = where
                return f"{name} (" + (f"expert {expert}, " if expert else "") + f"row {row}, block {block})"
        return None

    def _lying(self, name: str) -> Weight:
        info = self._infos[name]
        data = torch.from_numpy(_rows(self._files[info.part], info))
        n_out = info.shape[-2] if len(info.shape) > 1 else 1
        return Weight(get_weight_format(info.type.name), data.view(-1, n_out, data.shape[-1]), info.shape[-1])

    def _viewed(self, part: Header, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """View the same memory, watched, under a flag that Torch takes without a warning; the map forbids writing."""
        memory = (ctypes.c_uint8 * data.size).from_address(data.ctypes.data)
        watch = WatchedMap(str(part.path), data.ctypes.data, data.size)
        self._watches.append(watch)
        memory._kept = (data, watch)  # type: ignore[attr-defined]  # both live as long as the views
        view: NDArray[np.uint8] = np.ctypeslib.as_array(memory)
        return view


def _copied(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Copy the bytes into memory of this process, in large pages where the system has them."""
    copy: NDArray[np.uint8] = allocate((data.size,)).numpy()
    np.copyto(copy, data)
    return copy


def _populate(files: Sequence[NDArray[np.uint8]]) -> None:
    """Enter all pages, piece by piece, until the program ends.

    No daemon does so: a thread that comes back from native code to an interpreter that has ended aborts the process.
    """
    main = main_thread()
    for data in files:
        for begin in range(0, data.size, _PIECE):
            if not main.is_alive():
                return
            populate(data.ctypes.data + begin, min(_PIECE, data.size - begin))


def _mapped(header: Header) -> NDArray[np.uint8]:
    """Map a file, uint8 `[file_bytes]`, which is paged in as it is used.

    Raises
    ------
    ModelFileError
        If the file is gone or no longer has the size that the header was checked against.
    """
    try:
        with header.path.open("rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{header.path} cannot be mapped: {error}") from error
    if data.size != header.file_bytes:
        raise ModelFileError(
            f"{header.path} changed from {header.file_bytes} to {data.size} bytes while it was being read",
            hint="another program writes this file, a download for instance; wait until it is done",
        )
    return data


def _rows(data: NDArray[np.uint8], info: TensorInfo) -> NDArray[np.uint8]:
    """View a tensor's bytes as rows, uint8 `[rows, row_bytes]`, without a copy."""
    n_rows = math.prod(info.shape[:-1])
    return data[info.offset : info.offset + info.nbytes].reshape(n_rows, info.nbytes // n_rows)
