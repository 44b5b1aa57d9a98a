from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest

from hybridkv.errors import ModelFileError
from hybridkv.gguf.reader import Value, read_header
from hybridkv.gguf.rows import open_model
from tests.gguf import raw
from tests.gguf.reference import REFERENCE

F32_VECTOR = raw.tensor("a", [8])
HUGE = 2**62


def list_of(value: Value) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value


def test_header_equals_what_gguf_py_reads() -> None:
    header = read_header(REFERENCE)
    oracle = gguf_py.GGUFReader(REFERENCE)
    assert header.architecture == "qwen35"
    assert header.version == 3
    assert header.file_bytes == REFERENCE.stat().st_size
    fields = {key: field for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, field in fields.items():
        ours = header.metadata[key]
        assert (np.float32(ours) if isinstance(ours, float) else list_of(ours)) == field.contents()
    assert len(header.tensors) == len(oracle.tensors)
    with open_model(header) as files:
        for info, theirs in zip(header.tensors, oracle.tensors, strict=True):
            assert info.name == theirs.name
            assert info.shape == tuple(int(dim) for dim in reversed(theirs.shape))
            assert (info.type, info.nbytes, info.offset) == (
                theirs.tensor_type,
                theirs.n_bytes,
                theirs.data_offset,
            )
            assert np.array_equal(files.rows(info)[:].reshape(-1), theirs.data.view(np.uint8).reshape(-1))


def test_every_value_type(tmp_path: Path) -> None:
    scalars = {
        raw.U8: ("<B", 255),
        raw.I8: ("<b", -128),
        raw.U16: ("<H", 65535),
        raw.I16: ("<h", -3),
        raw.U32: ("<I", 2**32 - 1),
        raw.I32: ("<i", -7),
        raw.F32: ("<f", 1e-6),
        raw.BOOL: ("<?", True),
        raw.U64: ("<Q", 2**64 - 1),
        raw.I64: ("<q", -(2**63)),
        raw.F64: ("<d", 0.1),
    }
    keys = [raw.key(f"s{kind}", kind, struct.pack(form, value)) for kind, (form, value) in scalars.items()]
    keys += [
        raw.key(f"a{kind}", raw.ARRAY, raw.array(kind, 3, struct.pack(form, value) * 3))
        for kind, (form, value) in scalars.items()
    ]
    words = ["", "é", "Ġthe", "\0"]
    keys += [
        raw.key("text", raw.STRING, raw.text("ünï")),
        raw.key("texts", raw.ARRAY, raw.array(raw.STRING, 4, b"".join(map(raw.text, words)))),
        raw.key("none", raw.ARRAY, raw.array(raw.F32, 0, b"")),
    ]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw.gguf(keys))
    metadata = read_header(path).metadata
    for kind, (form, value) in scalars.items():
        assert metadata[f"s{kind}"] == value
        assert type(metadata[f"s{kind}"]) is type(value)
        array = metadata[f"a{kind}"]
        assert isinstance(array, np.ndarray)
        assert array.tolist() == list(struct.unpack(form[0] + 3 * form[1], struct.pack(form, value) * 3))
    assert metadata["text"] == "ünï"
    assert metadata["texts"] == words
    assert len(metadata["none"]) == 0


@pytest.mark.parametrize("version", [2, 3])
def test_tensor_table(tmp_path: Path, version: int) -> None:
    path = tmp_path / "x.gguf"
    keys = [raw.key("general.alignment", raw.U32, struct.pack("<I", 64))]
    tensors = [raw.tensor("a", [2, 3, 1, 5], 1, 128), raw.tensor("b", [64], 8, 0)]
    path.write_bytes(raw.gguf(keys, tensors, data=bytes(188), alignment=64, version=version))
    one, two = read_header(path).tensors
    start = path.stat().st_size - 188
    assert start % 64 == 0
    assert (one.name, one.shape, one.nbytes, one.offset) == ("a", (5, 1, 3, 2), 60, start + 128)
    assert (two.name, two.shape, two.nbytes, two.offset) == ("b", (64,), 68, start)


DEFECTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "short": (b"GGUF\3\0\0\0", "8 bytes are less than a GGUF header"),
    "magic": (raw.gguf(magic=b"GGML"), "starts with b'GGML'"),
    "version": (raw.gguf(version=1), "GGUF version 1; supported: 2, 3"),
    "big-endian": (raw.gguf(version=0x03000000), "big-endian"),
    "no architecture": (raw.gguf(architecture=b""), "no text 'general.architecture'"),
    "architecture is a number": (
        raw.gguf(architecture=raw.key(raw.ARCHITECTURE, raw.U32, bytes(4))),
        "no text 'general.architecture'",
    ),
    "more keys than bytes": (raw.gguf(n_keys=HUGE), "metadata keys do not fit"),
    "one key more": (raw.gguf(n_keys=2), "metadata keys do not fit|ends inside|claims"),
    "more tensors than bytes": (raw.gguf(n_tensors=HUGE), "tensors do not fit"),
    "too many keys": (raw.gguf(n_keys=2**17, data=bytes(2**21)), "metadata keys do not fit"),
    "key without name": (raw.gguf([raw.key("", raw.U8, b"\0")]), "metadata key 1 is empty"),
    "key of 64 KiB": (raw.gguf([raw.key("k" * 65536, raw.U8, b"\0")]), "metadata key 1 claims 65536 bytes"),
    "key twice": (raw.gguf([raw.key("k", raw.U8, b"\0")] * 2), "appears twice: 'k'"),
    "key is not UTF-8": (raw.gguf([raw.key(b"\xff", raw.U8, b"\0")]), "not UTF-8"),
    "value type": (raw.gguf([raw.key("k", 13, bytes(8))]), "'k' has the unknown value type 13"),
    "value cut": (raw.gguf([raw.key("key", raw.U64, bytes(7))]), "ends inside 'key'"),
    "string length": (
        raw.gguf([raw.key("k", raw.STRING, struct.pack("<Q", HUGE))]),
        f"'k' claims {HUGE} bytes",
    ),
    "string beyond the ceiling": (
        raw.gguf([raw.key("k", raw.STRING, struct.pack("<Q", 2**27))], data=bytes(2**20)),
        "claims",
    ),
    "string is not UTF-8": (raw.gguf([raw.key("k", raw.STRING, raw.text(b"\xc3"))]), "'k' is not UTF-8"),
    "array type": (raw.gguf([raw.key("k", raw.ARRAY, raw.array(99, 0, b""))]), "unknown element type 99"),
    "array of arrays": (
        raw.gguf([raw.key("k", raw.ARRAY, raw.array(raw.ARRAY, 1, raw.array(raw.U8, 1, b"\0")))]),
        "array of arrays",
    ),
    "array length": (
        raw.gguf([raw.key("k", raw.ARRAY, raw.array(raw.F64, HUGE, b""))]),
        f"{HUGE} elements of 'k' do not fit",
    ),
    "array longer than the file": (
        raw.gguf([raw.key("k", raw.ARRAY, raw.array(raw.F64, 3, bytes(23)))]),
        "3 elements of 'k' do not fit",
    ),
    "strings longer than the file": (
        raw.gguf([raw.key("k", raw.ARRAY, raw.array(raw.STRING, HUGE, b""))]),
        f"{HUGE} strings of 'k' do not fit",
    ),
    "element length": (
        raw.gguf([raw.key("k", raw.ARRAY, raw.array(raw.STRING, 2, raw.text("a") + struct.pack("<Q", 1)))]),
        "element 1 of 'k' claims 1 bytes",
    ),
    "element cut": (
        raw.gguf([raw.key("k", raw.ARRAY, raw.array(raw.STRING, 2, raw.text("abcdefgh") + bytes(7)))]),
        "ends inside element 1 of 'k'",
    ),
    "element is not UTF-8": (
        raw.gguf([raw.key("k", raw.ARRAY, raw.array(raw.STRING, 1, raw.text(b"\xe2\x82")))]),
        "element 0 of 'k' is not UTF-8",
    ),
    "alignment zero": (
        raw.gguf([raw.key("general.alignment", raw.U32, bytes(4))]),
        "'general.alignment' is 0",
    ),
    "alignment 24": (
        raw.gguf([raw.key("general.alignment", raw.U32, struct.pack("<I", 24))]),
        "'general.alignment' is 24, not a power of two",
    ),
    "alignment is true": (
        raw.gguf([raw.key("general.alignment", raw.BOOL, b"\1")]),
        "'general.alignment' is True",
    ),
    "alignment is text": (
        raw.gguf([raw.key("general.alignment", raw.STRING, raw.text("32"))]),
        "'general.alignment' is '32'",
    ),
    "tensor without name": (raw.gguf(tensors=[raw.tensor("", [8])], data=bytes(32)), "tensor 0 ''"),
    "no dimensions": (
        raw.gguf(tensors=[raw.tensor("a", [])], data=bytes(32)),
        "0 dimensions; allowed: 1 to 4",
    ),
    "five dimensions": (raw.gguf(tensors=[raw.tensor("a", [1] * 5)], data=bytes(32)), "5 dimensions"),
    "dimension zero": (raw.gguf(tensors=[raw.tensor("a", [8, 0])], data=bytes(32)), "do not fill"),
    "row is no multiple of the block": (
        raw.gguf(tensors=[raw.tensor("a", [48], 8)], data=bytes(64)),
        "Q8_0 blocks of 32 do not fill dimensions",
    ),
    "product beyond 64 bits": (
        raw.gguf(tensors=[raw.tensor("a", [2**63, 2**63, 2**63, 2])], data=bytes(32)),
        "reaches beyond the end",
    ),
    "tensor type": (raw.gguf(tensors=[raw.tensor("a", [8], 133)], data=bytes(32)), "'a' has type number 133"),
    "offset not aligned": (
        raw.gguf(tensors=[raw.tensor("a", [8], 0, 8)], data=bytes(64)),
        "no multiple of 32",
    ),
    "offset not of the file's own alignment": (
        raw.gguf(
            [raw.key("general.alignment", raw.U32, struct.pack("<I", 64))],
            [raw.tensor("a", [8], 0, 32)],
            data=bytes(128),
            alignment=64,
        ),
        "no multiple of 64",
    ),
    "out of the file": (
        raw.gguf(tensors=[raw.tensor("a", [8], 0, 32)], data=bytes(63)),
        "tensor 'a' .* beyond",
    ),
    "offset beyond 64 bits": (
        raw.gguf(tensors=[raw.tensor("a", [8], 0, 2**64 - 32)], data=bytes(32)),
        "reaches beyond the end",
    ),
    "tensor twice": (raw.gguf(tensors=[F32_VECTOR] * 2, data=bytes(32)), "'a' appears twice"),
    "overlap": (
        raw.gguf(tensors=[F32_VECTOR, raw.tensor("b", [16], 0, 0)], data=bytes(64)),
        "tensors 'a' and 'b' overlap",
    ),
    "one tensor more": (raw.gguf(tensors=[F32_VECTOR], n_tensors=2, data=bytes(64)), "tensor 1"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_one_clear_error_and_no_memory(tmp_path: Path, name: str) -> None:
    content, message = DEFECTS[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=message) as caught:
            read_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="is a directory"):
        read_header(tmp_path)
    with pytest.raises(ModelFileError, match="cannot be read: File name too long"):
        read_header(tmp_path / ("n" * 300))


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw.gguf())

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelFileError, match="cannot be read: Permission denied"):
        read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw.gguf(tensors=[F32_VECTOR], data=bytes(32)))
    header = read_header(path)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ModelFileError, match=f"changed from {size} to {size - 1} bytes"), open_model(header):
        pass
    path.unlink()
    with pytest.raises(ModelFileError, match="cannot be opened: No such file"), open_model(header):
        pass


