"""The engine: the same tokens as Transformers' generate, and a fault at any step loses none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridkv.cache import KVSpec, KVTypes
from hybridkv.engine import Engine, SamplingParams
from hybridkv.engine.load import Loaded, bundled_model, describe, load
from hybridkv.engine.sampling import Sampler
from hybridkv.errors import ContextError, GuardError, ModelError, UsageError
from hybridkv.hf import ModelCache
from hybridkv.kernels import KERNELS, AttentionParams, Kernel, KVView
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import Guard, GuardMode, Policy
from tests.families import HYBRIDS, build

GREEDY = SamplingParams(temp=0)


@pytest.fixture(scope="module")
def reference() -> Loaded:
    return load(describe(bundled_model()), dtype=torch.float32, device="cpu")


def specs_for(model: PreTrainedModel, types: KVTypes) -> tuple[KVSpec, ...]:
    return Policy(types).resolve(kv_facts(layer_facts(model.config)))


class Fault:
    """Makes the kernels of one KV layer give NaN at one step, once or whenever its types are at hand.

    Steps count attention calls of the layer: 0 is the prompt, n is the n-th token after it.
    """

    def __init__(self, kv_layer: int, step: int, *, types: Sequence[str] | None = None) -> None:
        self.kv_layer, self.step, self.types = kv_layer, step, types
        self.fired = 0

    def cache(self, model: PreTrainedModel, specs: Sequence[KVSpec], **options: Any) -> ModelCache:
        calls = [0] * len(specs)
        order = iter(range(10**9))
        before = [-1]

        def wrap(kernel: Kernel) -> Kernel:
            def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
                out = kernel.attend(q, view, params)
                at = view.segments[0].k[0].data_ptr()
                if at == before[0]:
                    return out  # the guard asks the same layer once more
                before[0] = at
                layer = next(order) % len(specs)
                calls[layer] += 1
                due = calls[layer] == self.step + 1 if self.types is None else calls[layer] >= self.step + 1
                held = self.types is None or view.segments[0].format_k.name in self.types
                if layer == self.kv_layer and due and held and not (self.types is None and self.fired):
                    self.fired += 1
                    out[..., 0] = torch.nan
                return out

            return replace(kernel, attend=attend)

        return ModelCache(model.config, specs, kernels=tuple(wrap(k) for k in KERNELS), **options)


def engine(
    loaded: Loaded,
    types: KVTypes,
    *,
    said: list[str] | None = None,
    mode: GuardMode = "check",
    fault: Fault | None = None,
) -> Engine:
    guard, said = Guard(mode=mode), [] if said is None else said

    def make_cache(specs: Sequence[KVSpec]) -> ModelCache:
        assert fault is not None
        return fault.cache(loaded.model, specs, n_ctx=256, guard=guard, notify=said.append)

    return Engine(
        loaded.model,
        specs_for(loaded.model, types),
        n_ctx=256,
        guard=guard,
        notify=said.append,
        make_cache=make_cache if fault else None,
    )


def text_of(loaded: Loaded, run: Engine, prompt: str, n: int) -> str:
    ids = loaded.tokenizer.encode(prompt)
    return loaded.tokenizer.decode([t[0] for t in run.generate(ids, GREEDY, n_predict=n)])


PROMPT = "The following options are available: "
Q4 = KVTypes("q4_0", "q4_0", rotate_k=True, rotate_v=True)


@pytest.fixture(scope="module")
def text_at_q6_0(reference: Loaded) -> str:
    return text_of(reference, engine(reference, replace(Q4, type_k="q6_0", type_v="q6_0")), PROMPT, 16)


@pytest.mark.parametrize(("kv_layer", "step"), [(0, 0), (1, 5), (2, 11)])
def test_nan_at_a_layer_and_step_ends_as_the_fallback_type_from_the_start(
    reference: Loaded, kv_layer: int, step: int, text_at_q6_0: str
) -> None:
    said: list[str] = []
    fault = Fault(kv_layer, step)
    # Guard mode warn: the watch alone, without the first prompt's check raising the layer already.
    faulty = engine(reference, Q4, said=said, fault=fault, mode="warn")
    got = text_of(reference, faulty, PROMPT, 16)
    assert fault.fired == 1
    assert faulty.timings.n_rebuilds == 1
    assert [s.types.label for s in faulty.cache.specs] == ["q6_0"] * 3
    assert got == text_at_q6_0
    assert len(got) > 20
    n_tokens = len(reference.tokenizer.encode(PROMPT)) + step
    assert said == [
        f"the attention output of layer {4 * kv_layer + 3} is not finite at token {n_tokens} (KV q4_0, kernel "
        f"{faulty.cache.kv_layers[0].kernels.attend_for('decode' if step else 'prefill').name}); "
        f"rebuilding {n_tokens} tokens at q6_0"
    ]


def test_a_fault_of_a_type_climbs_until_a_type_without_it(reference: Loaded) -> None:
    said: list[str] = []
    fault = Fault(1, 4, types=("q4_0", "q6_0"))
    faulty = engine(reference, Q4, said=said, fault=fault, mode="warn")
    got = text_of(reference, faulty, PROMPT, 16)
    assert [s.types.label for s in faulty.cache.specs] == ["q8_0"] * 3
    assert got == text_of(reference, engine(reference, replace(Q4, type_k="q8_0", type_v="q8_0")), PROMPT, 16)


def test_no_token_is_lost_or_repeated(reference: Loaded) -> None:
    ids = reference.tokenizer.encode(PROMPT)
    faulty = engine(reference, Q4, fault=Fault(2, 7), mode="warn")
    tokens = [t[0] for t in faulty.generate(ids, GREEDY, n_predict=12)]
    assert len(tokens) == 12
    assert faulty.history.tolist() == [ids + tokens]
    assert faulty.cache.get_seq_length() == len(ids) + 11  # the last token has not been fed back


def test_when_every_type_fails_it_stops_with_a_diagnosis(reference: Loaded) -> None:
    fault = Fault(1, 2, types=("q4_0", "q6_0", "q8_0", "f16"))
    faulty = engine(reference, Q4, fault=fault, mode="check")
    with pytest.raises(GuardError, match=r"layer 7 is not finite at token \d+ \(KV f16, .*no larger type is left"):
        text_of(reference, faulty, PROMPT, 16)


def test_ranks_do_not_rebuild_apart(reference: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may wait in the middle of the step: what is not finite on one rank ends the run."""
    monkeypatch.setattr("hybridkv.engine.engine.ranks_of", lambda _: 2)
    monkeypatch.setattr("hybridkv.engine.engine.same_everywhere", lambda tokens, _: tokens)
    fault = Fault(1, 3)
    run = engine(reference, KVTypes("q8_0", "q8_0"), fault=fault, mode="warn")
    with pytest.raises(GuardError, match="a rank cannot rebuild its cache alone"):
        list(run.generate([5, 6, 7], GREEDY, n_predict=8))
    assert run.timings.n_rebuilds == 0


