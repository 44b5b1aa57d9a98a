"""Decoding on a CUDA device, recorded as a graph: Transformers' code and fused kernels. Runs where torch has one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.engine.steps import resolve_step
from hybridkv.hf import EagerStep, GraphStep, ModelCache
from hybridkv.hf.step.graph import set_sync_debug_mode
from hybridkv.model import kv_facts, layer_facts, takes_chunks
from hybridkv.policy import Guard, NonFiniteError, Policy
from tests.families import FAMILIES, build

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that torch can use"),
]
WINDOWED = ("gemma2", "gemma3_text", "gpt_oss", "mistral")
TOLERANCE = 5e-3  # of the attention kernel, through a few layers


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def cache_for(model: Any, types: KVTypes | None = None, *, n_ctx: int = 64) -> ModelCache:
    specs = Policy(types or KVTypes("f16", "f16")).resolve(kv_facts(layer_facts(model.config)))
    return ModelCache(model.config, specs, device="cuda", n_ctx=n_ctx, guard=Guard())


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def graph_step(model: Any, **options: Any) -> GraphStep:
    step = resolve_step(model.config, "cuda", notify=pytest.fail, **options)(model)
    assert isinstance(step, GraphStep)
    return step


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WINDOWED])
def test_every_family_is_recorded_and_agrees(family: str, backend: str, batch: int) -> None:
    model = build(family, attention="hybridkv").cuda()
    said: list[str] = []
    # Transformers' loop over experts asks the device which there are: it is not recorded, says so, and is right.
    experts = any(".experts." in name for name, _ in model.named_parameters())
    step = resolve_step(model.config, "cuda", notify=said.append if experts else pytest.fail, kind=backend)(model)
    eager, caches, position = EagerStep(model), [cache_for(model) for _ in range(2)], 0
    for seed, length in enumerate((9, 1, 1, 1, 2 if takes_chunks(model.config) else 1, 1, 1)):
        piece = tokens(batch, length, seed)
        got, exact = step.forward(piece, caches[0], position), eager.forward(piece, caches[1], position)
        assert float((got - exact).norm() / exact.norm()) < TOLERANCE
        position += length
    assert said in ([], ["decoding is not recorded as a graph: called a synchronizing CUDA operation"])


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_exact_rows_are_recorded(backend: str) -> None:
    """Sinks, packed rows and a tail that slides: two recordings, one before the first rows are packed."""
    model = build("qwen3_5_text", attention="hybridkv").cuda()
    types = KVTypes("q8_0", "q4_0", rotate_k=True, tail=32, sink=4, center=True)
    step, eager = graph_step(model, kind=backend), EagerStep(model)
    caches, position = [cache_for(model, types, n_ctx=150) for _ in range(2)], 0
    for seed, length in enumerate((20, *[1] * 120)):
        piece = tokens(2, length, seed)
        got, exact = step.forward(piece, caches[0], position), eager.forward(piece, caches[1], position)
        assert float((got - exact).norm() / exact.norm()) < 2e-2, position  # a value may fall to another code
        position += length


def test_interleaved_caches() -> None:
    model = build("qwen3_5_text", attention="hybridkv").cuda()
    step, eager = graph_step(model), EagerStep(model)
    caches, own, positions = [cache_for(model) for _ in range(3)], [cache_for(model) for _ in range(3)], [5, 6, 7]
    for i in range(3):
        step.forward(tokens(1, 5 + i, i), caches[i], 0)
        eager.forward(tokens(1, 5 + i, i), own[i], 0)
    for turn, i in enumerate((0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 2)):
        token = tokens(1, 1, 50 + turn)
        got, exact = step.forward(token, caches[i], positions[i]), eager.forward(token, own[i], positions[i])
        assert float((got - exact).norm() / exact.norm()) < TOLERANCE
        positions[i] += 1


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "iq4_nl"])
def test_a_row_that_is_not_finite_names_its_layer(type_name: str) -> None:
    model = build("qwen3_5_text", attention="hybridkv").cuda()
    step, cache = graph_step(model), cache_for(model, KVTypes(type_name, type_name))
    step.forward(tokens(1, 9), cache, 0)
    for position in (9, 10, 11):
        step.forward(tokens(1, 1), cache, position)
    cache.kv_layers[1].view().segments[0].v[0][:, :, 2] = 0xFF
    with pytest.raises(NonFiniteError) as caught:
        step.forward(tokens(1, 1), cache, 12)
    assert (caught.value.layer, caught.value.source) == (3, "cache")


def test_a_step_asks_the_device_once() -> None:
    """For its health, which is read with the logits."""
    model = build("qwen3_5_text", attention="hybridkv").cuda()
    step, cache = graph_step(model), cache_for(model)
    step.forward(tokens(1, 9), cache, 0)
    for position in (9, 10, 11):
        step.forward(tokens(1, 1), cache, position)
    set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as asked:
            step.forward(tokens(1, 1), cache, 12)
    finally:
        set_sync_debug_mode("default")
    assert len(asked) == 1
