"""Kernels compiled for cards that are not here: Turing, Ampere and Ada, with what shared memory they have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.kernels.cuda.packed_layout import PACKED

SHARED = {"75": 65536, "80": 166912, "86": 101376, "89": 101376}
"""Bytes of shared memory that a program may have; NVIDIA's programming guide, by compute capability."""


def compiled(cache: Path, target: str, what: str, *options: str) -> list[tuple[str, int]]:
    """Names and bytes of shared memory of the variants that a step launches."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    words = [sys.executable, "-m", "tests.kernels.compile_only", target, what, *options]
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-2000:])
    rows = [line.split() for line in done.stdout.splitlines() if not line.startswith("namespace")]
    assert {made for _, _, made in rows} == {"cubin"}
    return [(name, int(shared)) for name, shared, _ in rows]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        pytest.param("75", "_gated", id="turing"),
        pytest.param("89", "_delta_step", id="ada", marks=pytest.mark.slow),
    ],
)
def test_what_a_decode_step_spends_its_time_in(target: str, names: str, tmp_path: Path) -> None:
    """One kernel each; the rest takes minutes."""
    found = compiled(tmp_path, target, "4b", "--only", names)
    assert set(names.split(",")) == {name for name, _ in found}
    assert max(shared for _, shared in found) <= SHARED[target]


@pytest.mark.long
@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0", "f16"])
@pytest.mark.parametrize("model", ["4b", "35b"])
@pytest.mark.parametrize("target", SHARED)
def test_a_step(target: str, model: str, kv_type: str, tmp_path: Path) -> None:
    """Every variant that prompts and single tokens launch."""
    found = compiled(tmp_path, target, model, "--kv", kv_type)
    assert len({name for name, _ in found}) >= 16
    assert max(shared for _, shared in found) <= SHARED[target], found


@pytest.mark.long
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("name", PACKED)
def test_products_of_every_type(name: str, target: str, tmp_path: Path) -> None:
    found = compiled(tmp_path, target, name)
    assert [kernel for kernel, _ in found].count("_products") == 4
    assert max(shared for _, shared in found) <= SHARED[target]