@pytest.mark.parametrize("mode", ["strict", "off"])
def test_strict_and_off_stop_instead_of_rebuilding(reference: Loaded, mode: GuardMode) -> None:
    faulty = engine(reference, KVTypes("q8_0", "q8_0"), fault=Fault(1, 3), mode=mode)
    tokens: list[tuple[int, ...]] = []
    with pytest.raises(GuardError, match=f"not finite at token .* the guard is '{mode}'"):
        tokens.extend(faulty.generate([5, 6, 7], GREEDY, n_predict=16))
    assert len(tokens) == 3


def test_nan_weights_are_named(reference: Loaded) -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 3] = torch.nan
    run = Engine(model, specs_for(model, KVTypes("q4_0", "q4_0")), n_ctx=64, guard=Guard(), notify=lambda _: None)
    with pytest.raises(ModelError, match=r"weights are not finite: model.layers.2.mlp.down_proj.weight"):
        list(run.generate([4, 5], GREEDY, n_predict=3))


def test_nan_logits_alone_are_caught(reference: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers can go wrong after the last attention layer too."""
    said: list[str] = []
    run = engine(reference, KVTypes("q8_0", "q8_0"), said=said)
    original = run.step.forward
    calls = 0

    def forward(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        logits = original(*args)
        if calls == 3:
            logits[..., 7] = torch.inf
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(run.step, "forward", forward)
        tokens = [t[0] for t in run.generate([5, 6, 7], GREEDY, n_predict=6)]
    assert run.timings.n_rebuilds == 1
    assert said[0].startswith("the logits are not finite at token 5")
    expected = engine(reference, KVTypes("f16", "f16"))
    assert tokens == [t[0] for t in expected.generate([5, 6, 7], GREEDY, n_predict=6)]


@pytest.mark.parametrize("family", HYBRIDS)
def test_tokens_are_those_of_generate(family: str) -> None:
    """Against Transformers' own loop and DynamicCache; Bamba's positions and Jamba's chunks included."""
    plain = build(family)
    prompt = torch.randint(3, 97, (1, 19), generator=torch.Generator().manual_seed(8))
    expected = plain.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=None)[0, 19:].tolist()
    model = build(family, attention="hybridkv")
    run = Engine(model, specs_for(model, KVTypes("f32", "f32")), n_ctx=64, guard=Guard(), notify=lambda _: None)
    assert [t[0] for t in run.generate(prompt[0].tolist(), GREEDY, n_predict=9)] == expected


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba", "jamba", "lfm2"])
def test_prefill_in_chunks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridkv.hf.step.eager.PREFILL_CHUNK", 4)
    test_tokens_are_those_of_generate(family)


