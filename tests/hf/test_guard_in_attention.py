"""The guard at work in a model's attention: evidence on the first prompt, and numbers that are not finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridkv import ContextError, GuardError, quantized_cache
from hybridkv.cache import KVTypes
from hybridkv.cache.spec import FRESH_ROWS
from hybridkv.hf import ModelCache
from hybridkv.kernels import AttentionParams, Kernel, KVView, reference
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import Evidence, Fallback, Guard, NonFiniteError, Ok, Policy
from hybridkv.runtime import evidence
from tests.families import build
from tests.hf.test_families import run, tokens


def with_huge_keys(layer: int, factor: float) -> PreTrainedModel:
    """A model whose K in one layer is `factor` times too large for a float16 scale, and whose Q makes up for it."""
    model = build("qwen3_5_text", attention="hybridkv")
    attention = model.model.layers[layer].self_attn
    with torch.no_grad():
        # The norms are zero-centred: weight + 1 is the factor.
        attention.k_norm.weight.copy_((attention.k_norm.weight + 1) * factor - 1)
        attention.q_norm.weight.copy_((attention.q_norm.weight + 1) / factor - 1)
    return model


def cache_for(model: PreTrainedModel, said: list[str], **options: Any) -> ModelCache:
    return quantized_cache(model, notify=said.append, **options)


def test_a_layer_with_huge_activations_is_raised_alone() -> None:
    model = with_huge_keys(3, 1.2e6)
    said: list[str] = []
    cache = cache_for(model, said, type_k="q4_0", type_v="q4_0", guard="check")
    logits = run(model, cache, tokens())
    assert [s.types.label for s in cache.specs] == ["q4_0", "q8_0"]
    assert len(said) == 2
    assert said[0].startswith("layer 3: q4_0, output not finite, limit ")
    assert "stored as q6_0 instead" in said[0]
    assert "stored as q8_0 instead, +" in said[1]
    from_the_start = quantized_cache(model, type_k="q4_0", type_v="q4_0", k_last="q8_0,1", v_last="q8_0,1")
    assert torch.equal(run(model, from_the_start, tokens()), logits)


def test_many_layers_that_are_raised_share_a_line() -> None:
    model = build("llama", attention="hybridkv", num_hidden_layers=6)
    specs = Policy(KVTypes("q4_0", "q4_0")).resolve(kv_facts(layer_facts(model.config)))
    said: list[str] = []
    cache = ModelCache(model.config, specs, guard=Guard(limit=0.03), notify=said.append)
    run(model, cache, tokens())
    finals = [s.types.label for s in cache.specs]
    raised = [n for n, label in enumerate(finals) if label != "q4_0"]
    assert len(raised) > 3
    assert len(said) == 1
    assert said[0].startswith(f"{len(raised)} KV layers are stored as q6_0")
    assert "the worst was layer " in said[0]
    assert "error 0." in said[0]
    assert "limit 0.03" in said[0]


def test_few_layers_that_are_raised_have_a_line_each() -> None:
    model = build("llama", attention="hybridkv", num_hidden_layers=3)
    specs = Policy(KVTypes("q4_0", "q4_0")).resolve(kv_facts(layer_facts(model.config)))
    said: list[str] = []
    run(model, ModelCache(model.config, specs, guard=Guard(limit=0.03), notify=said.append), tokens())
    assert [line.split(":")[0] for line in said] == ["layer 0", "layer 1", "layer 2"]


def test_a_fallback_runs_the_kernel_of_its_phase() -> None:
    """A prompt of one token is a decode: the kernel that refuses decode must not run, before or after a fallback."""
    model = with_huge_keys(3, 1.2e6)
    prefill_only = replace(
        reference.KERNELS[0],
        name="prefill-only",
        rank=9,
        rejects=lambda case: None if case.phase == "prefill" else "prefill alone",
        attend=lambda *_: pytest.fail("ran a decode"),
    )
    specs = Policy(KVTypes("q4_0", "q4_0")).resolve(kv_facts(layer_facts(model.config)))
    cache = ModelCache(model.config, specs, kernels=(prefill_only, *reference.KERNELS), notify=lambda _: None)
    run(model, cache, tokens()[:, :1], chunks=(1,))
    assert [s.types.label for s in cache.specs] == ["q4_0", "q8_0"]


def test_an_error_above_the_limit_is_evidence_too() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    said: list[str] = []
    cache = ModelCache(
        model.config,
        Policy(KVTypes("q4_0", "q4_0")).resolve(kv_facts(layer_facts(model.config))),
        guard=Guard(limit=0.02),
        notify=said.append,
    )
    run(model, cache, tokens())
    assert all(s.types.label in ("q6_0", "q8_0") for s in cache.specs)
    assert all(error <= 0.02 for error in cache.errors.values())
    assert said
    assert all("error 0.0" in line or "error 0.1" in line for line in said)


def test_rows_that_a_window_has_evicted_stay_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types that are raised late store again what is left: what is gone cannot be cropped to."""
    model = build("gemma3_text", attention="hybridkv")  # windows of 8 tokens
    specs = Policy(KVTypes("q4_0", "q4_0", tail=32)).resolve(kv_facts(layer_facts(model.config)))
    cache = ModelCache(model.config, specs, guard=Guard(), notify=lambda _: None)

    def judge(_: Guard, evidence: Evidence) -> Ok | Fallback:
        larger = replace(evidence.types, type_k="q8_0", type_v="q8_0")
        return Ok() if evidence.types == larger else Fallback(larger, "a test's doing")

    monkeypatch.setattr(Guard, "judge", judge)
    length = 20 + FRESH_ROWS + 40  # so long a chunk is the first that shows packed rows behind a tail and a window
    run(model, cache, tokens(1, length), chunks=(20, length - 20))
    assert [layer.store.n_seen for layer in cache.quantized] == [length] * 3
    assert [s.types.type_k for s in cache.specs] == ["q8_0", "q8_0", "q4_0"]
    with pytest.raises(ContextError, match="layers 0, 1 cannot go back"):
        cache.crop(-100)


