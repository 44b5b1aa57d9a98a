"""The graph step on the CPU: everything but CUDA's own recording, for which a trace of torch's operations stands in."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridkv.cache import KVTypes
from hybridkv.engine import Engine
from hybridkv.errors import ContextError
from hybridkv.hf import EagerStep, ModelCache
from hybridkv.hf.layers import QuantizedLayer
from hybridkv.hf.step import graph
from hybridkv.hf.step.graph import GraphStep
from hybridkv.kernels import KERNELS, Kernel, reference
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import Guard, NonFiniteError, Policy
from tests.families import FAMILIES, build
from tests.hf import recorded
from tests.hf.recorded import Again, Suspicious, Traced
from tests.thin import every_other

WINDOWED = ("gemma2", "gemma3_text", "gpt_oss", "mistral")
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
F32 = KVTypes("f32", "f32")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def cache_for(
    model: PreTrainedModel, types: KVTypes = F32, *, n_ctx: int | None = 40, guard: Guard | None = None
) -> ModelCache:
    specs = Policy(types).resolve(kv_facts(layer_facts(model.config)))
    kernels, encoders = recorded.KERNELS, recorded.ENCODERS
    guard = guard or Guard(mode="warn")  # watches, and measures nothing: what it measures is not replayed
    return ModelCache(model.config, specs, n_ctx=n_ctx, guard=guard, kernels=kernels, encoders=encoders)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def small() -> PreTrainedModel:
    return build("qwen3_5_text", attention="hybridkv", **TWO_LAYERS)


class Counted(EagerStep):
    """Counts how often the model's code decodes."""

    decoded = 0

    def decode(self, tokens: Tensor, cache: ModelCache, positions: Tensor) -> Tensor:
        self.decoded += 1
        return super().decode(tokens, cache, positions)


def compare(step: GraphStep, model: PreTrainedModel, cache: ModelCache, pieces: Sequence[Tensor]) -> None:
    """Run the pieces, and as many through Transformers' code on a cache of its own."""
    eager, own, position = EagerStep(model), cache_for(model, n_ctx=None), 0
    for piece in pieces:
        exact, got = eager.forward(piece, own, position), step.forward(piece, cache, position)
        assert got.dtype == torch.float32
        assert torch.allclose(got, exact, atol=1e-4 * float(exact.abs().max()))
        position += piece.shape[1]


@pytest.mark.parametrize(("family", "batch"), every_other([f for f in FAMILIES if f not in WINDOWED], (1, 3)))
def test_every_family_decodes_by_numbers_on_the_device(family: str, batch: int) -> None:
    model, recorder = build(family, attention="hybridkv"), Again()
    step = GraphStep(EagerStep(model), recorder=recorder, notify=pytest.fail)
    compare(step, model, cache_for(model), [tokens(batch, n, seed) for seed, n in enumerate((7, 1, 1, 1))])
    assert recorder.recorded == 1


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "lfm2", "qwen3_moe"])
def test_a_recording_holds_no_number_of_the_step_it_was_made_in(family: str) -> None:
    """The trace is replayed without the model's code: a constant in it would show in the steps after."""
    changes = TWO_LAYERS if family == "qwen3_5_text" else {}
    model, recorder = build(family, attention="hybridkv", **changes), Traced()
    decoder, cache = Counted(model), cache_for(model)
    recorder.watched = cache
    step = GraphStep(decoder, recorder=recorder, notify=pytest.fail)
    compare(step, model, cache, [tokens(2, n, seed) for seed, n in enumerate((7, 1, 1, 1, 1))])
    assert recorder.recorded == 1
    assert decoder.decoded == 3  # the trial's, the first step's, and the trace's; none of the replays'


@pytest.mark.parametrize(
    ("options", "n_recorded"),
    [
        pytest.param({"tail": 32}, 2, id="tail", marks=pytest.mark.slow),
        pytest.param({"tail": 32, "sink": 4, "center": True}, 2, id="all"),
        pytest.param({"sink": 4}, 1, id="sinks", marks=pytest.mark.slow),
        pytest.param({"sink": 30}, 2, id="sinks that fill while decoding"),
    ],
)
def test_exact_rows_are_recorded_until_the_first_are_packed_and_from_then_on(
    options: dict[str, Any], n_recorded: int
) -> None:
    """Rows leave the tail, and the tail moves, between replays."""
    model, recorder = small(), Traced()
    decoder, types = Counted(model), KVTypes("q8_0", "q4_0", rotate_k=True, **options)
    cache, own = (cache_for(model, types, n_ctx=150) for _ in range(2))
    recorder.watched = cache
    step, eager, position = GraphStep(decoder, recorder=recorder, notify=pytest.fail), EagerStep(model), 0
    for seed, n in enumerate((20, *[1] * 130)):
        piece = tokens(2, n, seed)
        exact, got = eager.forward(piece, own, position), step.forward(piece, cache, position)
        assert torch.allclose(got, exact, atol=1e-3 * float(exact.abs().max())), position
        position += n
    assert recorder.recorded == n_recorded
    assert decoder.decoded == 1 + 2 * n_recorded  # the trial's; of each recording the step before it, and the trace's
    for one, other in zip(cache.kv_layers, own.kv_layers, strict=True):
        assert torch.equal(one.decode()[0], other.decode()[0])