@pytest.mark.parametrize("left", [0, -1, -32])
def test_a_file_that_shrinks_while_its_tensors_are_read(tmp_path: Path, left: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw.gguf(tensors=[F32_VECTOR, raw.tensor("b", [8], 0, 32)], data=bytes(64)))
    header, size = read_header(path), path.stat().st_size
    with open_model(header) as files:
        assert files.rows(header.tensors[0])[:].shape == (1, 32)
        left = left if left == 0 else size + left
        os.truncate(path, left)
        with pytest.raises(ModelFileError, match=f"changed from {size} to {left} bytes .*\nhint: another program"):
            files.rows(header.tensors[1])[:]


def test_the_header_is_read_without_the_weights(tmp_path: Path) -> None:
    """A sparse file with 256 GiB of zeros for weights: reading those would take minutes."""
    n = 2**36
    path = tmp_path / "big.gguf"
    path.write_bytes(raw.gguf(tensors=[raw.tensor("w", [2**16, n >> 16])]))
    start = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start + 4 * n)
    started = time.process_time()
    header = read_header(path)
    assert time.process_time() - started < 1
    assert header.tensors[0].nbytes == 4 * n


def test_a_lying_count_does_not_walk_through_zeros(tmp_path: Path) -> None:
    """Zeros read as empty strings: only the ceiling ends an array that runs into such weights."""
    path = tmp_path / "big.gguf"
    path.write_bytes(raw.gguf([raw.key("k", raw.ARRAY, raw.array(raw.STRING, 2**32, b""))]))
    with path.open("r+b") as file:
        file.truncate(2**38)
    with pytest.raises(ModelFileError, match=f"{2**32} strings of 'k' do not fit"):
        read_header(path)


def test_a_vocabulary_of_150_thousand_tokens_is_quick(tmp_path: Path) -> None:
    n = 151936
    tokens = b"".join(raw.text(f"Ġtoken{index}") for index in range(n))
    path = tmp_path / "x.gguf"
    path.write_bytes(raw.gguf([raw.key("tokens", raw.ARRAY, raw.array(raw.STRING, n, tokens))]))
    started = time.process_time()
    values = read_header(path).metadata["tokens"]
    assert time.process_time() - started < 1
    assert isinstance(values, list)
    assert values[-1] == f"Ġtoken{n - 1}"


def test_reading_a_header_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from hybridkv.gguf.reader import read_header; read_header(sys.argv[1]);"
        "print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(REFERENCE)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
