"""GGUF headers: metadata and tensor table, checked against the file before anything is believed.

Owns the walk over the header of a GGUF file (version 2 and 3, little-endian). Does not own the tensors' bytes
(`rows.py`), what the metadata means (`metadata.py`, `architectures/`) or how bytes become values (`decode.py`).
Called by `split.py`.

The file is mapped for the walk: one that another program truncates in the moment of it still ends the process with a
bus error. The weights are read, not mapped.

A header is untrusted input: a count, length, size or offset is compared with the bytes that are left
before it is allocated, looped over or sliced, so that a damaged file costs one error and no memory.
gguf-py's own reader trusts them; its constants are used, its reader is not.

Source: the GGUF specification (ggml, docs/gguf.md); ggml refuses nested arrays too (ggml.c).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from hybridkv.errors import ModelFileError

Value = int | float | bool | str | list[str] | NDArray[Any]

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# Ceilings far above any real model. The file size bounds most things already; these keep a damaged
# header in front of tens of gigabytes of weights from being walked through the weights.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_NAME_BYTES = (1 << 16) - 1
MAX_STRING_BYTES = 1 << 26
MAX_ARRAY_LENGTH = 1 << 24
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4

# The fewest bytes an entry can take, to judge a count before looping over it.
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

_SCALARS: Mapping[int, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}

_TENSOR_TYPES: Mapping[int, GGMLQuantizationType] = {int(type_): type_ for type_ in GGML_QUANT_SIZES}

_DAMAGED = "the file is damaged or incomplete; copy or download it again and compare its size and checksum"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of one tensor in the file, and its type.

    `shape` is in Torch's order (slowest dimension first, the reverse of GGUF's `ne`), `offset` counts
    from the start of the file; `part` is the file's number in a split model.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    nbytes: int
    offset: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """All that a GGUF file says before its weights.

    The header of a split model has all parts' tensors and, in `parts`, each part's own header (`split.py`).
    """

    path: Path
    file_bytes: int
    version: int
    architecture: str
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    parts: tuple[Header, ...] = ()


def read_header(path: str | Path) -> Header:
    """Read the metadata and the tensor table; the weights are not touched.

    Raises
    ------
    ModelFileError
        For a file that is missing, unreadable, truncated, damaged, or not GGUF version 2 or 3.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ModelFileError(f"{path} is a directory, not a GGUF file", hint="name the .gguf file in it")
        if not path.is_file():
            raise ModelFileError(f"{path}: no such file", hint="check the path given as the model")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise ModelFileError(f"{path} is empty", hint=_DAMAGED)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walk(path, data).header()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from error