def test_a_model_whose_cache_has_another_name() -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=16, n_groups=1, expand=2
    )
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(config).eval()
    prompt = torch.randint(3, 97, (1, 7))
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 7:].tolist()
    run = Engine(model, (), n_ctx=32, guard=Guard(), notify=lambda _: None)
    assert [t[0] for t in run.generate(prompt[0].tolist(), GREEDY, n_predict=5)] == expected
    assert run.cache.kv_bytes == 0
    assert run.cache.state_bytes > 0


def test_parallel_sequences_do_not_mix(reference: Loaded) -> None:
    """Each of three sampled sequences continues as if it were alone."""
    run = engine(reference, KVTypes("f32", "f32"))
    ids = reference.tokenizer.encode(PROMPT)
    params = SamplingParams(temp=1.5, seed=3)
    steps = list(run.generate(ids, params, n_predict=8, n_seqs=3))
    columns = list(zip(*steps, strict=True))
    assert len(set(columns)) == 3
    for column in columns:
        alone = engine(reference, KVTypes("f32", "f32"))
        full = ids + list(column[:-1])
        next_token = next(iter(alone.generate(full, GREEDY, n_predict=1)))[0]
        index = columns.index(column)
        with torch.inference_mode():
            logits = reference.model(torch.tensor([full])).logits[0, -1]
        assert logits.argmax().item() == next_token
        assert run.history[index].tolist() == ids + list(column)


def test_the_history_is_looked_back_at_without_a_copy(reference: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, seen = Sampler.draw, []

    def noting(self: Sampler, logits: torch.Tensor, histories: Any = ()) -> torch.Tensor:
        seen.append(len(histories) and np.shares_memory(histories, run.history.numpy()))
        return draw(self, logits, histories)

    monkeypatch.setattr(Sampler, "draw", noting)
    run = engine(reference, KVTypes("f16", "f16"))
    list(run.generate([5, 6, 7], SamplingParams(temp=0, repeat_penalty=1.3), n_predict=4))
    assert seen == [True] * 4
    seen.clear()
    run = engine(reference, KVTypes("f16", "f16"))
    list(run.generate([5, 6, 7], SamplingParams(temp=0), n_predict=2))
    assert seen == [0] * 2


def test_seed_and_temperature() -> None:
    model = build("qwen3_5_text", attention="hybridkv")

    def drawn(**options: Any) -> list[tuple[int, ...]]:
        run = Engine(model, specs_for(model, KVTypes("f16", "f16")), n_ctx=256, guard=Guard(), notify=print)
        return list(run.generate([5, 6, 7], SamplingParams(**options), n_predict=8))

    draw = cache(drawn)
    assert draw(seed=1) == drawn(seed=1)
    assert draw(seed=1) != draw(seed=2)
    assert draw(seed=1, temp=0) == draw(seed=2, temp=0)
    assert draw(seed=1, top_k=1) == draw(temp=0)
    assert draw(seed=1, min_p=1.0) == draw(temp=0)
    assert draw(seed=1, temp=3.0) != draw(seed=1, temp=0.5)
    assert draw(seed=1, top_p=0.01) == draw(temp=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temp": -1}, "--temp -1"), ({"top_k": -2}, "--top-k"), ({"top_p": 0}, "--top-p"), ({"min_p": 1.5}, "--min-p")],
)
def test_bad_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([], {"n_predict": 4}, UsageError, "prompt is empty"),
        ([5], {"n_predict": 0}, UsageError, "-n 0"),
        ([5], {"n_predict": -2}, UsageError, "-n -2"),
        ([5], {"n_predict": 4, "n_seqs": 0}, UsageError, "-np 0"),
        ([5] * 256, {"n_predict": 4}, ContextError, "256 tokens and the context holds 256"),
    ],
)
def test_bad_requests(
    reference: Loaded, prompt: list[int], options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        next(engine(reference, Q4).generate(prompt, GREEDY, **options))


def test_stops_when_the_context_is_full(reference: Loaded) -> None:
    run = engine(reference, Q4)
    assert len(list(run.generate([5] * 250, GREEDY, n_predict=-1))) == 6
    assert run.history.shape == (1, 256)
    assert len(list(islice(engine(reference, Q4).generate([5], GREEDY, n_predict=-1), 3))) == 3
