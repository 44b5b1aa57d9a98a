"""How matrices are held on CUDA, decided before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridkv.engine.describe import bundled_model, describe
from hybridkv.engine.weights import weights_on
from hybridkv.errors import UsageError
from tests.families import build

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for family in ("qwen3_5_text", "gemma2"):
        build(family).save_pretrained(root / family)
    return {family: root / family for family in ("qwen3_5_text", "gemma2")}


def test_int8_and_int4_are_packed_where_kernels_are(directories: dict[str, Path]) -> None:
    for path in (bundled_model(), directories["qwen3_5_text"]):
        description = describe(path)
        for kind in ("int8", "int4"):
            assert weights_on("cuda:0", kind, "auto", description) == (kind, torch.float32)
            held = description.held(kind, "cuda", "bf16")
            assert {"q8_0"} <= set(held.parts) <= {"q8_0", "q4_0", "f32", "f32 (vectors)", "bf16", "bf16 (vectors)"}


def test_other_models_are_refused_with_the_reason(directories: dict[str, Path]) -> None:
    description = describe(directories["gemma2"])
    with pytest.raises(UsageError, match=r"--weights int8 on cuda: .*; allowed: auto, plain, f32, bf16") as caught:
        weights_on("cuda", "int8", "auto", description)
    assert caught.value.hint is not None
    assert weights_on("cuda", "auto", "auto", description) == ("plain", torch.bfloat16)
    with pytest.raises(UsageError, match="the native backend's"):
        weights_on("cuda", "int4", "eager", describe(bundled_model()))