@pytest.mark.parametrize("tail", [32, 64])
def test_the_first_packed_rows_of_a_tail_are_measured_not_replayed(tail: int) -> None:
    """A short prompt leaves the guard nothing to measure; the step that packs first does, and is not replayed."""
    model, said = small(), list[str]()
    types, guard = KVTypes("q8_0", "q8_0", tail=tail), Guard()
    step, cache = (
        GraphStep(EagerStep(model), recorder=Again(), notify=said.append),
        cache_for(model, types, guard=guard, n_ctx=150),
    )
    step.forward(tokens(1, 6), cache, 0)
    layer = next(layer for layer in cache.layers if isinstance(layer, QuantizedLayer))
    for position in range(6, 6 + tail + 40):
        step.forward(tokens(1, 1, seed=position), cache, position)
        packed = layer.store.n_seen > tail + 32
        assert layer.watch.awaits_first_check != packed
        assert (layer.watch.error is not None) == packed
    assert said == []


def test_one_token_alone_is_not_recorded() -> None:
    """Whoever continues copies of one cache by a token each, as a classification does, pays for no recording."""
    model, recorder = small(), Again()
    step, cache = GraphStep(EagerStep(model), recorder=recorder, notify=pytest.fail), cache_for(model)
    step.forward(tokens(1, 6), cache, 0)
    for seed in range(3):
        step.forward(tokens(1, 1, seed=seed), cache.copy(n_ctx=40), 6)
    assert recorder.recorded == 0


def test_interleaved_caches_never_meet() -> None:
    """A recording runs on the state and rows of its own cache alone, however the caches take turns."""
    model, recorder = small(), Traced()
    step, eager = GraphStep(EagerStep(model), recorder=recorder, notify=pytest.fail), EagerStep(model)
    caches, own = [cache_for(model) for _ in range(2)], [cache_for(model) for _ in range(2)]
    for i in range(2):
        prompt = tokens(1, 5 + i, seed=i)
        step.forward(prompt, caches[i], 0)
        eager.forward(prompt, own[i], 0)
    positions = [5, 6]
    for turn, i in enumerate((0, 1, 1, 0, 1, 0, 0)):
        recorder.watched = caches[i]
        token = tokens(1, 1, seed=10 + turn)
        exact, got = eager.forward(token, own[i], positions[i]), step.forward(token, caches[i], positions[i])
        assert torch.allclose(got, exact, atol=1e-4 * float(exact.abs().max()))
        positions[i] += 1
    assert recorder.recorded == 2


def test_a_copy_is_another_cache() -> None:
    model, recorder = small(), Traced()
    step, eager = GraphStep(EagerStep(model), recorder=recorder, notify=pytest.fail), EagerStep(model)
    first = recorder.watched = cache_for(model)
    step.forward(tokens(1, 6), first, 0)
    step.forward(tokens(1, 1, seed=1), first, 6)
    second, own = first.copy(n_ctx=40), first.copy(n_ctx=40)
    for position in (7, 8):
        recorder.watched = first
        step.forward(tokens(1, 1, seed=2), first, position)  # must not touch the copy
        recorder.watched = second
        token = tokens(1, 1, seed=3)
        exact = eager.forward(token, own, position)
        assert torch.allclose(step.forward(token, second, position), exact, atol=1e-4 * float(exact.abs().max()))
    assert recorder.recorded == 2


