"""The guard after the first prompt, in the native step and in the eager one: found, rebuilt, and no token lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hybridkv.cache import KVTypes
from hybridkv.engine import Engine, SamplingParams
from hybridkv.engine.load import Loaded, bundled_model, describe, load
from hybridkv.errors import GuardError
from hybridkv.hf import EagerStep, ModelCache
from hybridkv.kernels import KERNELS
from hybridkv.kernels.cache_rows import CacheRows
from hybridkv.model import kv_facts
from hybridkv.native import NativeStep
from hybridkv.native import step as native
from hybridkv.policy import Guard, GuardMode, Policy
from tests.hf.faults import DECODE

PROMPT = list(range(300, 320))
Q8 = KVTypes("q8_0", "q8_0")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(describe(bundled_model()), dtype=torch.float32, device="cpu")


def generate(
    loaded: Loaded, said: list[str], *, mode: GuardMode = "check", types: KVTypes = Q8, n: int = 16, **options: Any
) -> list[int]:
    guard = Guard(mode=mode)
    specs = Policy(types).resolve(kv_facts(loaded.description.facts))
    engine = Engine(loaded.model, specs, n_ctx=128, guard=guard, notify=said.append, **options)
    return [token for (token,) in engine.generate(PROMPT, SamplingParams(temp=0), n_predict=n)]


def misplaced(monkeypatch: pytest.MonkeyPatch, type_k: str) -> None:
    """The native step's single tokens of `type_k` layers: attention that does not see the oldest row."""
    original = native.new_rows

    def new_rows(layer: Any, n_seqs: int) -> CacheRows:
        rows = original(layer, n_seqs)
        if layer.store.types.type_k != type_k:
            return rows
        (only,) = rows.view.segments
        return replace(rows, view=replace(rows.view, segments=(replace(only, start=1, length=only.length - 1),)))

    monkeypatch.setattr(native, "new_rows", new_rows)


def test_the_native_step_looks_at_what_it_runs(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    sound: list[str] = []
    expected = generate(loaded, sound, types=KVTypes("f16", "f16"))
    assert sound == []
    misplaced(monkeypatch, "q8_0")
    said: list[str] = []
    tokens = generate(loaded, said, step=NativeStep(loaded.model))
    assert tokens == expected  # rebuilt at f16 from the history
    assert len(said) == 1
    assert said[0].startswith("the guard stopped at layer 3: q8_0, ")
    assert said[0].endswith("rebuilding 21 tokens at f16")


def test_strict_ends_the_run(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    misplaced(monkeypatch, "q8_0")
    with pytest.raises(GuardError, match=r"layer 3: q8_0, .* and the guard is 'strict'"):
        generate(loaded, [], mode="strict", step=NativeStep(loaded.model))


def test_off_looks_at_nothing(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    misplaced(monkeypatch, "q8_0")
    said: list[str] = []
    assert len(generate(loaded, said, mode="off", step=NativeStep(loaded.model))) == 16
    assert said == []


@pytest.mark.parametrize("types", [Q8, KVTypes("q4_0", "q4_0", rotate_k=True, rotate_v=True)], ids=["q8_0", "q4_0+kv"])
def test_checked_steps_give_the_tokens_of_unchecked_ones(loaded: Loaded, types: KVTypes) -> None:
    said: list[str] = []
    step = NativeStep(loaded.model)
    checked = generate(loaded, said, types=types, step=step, n=48)
    assert checked == generate(loaded, said, types=types, step=step, n=48, mode="off")
    assert said == []


def test_the_eager_step_ends_where_every_type_has_the_fault(loaded: Loaded) -> None:
    (fault,) = (f for f in DECODE if f.name == "newest row missing, decode")
    guard = Guard()

    def make_cache(specs: Any) -> ModelCache:
        return ModelCache(loaded.model.config, specs, n_ctx=128, guard=guard, kernels=fault.kernels(KERNELS))

    said: list[str] = []
    with pytest.raises(GuardError, match=r"layer 3: f16, .* no larger type is left"):
        generate(loaded, said, step=EagerStep(loaded.model), make_cache=make_cache)
    assert "rebuilding 21 tokens at f16" in said[0]
