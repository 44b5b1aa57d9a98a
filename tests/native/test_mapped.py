"""Weights in a mapped file: used where they lie, and known as gone when the file shrinks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridkv.engine.load import bundled_model
from hybridkv.errors import ModelFileError
from hybridkv.kernels import cpu_native
from hybridkv.native import NativeStep, map_gguf, native_model

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")

SHRINKING = """
import os, sys
from pathlib import Path
import torch
from hybridkv.cache import KVTypes
from hybridkv.engine.load import describe, load
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import HybridKVError
from hybridkv.hf import ModelCache
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import Policy

backend = sys.argv[2]
mapped = load(describe(Path(sys.argv[1])), dtype=torch.float32, device="cpu", weights="auto", backend=backend).model
step = resolve_step(mapped.config, "cpu", backend)(mapped)
specs = Policy(KVTypes("f16", "f16")).resolve(kv_facts(layer_facts(mapped.config)))
os.truncate(sys.argv[1], os.path.getsize(sys.argv[1]) // 4)
try:
    with torch.inference_mode():
        step.forward(torch.tensor([[1, 2, 3]]), ModelCache(mapped.config, specs), 0)
except HybridKVError as error:
    print(error)
    sys.exit(2)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(bundled_model().read_bytes())
    return path


def test_matrices_are_views_of_the_map(copy: Path) -> None:
    """Two products of one tensor share its memory, and no byte of a matrix is this process's own."""
    mapped = map_gguf(copy)
    step = NativeStep(native_model(mapped.config, mapped.source, "auto"))
    assert step.name.endswith("weights q8_0 + f32") or step.name.endswith("weights q8_0")
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(copy))]
    ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps]
    for weight in mapped.source.matrices():
        assert any(begin <= weight.data.data_ptr() < end for begin, end in ranges)


def test_copied_weights_do_not_need_the_file(copy: Path) -> None:
    mapped = map_gguf(copy, "copied")
    copy.unlink()
    NativeStep(native_model(mapped.config, mapped.source, "auto"))
    weight = mapped.source.weight("token_embd.weight")
    assert weight.data.data_ptr() == mapped.source.weight("token_embd.weight").data.data_ptr()


@pytest.mark.skipif(not hasattr(os, "truncate") or sys.platform == "win32", reason="files in use do not shrink there")
@pytest.mark.parametrize("backend", ["native", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_file_that_shrinks_ends_in_an_error_and_not_a_signal(copy: Path, backend: str) -> None:
    command = [sys.executable, "-c", SHRINKING, str(copy), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "became shorter while its weights were read" in done.stdout


def test_a_map_that_is_whole_is_sound(copy: Path) -> None:
    mapped = map_gguf(copy)
    mapped.source.verify()
    assert torch.isfinite(mapped.source.vector("output_norm.weight")).all()
    assert mapped.source.check() is None


def test_a_bad_scale_is_named(copy: Path) -> None:
    mapped = map_gguf(copy, "copied")
    weight = mapped.source.weight("blk.1.ffn_up.weight")
    weight.data[0, 3, 34 : 34 + 2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)  # NaN as float16
    assert mapped.source.check() == "blk.1.ffn_up.weight (row 3, block 1)"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        map_gguf(tmp_path / "none.gguf")