class _Walk:
    """One pass over the header; `pos` never moves past a byte that was not checked to exist."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0

    def fail(self, what: str, *, hint: str = _DAMAGED) -> NoReturn:
        raise ModelFileError(f"{self.path}: {what} (at byte {self.pos} of {self.size})", hint=hint)

    def header(self) -> Header:
        version, n_tensors, n_keys = self.preamble()
        metadata = self.metadata(n_keys)
        architecture = metadata.get("general.architecture", "")
        # Only the first part of a split model says what it is; files of other kinds need no architecture (`kinds.py`).
        named = architecture or metadata.get("split.no") or metadata.get("general.type", "model") != "model"
        if not isinstance(architecture, str) or not named:
            self.fail("the metadata has no text 'general.architecture'", hint="is this a model file?")
        alignment = self.alignment(metadata)
        tensors = self.tensors(n_tensors, alignment)
        return Header(self.path, self.size, version, architecture, MappingProxyType(metadata), tuple(tensors))

    def preamble(self) -> tuple[int, int, int]:
        if self.size < 24:
            self.fail(f"{self.size} bytes are less than a GGUF header")
        if (magic := self.data[:4]) != MAGIC:
            self.fail(
                f"not a GGUF file: starts with {magic!r}, not {MAGIC!r}", hint="give a .gguf file or a model directory"
            )
        version, n_tensors, n_keys = struct.unpack_from("<IQQ", self.data, 4)
        self.pos = 4
        if version not in VERSIONS:
            if version and version & 0xFFFF == 0:
                self.fail("the file is big-endian", hint="convert it to little-endian with gguf-py")
            self.fail(f"GGUF version {version}; supported: {', '.join(map(str, VERSIONS))}")
        self.pos = 24
        self.check_count(n_keys, "metadata keys", MAX_KEYS, _MIN_KEY_BYTES)
        self.check_count(n_tensors, "tensors", MAX_TENSORS, _MIN_TENSOR_BYTES)
        return version, n_tensors, n_keys

    def check_count(self, count: int, what: str, ceiling: int, min_bytes: int) -> None:
        if count > ceiling or count * min_bytes > self.size - self.pos:
            self.fail(f"{count} {what} do not fit into the file")

    def number(self, dtype: np.dtype[Any], what: str) -> Any:
        """Read one number or flag as a Python value."""
        if dtype.itemsize > self.size - self.pos:
            self.fail(f"the file ends inside {what}")
        value = np.frombuffer(self.data[self.pos : self.pos + dtype.itemsize], dtype)[0]
        self.pos += dtype.itemsize
        # The shortest decimal that is this float32: 1e-06 as its author wrote it, not 9.99999997e-07.
        return float(str(value)) if dtype == np.float32 else value.item()

    def integer(self, width: str, what: str) -> int:
        value: int = self.number(np.dtype(width), what)
        return value

    def text(self, what: str, ceiling: int) -> str:
        length = self.integer("<u8", what)
        if length > min(ceiling, self.size - self.pos):
            self.fail(f"{what} claims {length} bytes")
        raw = self.data[self.pos : self.pos + length]
        try:
            value = raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")
        self.pos += length
        return value

    def metadata(self, n_keys: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for index in range(n_keys):
            key = self.text(f"metadata key {index}", MAX_NAME_BYTES)
            if not key or key in metadata:
                self.fail(f"metadata key {index} {'appears twice: ' + repr(key) if key else 'is empty'}")
            metadata[key] = self.value(key)
        return metadata

    def value(self, key: str) -> Value:
        kind = self.integer("<u4", f"the type of {key!r}")
        if kind == GGUFValueType.STRING:
            return self.text(repr(key), MAX_STRING_BYTES)
        if kind == GGUFValueType.ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            self.fail(f"{key!r} has the unknown value type {kind}")
        value: int | float | bool = self.number(_SCALARS[kind], repr(key))
        return value

    def array(self, key: str) -> Value:
        kind = self.integer("<u4", f"the element type of {key!r}")
        count = self.integer("<u8", f"the length of {key!r}")
        if kind == GGUFValueType.STRING:
            self.check_count(count, f"strings of {key!r}", MAX_ARRAY_LENGTH, 8)
            return self.strings(key, count)
        if kind == GGUFValueType.ARRAY:
            self.fail(f"{key!r} is an array of arrays, which GGUF readers do not take")
        if kind not in _SCALARS:
            self.fail(f"{key!r} has the unknown element type {kind}")
        dtype = _SCALARS[kind]
        self.check_count(count, f"elements of {key!r}", MAX_ARRAY_LENGTH, dtype.itemsize)
        # Slicing the map copies, so that the array outlives it.
        raw = self.data[self.pos : self.pos + count * dtype.itemsize]
        self.pos += len(raw)
        return np.frombuffer(raw, dtype)

    def strings(self, key: str, count: int) -> list[str]:
        """Read `count` strings: `text` unrolled, because vocabularies have hundreds of thousands."""
        data, size, pos = self.data, self.size, self.pos
        length_at = struct.Struct("<Q").unpack_from
        values = []
        for index in range(count):
            if size - pos < 8:
                self.fail(f"the file ends inside element {index} of {key!r}")
            (length,) = length_at(data, pos)
            pos += 8
            if length > size - pos or length > MAX_STRING_BYTES:
                self.fail(f"element {index} of {key!r} claims {length} bytes")
            try:
                values.append(data[pos : pos + length].decode())
            except UnicodeDecodeError:
                self.fail(f"element {index} of {key!r} is not UTF-8")
            pos += length
        self.pos = pos
        return values

    def alignment(self, metadata: Mapping[str, Value]) -> int:
        value = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        is_power = isinstance(value, int) and 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0
        if not is_power or isinstance(value, bool):
            self.fail(f"'general.alignment' is {value!r}, not a power of two up to {MAX_ALIGNMENT}")
        assert isinstance(value, int)
        return value

    def tensors(self, count: int, alignment: int) -> list[TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for index in range(count):
            info = self.tensor(index, alignment)
            if info.name in tensors:
                self.fail(f"tensor {info.name!r} appears twice")
            tensors[info.name] = info
        start = -(-self.pos // alignment) * alignment
        placed = [
            TensorInfo(info.name, info.shape, info.type, info.nbytes, start + info.offset) for info in tensors.values()
        ]
        self.check_placement(placed)
        return placed

    def tensor(self, index: int, alignment: int) -> TensorInfo:
        """Read one entry of the tensor table; its offset still counts from the start of the data."""
        name = self.text(f"the name of tensor {index}", MAX_NAME_BYTES)
        n_dims = self.integer("<u4", f"tensor {name!r}")
        if not name or not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"tensor {index} {name!r} has {n_dims} dimensions; allowed: 1 to {MAX_DIMS}")
        dims = [self.integer("<u8", f"the shape of tensor {name!r}") for _ in range(n_dims)]
        kind = self.integer("<u4", f"the type of tensor {name!r}")
        offset = self.integer("<u8", f"the offset of tensor {name!r}")
        if kind not in _TENSOR_TYPES:
            self.fail(
                f"tensor {name!r} has type number {kind}, which gguf-py does not know",
                hint="requantize the model to a type of mainline ggml, such as q8_0",
            )
        type_ = _TENSOR_TYPES[kind]
        block, block_bytes = GGML_QUANT_SIZES[type_]
        if 0 in dims or dims[0] % block:
            self.fail(f"tensor {name!r}: {type_.name} blocks of {block} do not fill dimensions {dims}")
        if offset % alignment:
            self.fail(f"tensor {name!r} starts at {offset}, which is no multiple of {alignment}")
        # Python's integers do not overflow, so a product beyond 64 bits is simply out of the file.
        return TensorInfo(name, tuple(reversed(dims)), type_, math.prod(dims) // block * block_bytes, offset)

    def check_placement(self, tensors: list[TensorInfo]) -> None:
        """Refuse tensors outside the file, and any two that share bytes: one offset must be wrong."""
        for info in tensors:
            if info.offset + info.nbytes > self.size:
                self.fail(
                    f"tensor {info.name!r} ({info.type.name}, {info.nbytes} bytes at {info.offset}) "
                    f"reaches beyond the end of the file"
                )
        for one, two in pairwise(sorted(tensors, key=lambda info: info.offset)):
            if one.offset + one.nbytes > two.offset:
                self.fail(f"tensors {one.name!r} and {two.name!r} overlap")
