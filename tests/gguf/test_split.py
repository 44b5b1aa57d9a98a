"""Models in several files, written by gguf-py's own splitter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter

from hybridkv.errors import ModelFileError
from hybridkv.gguf.load import load_gguf
from hybridkv.gguf.split import read_model
from tests.gguf.reference import config_from_gguf
from tests.gguf.write_qwen35 import Draft, add_key, draft, tiny_model


def write_parts(file: Draft, directory: Path, *, name: str = "tiny", tensors_per_part: int = 15) -> list[Path]:
    writer = GGUFWriter(directory / f"{name}.gguf", file.architecture, split_max_tensors=tensors_per_part)
    for key, value in file.keys.items():
        add_key(writer, key, value)
    for tensor, values in file.tensors.items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.glob(f"{name}-*.gguf"))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    found = write_parts(draft(tiny_model()), tmp_path)
    assert len(found) == 4
    assert found[0].name == "tiny-00001-of-00004.gguf"
    return found


@pytest.mark.parametrize("asked", [0, 2, 3])
def test_any_part_loads_the_model(parts: list[Path], asked: int) -> None:
    model = tiny_model()
    loaded = load_gguf(parts[asked])
    assert loaded.name == "tiny"
    for name, value in model.state_dict().items():
        assert torch.allclose(loaded.model.state_dict()[name], value, rtol=1e-6, atol=3e-7), name
    assert config_from_gguf(parts[asked]).num_hidden_layers == 4
    header = read_model(parts[asked])
    assert {info.part for info in header.tensors} == {0, 1, 2, 3}


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_missing_part_is_named(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    asked = parts[2]
    with pytest.raises(ModelFileError, match=f"part {missing + 1} of 4 is missing: .*{parts[missing].name}"):
        load_gguf(asked)


def test_a_part_of_another_model_is_named(parts: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    four = write_parts(draft(tiny_model()), other, tensors_per_part=15)
    five = write_parts(draft(tiny_model(tied=False)), other, name="more", tensors_per_part=15)
    shutil.copy(four[2], parts[1])
    with pytest.raises(ModelFileError, match=r"00002-of-00004.gguf: it says that it is part 3 of 4, where part 2"):
        load_gguf(parts[0])
    shutil.copy(five[1], parts[1])
    with pytest.raises(ModelFileError, match=r"00002-of-00004.gguf: it is a part of another model than tiny-00001"):
        load_gguf(parts[0])


def test_a_part_under_another_name(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(ModelFileError, match="it is one of 4 parts, and not named like one"):
        load_gguf(renamed)


@pytest.mark.parametrize("spoiled", ["cut", "empty", "text"])
def test_a_damaged_part_is_named(parts: list[Path], spoiled: str) -> None:
    raw = parts[1].read_bytes()
    parts[1].write_bytes({"cut": raw[:-100], "empty": b"", "text": b"no model at all, but a text"}[spoiled])
    with pytest.raises(ModelFileError, match=r"tiny-00002-of-00004.gguf"):
        load_gguf(parts[0])


def test_a_tensor_in_two_parts(parts: list[Path]) -> None:
    first, other = b"blk.0.attn_norm.weight", b"blk.3.attn_norm.weight"
    assert first in parts[0].read_bytes()
    holder = next(part for part in parts[1:] if other in part.read_bytes())
    holder.write_bytes(holder.read_bytes().replace(other, first))
    with pytest.raises(ModelFileError, match=r"tensor 'blk.0.attn_norm.weight' is in two parts"):
        load_gguf(parts[0])


def test_a_part_given_twice(parts: list[Path]) -> None:
    shutil.copy(parts[0], parts[1])
    with pytest.raises(ModelFileError, match=r"00002-of-00004.gguf: it says that it is part 1 of 4, where part 2"):
        load_gguf(parts[0])


@pytest.mark.parametrize("name", ["tiny.gguf", "tiny-00001-of-00004.gguf", "tiny-00001-of-00001.gguf"])
@pytest.mark.parametrize("n_joined", [2, 4])
def test_parts_joined_with_cat(parts: list[Path], tmp_path: Path, name: str, n_joined: int) -> None:
    joined = b"".join(part.read_bytes() for part in parts[:n_joined])
    path = tmp_path / name
    path.write_bytes(joined)
    with pytest.raises(ModelFileError, match=r"a second GGUF file begins behind .*\nhint: .*llama-gguf-split --merge"):
        load_gguf(path)


def test_a_part_twice_in_one_file(parts: list[Path]) -> None:
    parts[3].write_bytes(parts[3].read_bytes() * 2)
    with pytest.raises(ModelFileError, match=r"00004-of-00004.gguf: a second GGUF file begins"):
        load_gguf(parts[0])


def test_bytes_behind_the_tensors_are_no_second_file(tmp_path: Path) -> None:
    path = draft(tiny_model()).write(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes() + bytes(100) + b"GGUF, said a text")
    assert read_model(path).architecture == "qwen35"


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (("m.gguf.part1of2", "m.gguf.part2of2"), "cat m.gguf.part1of2 m.gguf.part2of2 > m.gguf"),
        (("m.gguf.part01of10", "m.gguf.part02of10"), "join all pieces in their order with cat, .*: m.gguf"),
        (("m.gguf-split-a", "m.gguf-split-b"), "join all pieces in their order with cat, .*: m.gguf"),
        (("m.gguf.aa", "m.gguf.ab"), "join all pieces"),
        (("m.gguf.001", "m.gguf.002"), "join all pieces"),
        (("m.gguf.part1", "m.gguf.part2"), "join all pieces"),
    ],
)
def test_a_file_that_was_cut_into_pieces(tmp_path: Path, names: tuple[str, str], hint: str) -> None:
    whole = draft(tiny_model()).write(tmp_path / "whole.gguf").read_bytes()
    half = len(whole) // 2
    for name, piece in zip(names, (whole[:half], whole[half:]), strict=True):
        (tmp_path / name).write_bytes(piece)
    for name in names:
        with pytest.raises(ModelFileError, match=rf"{name} is one part of a split file: .*\nhint: .*{hint}"):
            load_gguf(tmp_path / name)
    with pytest.raises(ModelFileError, match="no such file"):
        read_model(tmp_path / "m.gguf.part3of3")


def test_a_whole_file_under_the_name_of_a_piece(tmp_path: Path) -> None:
    path = draft(tiny_model()).write(tmp_path / "m.gguf.part1of1")
    assert read_model(path).architecture == "qwen35"
