"""Files opened without Transformers: config, tensors and refusals against Transformers' classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridkv.engine.convert import convert
from hybridkv.errors import ModelError, ModelFileError
from hybridkv.gguf.architectures import ARCHITECTURES
from hybridkv.gguf.describe import describe_gguf
from hybridkv.gguf.mapped import map_gguf
from hybridkv.gguf.pairing import build_skeleton, pair, same_shape
from hybridkv.gguf.reader import read_header
from hybridkv.kernels import cpu_native
from hybridkv.model import graph_of, layer_facts, rejects, takes_chunks, vocab_size_of
from hybridkv.model.rope import rope_angles
from hybridkv.model.tensors import graph_tensors
from hybridkv.native import NativeModel, NativeStep, runs_natively
from tests.gguf.reference import config_from_gguf
from tests.gguf.test_architectures import CASES, saved, stirred
from tests.gguf.test_bad_metadata import copied
from tests.gguf.test_bad_models import BAD_KEYS, BAD_TENSORS, MODEL, spoiled
from tests.gguf.write_qwen35 import draft


def written(tmp_path: Path, family: str, changes: dict[str, Any]) -> Path:
    model = stirred(family, **changes)
    return convert(saved(model, tmp_path / "model"), tmp_path / "x.gguf", weights="f32").path


@pytest.mark.parametrize(("architecture", "family", "changes"), CASES)
def test_the_config_is_what_transformers_class_says(
    tmp_path: Path, architecture: str, family: str, changes: dict[str, Any]
) -> None:
    path = written(tmp_path, family, changes)
    own, theirs = describe_gguf(path)[1], config_from_gguf(path)
    assert own.model_type == theirs.model_type == ARCHITECTURES[architecture].model_type
    assert layer_facts(own) == layer_facts(theirs)
    assert takes_chunks(own) == takes_chunks(theirs)
    assert vocab_size_of(own) == vocab_size_of(theirs)
    for name, value in vars(own).items():
        assert getattr(theirs, name) == value, name
    assert rejects(own) == rejects(theirs)
    if rejects(own) is not None:
        return
    assert graph_of(own) == graph_of(theirs)
    ropes = {part.rope.kind for part in graph_of(own).parts if getattr(part, "rope", None) is not None}
    for kind in ropes:
        assert all(map(torch.equal, rope_angles(own, 50, kind), rope_angles(theirs, 50, kind)))


@pytest.mark.parametrize(("architecture", "family", "changes"), CASES)
def test_a_graph_names_the_tensors_of_its_model(
    tmp_path: Path, architecture: str, family: str, changes: dict[str, Any]
) -> None:
    path = written(tmp_path, family, changes)
    config = config_from_gguf(path)
    if rejects(config) is not None:
        with pytest.raises(ModelError, match=r"the native backend cannot run .*softcapped"):
            map_gguf(path)
        return
    present = {info.name for info in read_header(path).tensors}
    pairings = pair(ARCHITECTURES[architecture], config, build_skeleton(config, torch.float32), present)
    wanted = {name: shape for each in pairings for name, shape in zip(each.names, each.shapes, strict=True)}
    tensors = {
        tensor.name_in(present.__contains__): tensor for tensor in graph_tensors(graph_of(config), present.__contains__)
    }
    absent = tensors.pop(None, None)
    assert absent is None or absent.optional
    assert tensors.keys() == wanted.keys()
    for name, shape in wanted.items():
        assert same_shape(tensors[name].shape, shape), name
    mapped = map_gguf(path)
    if runs_natively(mapped.config, "cpu"):  # all but value heads of 8
        assert NativeStep(NativeModel(mapped.config, mapped.source)).name.startswith("native")


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_metadata(tmp_path: Path, name: str) -> None:
    spoil, message = BAD_KEYS[name]
    path = spoiled(tmp_path, spoil)
    with pytest.raises(ModelFileError, match=message) as caught:
        map_gguf(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(tmp_path: Path, name: str) -> None:
    spoil, message = BAD_TENSORS[name]
    path = spoiled(tmp_path, spoil)
    with pytest.raises(ModelFileError, match=message.removesuffix(" .*mlp.up_proj")) as caught:
        map_gguf(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("architecture", ["qwen35", "qwen3next", "granitehybrid", "nemotron_h"])
def test_ollamas_name_of_the_time_steps(tmp_path: Path, architecture: str) -> None:
    """`ssm_dt` for `ssm_dt.bias`: the same numbers, natively too."""
    other = copied(architecture)
    for name in [name for name in other.tensors if name.endswith(".ssm_dt.bias")]:
        other.tensors[name.removesuffix(".bias")] = other.tensors.pop(name)
    for file, path in ((copied(architecture), tmp_path / "one.gguf"), (other, tmp_path / "two.gguf")):
        mapped = map_gguf(file.write(path))
        name = NativeStep(NativeModel(mapped.config, mapped.source)).name
    assert name.startswith("native")


def test_the_draft_is_sound(tmp_path: Path) -> None:
    assert map_gguf(draft(MODEL).write(tmp_path / "x.gguf")).config.num_hidden_layers == 4


ENDS = """
import hybridkv
from hybridkv.gguf import tensors
real = tensors.populate

def slow(address, n_bytes):
    for _ in range(400):
        real(address, n_bytes)

tensors.populate = slow
print(hybridkv.load(type_k="q8_0", type_v="q8_0").generate("Hello world", n_predict=3, temp=0))
"""


@pytest.mark.skipif(cpu_native.available() is not None, reason="no native kernels in this build")
def test_a_process_ends_while_pages_are_still_brought_in() -> None:
    """It was aborted: a daemon's thread comes back from native code to an interpreter that has ended."""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert "terminate" not in done.stderr
