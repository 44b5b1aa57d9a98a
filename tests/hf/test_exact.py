"""A tail, sinks and a center under a whole model: what they change, and how the guard waits for packed rows."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridkv import GuardError, UsageError, quantized_cache
from hybridkv.cache import KVLayer, KVTypes
from hybridkv.hf import ModelCache
from hybridkv.kernels import KERNELS, AttentionParams, Kernel, KVView, reference
from hybridkv.model import kv_facts, layer_facts
from hybridkv.native import NativeStep
from hybridkv.policy import Guard, Policy
from tests.families import build, remembering
from tests.hf.test_families import change, run, tokens

Q4 = KVTypes("q4_0", "q4_0")
LONG = tokens(2, 120)
CHUNKS = (50, 9)


def model_of(family: str = "qwen3_5_text") -> PreTrainedModel:
    return build(family, attention="hybridkv")


def cache_of(
    model: PreTrainedModel,
    types: KVTypes,
    *,
    kernels: tuple[Kernel, ...] = reference.KERNELS,
    said: list[str] | None = None,
    mode: Any = "check",
) -> ModelCache:
    specs = Policy(types).resolve(kv_facts(layer_facts(model.config)))
    notify: Callable[[str], object] = print if said is None else said.append
    return ModelCache(model.config, specs, kernels=kernels, guard=Guard(mode), notify=notify)  # type: ignore[arg-type]


@functools.cache
def logits_of(types: KVTypes, family: str = "qwen3_5_text") -> Tensor:
    model = model_of(family)
    return run(model, cache_of(model, types), LONG, CHUNKS)


F16 = KVTypes("f16", "f16")


@pytest.mark.parametrize("family", ["qwen3_5_text", "gemma3_text", "falcon_h1"])
def test_a_tail_that_holds_everything_gives_the_f16_caches_logits(family: str) -> None:
    got = logits_of(replace(Q4, tail=1000, sink=4), family)
    torch.testing.assert_close(got, logits_of(F16, family), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tail", [32, 64])
def test_a_tail_brings_the_logits_nearer_to_f16(tail: int) -> None:
    plain, better = (change(logits_of(replace(Q4, tail=n)), logits_of(F16)) for n in (tail // 2, tail))
    assert 1e-4 < better < plain


@pytest.mark.parametrize("tail", [0, 32])
def test_sinks_change_the_logits(tail: int) -> None:
    # Of a model of random weights: nothing in it makes first tokens worth more than others.
    first, second = (logits_of(replace(Q4, tail=tail, sink=n)) for n in (0, 4))
    assert change(second, first) > 1e-4


def test_the_center_changes_the_logits() -> None:
    first, second = (logits_of(replace(Q4, tail=32, center=on)) for on in (False, True))
    assert change(second, first) > 1e-4


def test_tensors_for_another_attention_are_the_same_rows() -> None:
    types = KVTypes("q8_0", "q4_0", rotate_k=True, rotate_v=True, tail=32, sink=4, center=True)
    plain = build("qwen3_5_text")
    assert change(run(plain, cache_of(plain, types), LONG, CHUNKS), logits_of(types)) < 1e-4


@pytest.mark.parametrize("types", [{"tail": 32, "sink": 4}, {"tail": 32, "center": True}, {"sink": 4}], ids=str)
def test_the_native_step_decodes_as_attention_between_runs_does(types: dict[str, int]) -> None:
    """Rows that native code writes into the last segment are those that `append` would have written."""
    model, ids = model_of(), tokens(2, 90)
    step, kv = NativeStep(model), replace(Q4, **types)
    inside = cache_of(model, kv, kernels=KERNELS)
    between = cache_of(model, kv, kernels=tuple(replace(kernel) for kernel in KERNELS))
    for position, n_new in ((0, 20), *((t, 1) for t in range(20, 90))):
        a, b = (step.forward(ids[:, position : position + n_new], cache, position) for cache in (inside, between))
        assert torch.equal(a, b), position
    for a_layer, b_layer in zip(inside.kv_layers, between.kv_layers, strict=True):
        for x, y in zip(a_layer.decode(), b_layer.decode(), strict=True):
            assert torch.equal(x, y)


def test_beams_move_exact_rows_and_centers() -> None:
    model, ids = model_of(), tokens(2, 90)
    types = replace(Q4, tail=32, sink=4, center=True)
    alone = run(model, cache_of(model, types), ids, CHUNKS)
    cache = cache_of(model, types)
    run(model, cache, ids[:, :80], CHUNKS)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0]))
    with torch.inference_mode():
        swapped = model(ids[[1, 0], 80:81], **remembering(cache)).logits
    assert change(swapped[:, 0], alone[[1, 0], 80]) < 1e-4


def test_options_of_the_library() -> None:
    model = model_of()
    said: list[str] = []
    cache = quantized_cache(model, type_k="q4_0", type_v="q4_0", tail=64, sink=4, center=True, notify=said.append)
    assert [spec.exact_label for spec in cache.specs] == ["tail 64, sink 4, centred"] * 2
    assert said == []
    quantized_cache(model, type_k="q4_0", type_v="q4_0", tail=64, n_ctx=64, notify=said.append)
    assert "all 64 tokens of the context stay f16 and nothing is ever packed" in said[0]
    for wrong in ({"tail": -1}, {"sink": 2.5}, {"tail": True}, {"tail": "8"}, {"center": True}, {"sink": 2**41}):
        with pytest.raises(UsageError, match=r"--kv-(tail|sink|center)"):
            quantized_cache(model, type_k="q4_0", **wrong)  # type: ignore[arg-type]


def packed_in(view: KVView) -> bool:
    return any(segment.format_k.is_quantized for segment in view.segments)


def wrong_over_packed_rows(calls: list[int]) -> tuple[Kernel, ...]:
    """A kernel that is right over f16 rows and doubles what it reads from packed ones."""
    (kernel,) = reference.KERNELS

    def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
        out = kernel.attend(q, view, params)
        if packed_in(view):
            calls.append(view.length)
            return 2 * out
        return out

    return (replace(kernel, attend=attend),)


class TestGuard:
    @pytest.mark.parametrize("chunks", [(119,), (20,), (100, 10), (40, 40)], ids=str)
    def test_a_wrong_kernel_is_caught_by_the_first_packed_rows(self, chunks: tuple[int, ...]) -> None:
        model, calls, said = model_of(), list[int](), list[str]()
        types = replace(Q4, tail=32, sink=4, center=True)
        cache = cache_of(model, types, kernels=wrong_over_packed_rows(calls), said=said)
        logits = run(model, cache, LONG, chunks)
        assert [spec.types.label for spec in cache.specs] == ["f16", "f16"]
        # q4_0, q6_0, q8_0 in each layer, with up to two queries of the guard's own each time, and never again.
        assert len(set(calls)) == 1
        assert 2 * 3 <= len(calls) <= 2 * 3 * 3
        assert re.match(r"layer 1: q4_0, attention over the stored rows is off by (1|0\.99)", said[0])
        assert change(logits, logits_of(F16)) < 2e-3

    def test_strict_stops(self) -> None:
        model = model_of()
        cache = cache_of(model, replace(Q4, tail=32), kernels=wrong_over_packed_rows([]), mode="strict")
        with pytest.raises(GuardError, match="layer 1: q4_0, attention over the stored rows is off by 1"):
            run(model, cache, LONG, CHUNKS)

    def test_a_prompt_that_stays_in_the_tail_is_not_judged(self) -> None:
        model, said = model_of(), list[str]()
        cache = cache_of(model, replace(Q4, tail=120), kernels=wrong_over_packed_rows([]), said=said)
        run(model, cache, LONG, CHUNKS)
        assert cache.errors == {}
        assert said == []
        assert all(layer.watch.awaits_first_check for layer in cache.layers if hasattr(layer, "watch"))

    def test_right_kernels_stay(self) -> None:
        for types in (replace(Q4, tail=32), replace(Q4, sink=4), replace(Q4, tail=32, center=True, rotate_k=True)):
            model, said = model_of(), list[str]()
            cache = cache_of(model, types, said=said)
            run(model, cache, LONG, CHUNKS)
            assert all(0 < error < 0.25 for error in cache.errors.values())
            assert len(cache.errors) == 2
            assert said == []

    def test_the_comparison_is_with_the_rows_before_they_were_packed(self) -> None:
        """At f32-like precision of the packed rows the measured error is that of f16, not that of a shifted row."""
        model = model_of()
        cache = cache_of(model, KVTypes("q8_0", "f16", tail=32, sink=4))
        run(model, cache, LONG, CHUNKS)
        assert all(error < 0.01 for error in cache.errors.values())

    def test_it_measures_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The earlier rows are expanded for one call: the one before which 32 of 64 leave the tail."""
        seen: list[int | None] = []
        decode = KVLayer.decode

        def counted(layer: KVLayer, length: int | None = None) -> tuple[Tensor, Tensor]:
            seen.append(length)
            return decode(layer, length)

        monkeypatch.setattr(KVLayer, "decode", counted)
        model = model_of()
        run(model, cache_of(model, replace(Q4, tail=32)), LONG, CHUNKS)
        assert seen == [64, 64]

    @pytest.mark.parametrize("tail", [3, 8, 1000])
    def test_windows(self, tail: int) -> None:
        """Where the window is no longer than the tail nothing packed is ever read, and nothing is judged.

        In another window, what is stored again does not fill the tail: the next types wait for their own judgement.
        """
        model, said = model_of("gemma3_text"), list[str]()
        cache = cache_of(model, replace(Q4, tail=tail), kernels=wrong_over_packed_rows([]), said=said)
        run(model, cache, LONG, CHUNKS)
        for spec in cache.specs:
            window = spec.facts.window
            judged = tail < (120 if window is None else window - 1)
            assert (spec.types.label == "q4_0") != judged, spec

    def test_off_waits_for_nothing(self) -> None:
        model = model_of()
        cache = cache_of(model, replace(Q4, tail=120), mode="off")
        run(model, cache, LONG[:, :20], (20,))
        assert not any(layer.watch.awaits_first_check for layer in cache.layers if hasattr(layer, "watch"))
