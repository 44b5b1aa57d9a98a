"""Damaged files: whatever is cut or flipped, the answer is a value or a `ModelFileError`, soon and cheaply.

Two victims: a header with every value type, for the reader, and a whole model, for everything behind it.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridkv.errors import ModelFileError
from hybridkv.gguf.load import load_gguf
from hybridkv.gguf.reader import read_header
from hybridkv.gguf.rows import open_model
from tests.gguf import raw
from tests.gguf.reference import config_from_gguf
from tests.gguf.write_qwen35 import draft, tiny_model

DETERMINED = settings(
    derandomize=True,
    database=None,
    deadline=None,  # `soon` counts the processor's time: a busy or paused machine is not a slow reader
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Values that break arithmetic, for whole fields at a time.
EXTREMES = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


SIZES = {
    raw.U8: 1,
    raw.I16: 2,
    raw.U32: 4,
    raw.F32: 4,
    raw.BOOL: 1,
    raw.U64: 8,
    raw.F64: 8,
}


@cache
def header() -> bytes:
    numbers = [raw.key(f"n{kind}", kind, struct.pack("<Q", 3)[:size]) for kind, size in SIZES.items()]
    arrays = [raw.key(f"a{kind}", raw.ARRAY, raw.array(kind, 3, bytes(3 * size))) for kind, size in SIZES.items()]
    words = raw.array(raw.STRING, 3, raw.text("one") + raw.text("") + raw.text("drei"))
    texts = [raw.key("text", raw.STRING, raw.text("words")), raw.key("words", raw.ARRAY, words)]
    alignment = raw.key("general.alignment", raw.U32, struct.pack("<I", 32))
    tensors = [
        raw.tensor("a", [4, 2], 0, 0),
        raw.tensor("b", [32, 2, 1], 8, 32),
        raw.tensor("c", [8], 1, 128),
    ]
    return raw.gguf([*numbers, *arrays, *texts, alignment], tensors, data=bytes(144))


@contextmanager
def soon() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


def read_all(path: Path) -> int:
    """Read a header and every tensor's bytes; return the peak of the memory that took."""
    tracemalloc.start()
    with soon(), suppress(ModelFileError):
        found = read_header(path)
        with open_model(found) as files:
            for info in found.tensors:
                assert files.rows(info)[:].nbytes == info.nbytes
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_the_victim_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header())
    assert len(read_header(path).tensors) == 3


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    """The last tensor ends with the file, so that no cut goes unnoticed."""
    path = tmp_path / "x.gguf"
    for length in range(len(header())):
        path.write_bytes(header()[:length])
        with pytest.raises(ModelFileError):
            read_header(path)


@settings(DETERMINED, max_examples=600)
@given(flips=st.lists(st.tuples(st.integers(0, len(header()) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_a_header(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(header())
    for position, bits in flips:
        content[position] ^= bits
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert read_all(path) < 2**20


@settings(DETERMINED, max_examples=600)
@given(
    position=st.integers(0, len(header()) - 8),
    width=st.sampled_from([4, 8]),
    value=st.sampled_from(EXTREMES),
)
def test_extreme_fields_in_a_header(tmp_path: Path, position: int, width: int, value: int) -> None:
    content = bytearray(header())
    content[position : position + width] = value.to_bytes(8, "little")[:width]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert read_all(path) < 2**20


@settings(DETERMINED, max_examples=400)
@given(tail=st.binary(max_size=200), counts=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_random_bytes_behind_the_magic(tmp_path: Path, tail: bytes, counts: tuple[int, int]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + tail)
    assert read_all(path) < 2**20


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    path = draft(tiny_model()).write(tmp_path_factory.mktemp("fuzz") / "x.gguf")
    return path, path.read_bytes(), min(info.offset for info in read_header(path).tensors)


def load_all(path: Path) -> None:
    for load in (config_from_gguf, load_gguf):
        with soon(), suppress(ModelFileError):
            load(path)


@settings(DETERMINED, max_examples=100)
@given(data=st.data())
def test_flipped_bytes_in_a_model(model_file: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, content, header_bytes = model_file
    # The architecture's keys come first and decide most: flips are not to drown in the vocabulary.
    end = data.draw(st.sampled_from([1400, header_bytes]))
    changed = bytearray(content)
    for position in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=3)):
        changed[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    load_all(path)


@settings(DETERMINED, max_examples=100)
@given(data=st.data())
def test_extreme_fields_in_a_model(model_file: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, content, header_bytes = model_file
    position = data.draw(st.integers(24, data.draw(st.sampled_from([1400, header_bytes])) - 8))
    width, value = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from(EXTREMES))
    changed = bytearray(content)
    changed[position : position + width] = value.to_bytes(8, "little")[:width]
    path.write_bytes(changed)
    load_all(path)
