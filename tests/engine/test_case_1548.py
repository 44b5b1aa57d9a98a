"""The case that hybridkv grew out of (bench/case_1548.py, docs/case-1548.md): the true cause is caught and named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hybridkv.cache import KVTypes
from hybridkv.engine.load import Loaded, bundled_model, describe, load
from hybridkv.kernels import KERNELS
from hybridkv.policy import GuardMode

SCRIPT = Path(__file__).parents[2] / "bench" / "case_1548.py"
Q4_0 = KVTypes("q4_0", "q4_0")


@pytest.fixture(scope="module")
def case() -> ModuleType:
    spec = importlib.util.spec_from_file_location("case_1548", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(describe(bundled_model()), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("rotated", [False, True])
def test_our_q4_0_is_coherent_without_upgrade(case: ModuleType, loaded: Loaded, rotated: bool) -> None:
    text, said = case.run(loaded, KVTypes("q4_0", "q4_0", rotate_k=rotated, rotate_v=rotated), "check", KERNELS)
    assert said == []
    assert "The following example shows how to use" in text


def misread(case: ModuleType, loaded: Loaded, types: KVTypes, mode: GuardMode) -> tuple[str, list[str]]:
    text, said = case.run(loaded, types, mode, tuple(case.misreading(kernel) for kernel in KERNELS))
    return text, said


def test_queries_read_as_blocks_of_another_size_are_not_finite(case: ModuleType, loaded: Loaded) -> None:
    text, _ = misread(case, loaded, Q4_0, "off")
    assert "the logits are not finite at token 2" in text


def test_the_guard_names_each_layer_and_goes_on(case: ModuleType, loaded: Loaded) -> None:
    text, said = misread(case, loaded, Q4_0, "check")
    assert [line.split(":")[0] for line in said] == ["layer 3", "layer 7", "layer 11"]
    assert all("stored as q6_0 instead" in line for line in said)
    assert "The following example shows how to use" in text


def test_strict_stops_at_the_first_layer(case: ModuleType, loaded: Loaded) -> None:
    text, _ = misread(case, loaded, Q4_0, "strict")
    assert "stopped after 0 tokens: the guard stopped at layer 3" in text


def test_a_type_that_the_fault_does_not_touch_is_not_blamed(case: ModuleType, loaded: Loaded) -> None:
    _, said = misread(case, loaded, KVTypes("q8_0", "q8_0"), "check")
    assert said == []