@pytest.mark.parametrize(
    ("change", "recorder"),
    [("grow", Traced()), ("select", Traced()), ("repeat", Again()), ("reset", Again()), ("retype", Again())],
)
def test_memory_that_moved_is_recorded_anew(change: str, recorder: Again) -> None:
    """Never replayed on what was there before."""
    model = small()
    step, eager = GraphStep(EagerStep(model), recorder=recorder, notify=pytest.fail), EagerStep(model)
    caches, position = [cache_for(model, n_ctx=None) for _ in range(2)], 254 if change == "grow" else 6
    if isinstance(recorder, Traced):
        recorder.watched = caches[0]
    for one, cache in zip((step, eager), caches, strict=True):
        one.forward(tokens(2, position), cache, 0)
        one.forward(tokens(2, 1, seed=1), cache, position)
        one.forward(tokens(2, 1, seed=2), cache, position + 1)
        moved(cache, change)
        if change in ("reset", "retype"):
            one.forward(tokens(2, position + 2, seed=5), cache, 0)
    position += 2
    for turn in range(4):
        token = tokens({"select": 3, "repeat": 4}.get(change, 2), 1, seed=20 + turn)
        exact, got = eager.forward(token, caches[1], position), step.forward(token, caches[0], position)
        assert torch.allclose(got, exact, atol=1e-4 * float(exact.abs().max()))
        position += 1
    assert recorder.recorded == 2


def moved(cache: ModelCache, change: str) -> None:
    """What a caller may do to a cache between two tokens; `grow` comes by itself."""
    if change == "select":
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
    elif change in ("reset", "retype"):
        cache.reset()
        if change == "retype":
            cache.kv_layers[0].retype(copy.copy(cache.specs[0]))


def test_a_recording_dies_with_its_cache() -> None:
    model, recorder = small(), Traced()
    step, cache = GraphStep(EagerStep(model), recorder=recorder, notify=pytest.fail), cache_for(model)
    recorder.watched = cache
    step.forward(tokens(1, 6), cache, 0)
    step.forward(tokens(1, 1), cache, 6)
    assert len(step._recordings) == 1
    recorder.watched = None
    del cache
    gc.collect()
    assert len(step._recordings) == 0


def test_a_full_context_ends_in_an_error_and_counts_nothing() -> None:
    model = small()
    step, cache = GraphStep(EagerStep(model), recorder=Again()), cache_for(model, n_ctx=8)
    step.forward(tokens(1, 6), cache, 0)
    step.forward(tokens(1, 1), cache, 6)
    step.forward(tokens(1, 1), cache, 7)
    with pytest.raises(ContextError, match="9 tokens do not fit a context of 8"):
        step.forward(tokens(1, 1), cache, 8)
    assert [layer.n_seen for layer in cache.kv_layers] == [8]


@pytest.mark.parametrize("mode", ["warn", "off"])
def test_numbers_that_are_not_finite_name_their_layer(mode: str) -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    guard = Guard(mode=mode)  # type: ignore[arg-type]
    step, cache = GraphStep(EagerStep(model), recorder=Again()), cache_for(model, KVTypes("q8_0", "q8_0"), guard=guard)
    step.forward(tokens(1, 6), cache, 0)
    step.forward(tokens(1, 1), cache, 6)
    cache.kv_layers[1].view().segments[0].v[0][:, :, 2] = 0xFF  # the scales of a stored row become NaN
    if mode == "off":
        assert step.forward(tokens(1, 1), cache, 7).isnan().any()
        return
    with pytest.raises(NonFiniteError, match=r"layer 3 is not finite at token 8 .* rows-on-device") as caught:
        step.forward(tokens(1, 1), cache, 7)
    assert caught.value.source == "cache"


def test_inputs_that_are_not_finite_are_told_apart() -> None:
    model = small()
    step, cache = GraphStep(EagerStep(model), recorder=Again()), cache_for(model)
    step.forward(tokens(1, 6), cache, 0)
    step.forward(tokens(1, 1), cache, 6)
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="and so was what went into it"):
        step.forward(tokens(1, 1), cache, 7)


def test_the_engine_rebuilds_and_goes_on() -> None:
    model, said = small(), list[str]()
    recorder = Again()

    def make_cache(specs: Sequence[object]) -> ModelCache:
        kernels, encoders = recorded.KERNELS, recorded.ENCODERS
        return ModelCache(model.config, specs, n_ctx=40, guard=Guard(), kernels=kernels, encoders=encoders)

    engine = Engine(
        model,
        Policy(KVTypes("q4_0", "q4_0")).resolve(kv_facts(layer_facts(model.config))),
        n_ctx=40,
        guard=Guard(),
        notify=said.append,
        step=GraphStep(EagerStep(model), recorder=recorder),
        make_cache=make_cache,
    )
    engine.prefill([5, 6, 7, 8])
    for token in (9, 9):  # the guard checks the first of them
        engine.advance(torch.tensor([token]))
    engine.cache.kv_layers[0].view().segments[0].v[0][:, :, 1] = 0xFF
    logits = engine.advance(torch.tensor([10]))
    assert torch.isfinite(logits).all()
    assert engine.timings.n_rebuilds == 1
    assert engine.cache.specs[0].types.label == "q6_0"
    for token in (11, 12, 13):
        assert torch.isfinite(engine.advance(torch.tensor([token]))).all()
    assert recorder.recorded == 2
    assert engine.history.shape[1] == engine.cache.kv_layers[0].n_seen == 10