def test_types_that_measure_well_stay() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    said: list[str] = []
    cache = cache_for(model, said, type_k="q4_0", type_v="q4_0")
    run(model, cache, tokens())
    assert [s.types.label for s in cache.specs] == ["q4_0", "q4_0"]
    assert said == []
    assert all(0.01 < error < 0.2 for error in cache.errors.values())


def test_strict_is_an_error_instead() -> None:
    model = with_huge_keys(3, 1.2e6)
    with pytest.raises(GuardError, match="layer 3: q4_0, output not finite"):
        run(model, quantized_cache(model, type_k="q4_0", type_v="q4_0", guard="strict"), tokens())


@pytest.mark.parametrize("mode", ["check", "strict", "warn"])
def test_beyond_float16_the_end_is_a_diagnosis(mode: str) -> None:
    model = with_huge_keys(1, 1e10)
    with pytest.raises(GuardError, match="layer 1"):
        run(model, quantized_cache(model, type_k="q4_0", type_v="q4_0", guard=mode), tokens())


def test_upgrade_and_warn_speak_before_anything_runs() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    said: list[str] = []
    upgraded = cache_for(model, said, type_k="q4_0", type_v="f16", guard="upgrade")
    assert [s.types.label for s in upgraded.specs] == ["q8_0/f16", "q8_0/f16"]
    assert said[-1].startswith("KV layers 1, 3 upgraded from q4_0/f16 to q8_0")
    warned = cache_for(model, said, type_k="q4_0", type_v="f16", guard="warn")
    assert [s.types.label for s in warned.specs] == ["q4_0/f16", "q4_0/f16"]
    assert "stay at q4_0/f16" in said[-1]


def faulty(kernels: tuple[Kernel, ...], *, at_call: int) -> tuple[Kernel, ...]:
    """The kernels, the `at_call`-th call of which gives one NaN."""
    calls = 0

    def wrap(kernel: Kernel) -> Kernel:
        def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
            nonlocal calls
            calls += 1
            out = kernel.attend(q, view, params)
            if calls == at_call:
                out[0, 0, 0, 0] = torch.nan
            return out

        return replace(kernel, attend=attend)

    return tuple(wrap(kernel) for kernel in kernels)


def test_nan_from_a_kernel_is_caught_where_it_arose() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    specs = Policy(KVTypes("q8_0", "q8_0")).resolve(kv_facts(layer_facts(model.config)))
    # Calls 1 to 4 are a prompt in two parts and two KV layers; then a token takes three calls in each, the next one.
    cache = ModelCache(model.config, specs, kernels=faulty(reference.KERNELS, at_call=12))
    with pytest.raises(NonFiniteError, match="attention output of layer 3 is not finite at token 18") as caught:
        run(model, cache, tokens())
    assert caught.value.layer == 3
    assert caught.value.source == "cache"
    assert caught.value.kernel == reference.KERNELS[0].name


def test_nan_in_the_weights_is_not_blamed_on_the_cache() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="and so was what went into it") as caught:
        run(model, quantized_cache(model), tokens())
    assert caught.value.source == "input"


def test_off_does_nothing() -> None:
    model = with_huge_keys(3, 1.2e6)
    cache = quantized_cache(model, type_k="q4_0", type_v="q4_0", guard="off")
    assert not torch.isfinite(run(model, cache, tokens())).all()
    assert cache.errors == {}


def test_the_check_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of queries are attended once more, however long the prompt, and those of few single tokens."""
    seen: list[int] = []
    model = build("qwen3", attention="hybridkv")

    def count(name: str) -> None:
        original = getattr(evidence, name)

        def counting(q: Tensor, *arguments: Any) -> Tensor:
            seen.append(q.shape[2])
            result: Tensor = original(q, *arguments)
            return result

        monkeypatch.setattr(evidence, name, counting)

    count("reference_attend")
    count("_attend_float")

    def counts(length: int, *chunks: int) -> list[int]:
        seen.clear()
        run(model, quantized_cache(model, type_k="q4_0"), tokens(1, length), chunks=chunks)
        return seen

    most = evidence.SAMPLED_QUERIES + len(evidence.EARLY_QUERIES)
    prompt = [most, most, evidence.SAMPLED_QUERIES]  # the first layer's activations and rows, the second's activations
    assert counts(1200, 1200) == prompt
    assert counts(1200, 64, 1136) == [*prompt, most]
    assert counts(1200, 600, 400, 200) == [*prompt, most]  # 1000 tokens are not yet twice 600
    # Token 2, the first, in both layers; 31 and 32 (a block's edges), 64 and 128 (powers of two) in the first. Each has
    # its own query and two that look for rows.
    assert counts(130, 2) == [2, 2, 2] + [3, 3] + [3] * 4
