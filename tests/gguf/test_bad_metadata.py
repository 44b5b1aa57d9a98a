"""Each architecture's file with one thing wrong: one kind of error that names the file, soon and cheaply."""

from __future__ import annotations

import re
import tracemalloc
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from gguf import GGUFReader

from hybridkv.engine.convert import convert
from hybridkv.errors import ModelFileError
from hybridkv.gguf.load import load_gguf
from tests.families import build
from tests.gguf.test_architectures import VARIANTS
from tests.gguf.write_qwen35 import Draft, Key
from tests.thin import every_other

HALVES = every_other(VARIANTS, (0, 1))
"""Each architecture with every other of its keys or tensors."""
WORTH = 50 << 20  # bytes that no file of a few kilobytes may cost


@cache
def drafted(architecture: str) -> Draft:
    family, changes = VARIANTS[architecture][0]
    with TemporaryDirectory() as name:
        build(family, **changes).save_pretrained(name)
        read = GGUFReader(convert(Path(name), Path(name) / "x.gguf", weights="f32").path)
        keys = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
        del keys["general.architecture"]
        return Draft(architecture, keys, {tensor.name: tensor.data.copy() for tensor in read.tensors})


def copied(architecture: str) -> Draft:
    file = drafted(architecture)
    return Draft(architecture, dict(file.keys), dict(file.tensors))


def wrong(value: Key) -> Key:
    """A value that breaks a key: too much, or of another kind."""
    if isinstance(value, bool):
        return "x"
    if isinstance(value, int):
        return 2**31 - 1
    return [2**30] * len(value) if isinstance(value, list) else 0


def refused(path: Path) -> bool:
    """Whether a file gives the error that it should, or loads."""
    try:
        load_gguf(path)
    except ModelFileError as error:
        return str(path) in error.message
    return False


@pytest.mark.parametrize(("architecture", "half"), HALVES)
def test_keys(tmp_path: Path, architecture: str, half: int) -> None:
    """Some keys have a default and some numbers are as good as others; most must be refused."""
    path = tmp_path / "x.gguf"
    own = [key for key in drafted(architecture).keys if key.startswith(f"{architecture}.")][half::2]
    assert len(own) > 4
    n_refused = 0
    for key in own:
        file = copied(architecture)
        value = file.keys.pop(key)
        n_refused += refused(file.write(path))
        file.keys[key] = wrong(value)
        file.write(path)
        tracemalloc.start()
        n_refused += refused(path)
        assert tracemalloc.get_traced_memory()[1] < WORTH, key
        tracemalloc.stop()
    assert n_refused > len(own)


@pytest.mark.parametrize(("architecture", "half"), HALVES)
def test_tensors(tmp_path: Path, architecture: str, half: int) -> None:
    path = tmp_path / "x.gguf"
    # Each kind of tensor once; the embedding's rows are the vocabulary, of any size.
    kinds = {re.sub(r"\d+", "", name): name for name in copied(architecture).tensors if name != "token_embd.weight"}
    for name in list(kinds.values())[half::2]:
        values = copied(architecture).tensors[name]
        file = copied(architecture)
        file.tensors[name] = np.concatenate([values, values])
        with pytest.raises(ModelFileError, match=name):
            load_gguf(file.write(path))
    for name in ("blk.1.attn_norm.weight", "token_embd.weight"):
        file = copied(architecture)
        file.tensors.pop(name)
        with pytest.raises(ModelFileError, match=name):
            load_gguf(file.write(path))
    file = copied(architecture)
    file.tensors["blk.0.mystery.weight"] = np.ones((4, 4), np.float32)
    with pytest.raises(ModelFileError, match=r"1 unknown tensor.s. .*: blk.0.mystery.weight"):
        load_gguf(file.write(path))


@pytest.mark.parametrize("architecture", VARIANTS)
def test_prediction_blocks_are_skipped(tmp_path: Path, architecture: str) -> None:
    file = copied(architecture)
    n_blocks = file.keys[f"{architecture}.block_count"]
    assert isinstance(n_blocks, int)
    file.keys |= {f"{architecture}.block_count": n_blocks + 1, f"{architecture}.nextn_predict_layers": 1}
    for key in ("attention.head_count_kv", "feed_forward_length", "attention.sliding_window_pattern"):
        per_layer = file.keys.get(f"{architecture}.{key}")
        if isinstance(per_layer, list):
            file.keys[f"{architecture}.{key}"] = [*per_layer, type(per_layer[0])()]  # type: ignore[list-item]
    file.tensors[f"blk.{n_blocks}.nextn.eh_proj.weight"] = np.ones((4, 4), np.float32)
    loaded = load_gguf(file.write(tmp_path / "x.gguf"))
    assert loaded.notices == ("1 tensors of multi-token prediction blocks were skipped",)
    assert loaded.model.config.num_hidden_layers == n_blocks