def test_a_step_that_the_guard_checks_is_not_replayed() -> None:
    """Its evidence is measured in the other step: here in the first token's and at the two edges of a block."""
    model, recorder = small(), Again()
    decoder = Counted(model)
    step, cache = GraphStep(decoder, recorder=recorder, notify=pytest.fail), cache_for(model, guard=Guard())
    step.forward(tokens(1, 27), cache, 0)
    replayed = []
    for position in range(27, 36):
        before = decoder.decoded
        step.forward(tokens(1, 1), cache, position)
        replayed.append(decoder.decoded > before)
    assert replayed == [position not in (27, 31, 32) for position in range(27, 36)]
    assert recorder.recorded == 1


@pytest.mark.parametrize(
    ("family", "types", "kernels", "reason"),
    [
        ("gemma2", F32, recorded.KERNELS, "layers 0 have a sliding window, for which Transformers makes a mask"),
        ("qwen3_5_text", F32, reference.KERNELS, "torch-reference reads row counters from the host"),
        ("qwen3_5_text", F32, KERNELS, "reads row counters from the host"),
    ],
)
def test_what_cannot_be_recorded_says_why_once_and_decodes(
    family: str, types: KVTypes, kernels: tuple[Kernel, ...], reason: str
) -> None:
    model, said = build(family, attention="hybridkv"), list[str]()
    specs = Policy(types).resolve(kv_facts(layer_facts(model.config)))
    options = {"guard": Guard(), "kernels": kernels, "encoders": recorded.ENCODERS}
    cache, own = (ModelCache(model.config, specs, **options) for _ in range(2))
    step, eager, position = GraphStep(EagerStep(model), recorder=Again(), notify=said.append), EagerStep(model), 0
    for piece in (tokens(1, 50), tokens(1, 1, seed=1), tokens(1, 1, seed=2)):
        assert torch.equal(step.forward(piece, cache, position), eager.forward(piece, own, position))
        position += piece.shape[1]
    assert len(said) == 1
    assert said[0].startswith("decoding is not recorded as a graph: ")
    assert reason in said[0]


def test_code_that_asks_the_device_is_found_out_before_anything_is_recorded() -> None:
    class Asking(EagerStep):
        def decode(self, tokens: Tensor, cache: ModelCache, positions: Tensor) -> Tensor:
            logits = super().decode(tokens, cache, positions)
            return logits if bool((positions > 3).all()) else logits * 0

    model, said = small(), list[str]()
    recorder = Suspicious()
    step, cache = GraphStep(Asking(model), recorder=recorder, notify=said.append), cache_for(model)
    compare(step, model, cache, [tokens(1, n, seed) for seed, n in enumerate((7, 1, 1))])
    assert recorder.recorded == 0
    assert len(said) == 1
    assert "not recorded as a graph" in said[0]


def test_a_prompt_after_decoding_and_logits_of_one_token() -> None:
    model, recorder = small(), Again()
    step, eager = GraphStep(EagerStep(model), recorder=recorder), EagerStep(model)
    caches, position = [cache_for(model) for _ in range(2)], 0
    for piece in (tokens(2, 5), tokens(2, 1), tokens(2, 4), tokens(2, 1), tokens(2, 1)):
        got, exact = step.logits(piece, caches[0], position), eager.logits(piece, caches[1], position)
        assert got.shape == (*piece.shape, 97)
        assert torch.allclose(got, exact, atol=1e-3)
        position += piece.shape[1]
    assert recorder.recorded == 1  # a prompt moves no memory within a context


def test_configs_that_are_refused_before_load(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("qwen3_5_text").config
    assert graph.rejects(config, "cpu") == "graphs are CUDA's, and this runs on cpu"
    assert graph.rejects(config, "cuda") is None
    assert (
        graph.rejects(build("gemma2").config, "cuda")
        == "layers 0 have a sliding window, for which Transformers makes a mask"
    )
    config.rope_parameters["rope_type"] = "dynamic"
    assert "RoPE of type 'dynamic'" in str(graph.rejects(config, "cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert graph.rejects(config, "cuda") == "triton is not installed"
