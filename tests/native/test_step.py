"""The native step against Transformers' own forward pass in float64, and the choice between the two."""

from __future__ import annotations

import copy
from atexit import register
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hybridkv.cache import KVLayer, KVTypes
from hybridkv.engine import steps
from hybridkv.engine.convert import convert
from hybridkv.engine.load import bundled_model, describe, load
from hybridkv.engine.steps import parse_backend, parse_graphs, resolve_step
from hybridkv.errors import ContextError, ModelError, UsageError
from hybridkv.formats import FORMATS
from hybridkv.gguf.load import load_gguf
from hybridkv.held import WeightKind, parse_weights
from hybridkv.hf import EagerStep, GraphStep, Holder, ModelCache, pack_model
from hybridkv.hf.step import eager
from hybridkv.hf.step.weights import PackedTensor
from hybridkv.kernels import KERNELS, AttentionParams, cpu_native
from hybridkv.kernels.weights import Weight, decode
from hybridkv.model import kv_facts, layer_facts, takes_chunks
from hybridkv.native import NativeStep, map_gguf, native_model, source_of
from hybridkv.native import checked as checked_run
from hybridkv.native.step import HEAD_ROWS, MAX_ROWS
from hybridkv.policy import Guard, GuardMode, MismatchError, NonFiniteError, Policy
from hybridkv.runtime.attend import verify_call
from hybridkv.runtime.view import LayerView
from tests.families import FAMILIES, HYBRIDS, build, remembering
from tests.thin import pairwise, slow_but

NATIVE = (
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_next",
    "lfm2",
    "lfm2_moe",
    "granitemoehybrid",
    "nemotron_h",
    "falcon_h1",
    "jamba",
    "llama",
    "llama_unbiased",
    "granite",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
    "bamba",
    "olmo_hybrid",
    "zamba2",
    "mistral",
    "phi3",
)
DIRECTORIES = ("bamba", "olmo_hybrid", "zamba2", "mistral", "phi3")
"""Of which there are no files."""
ROUNDED = {"lfm2_moe": 5e-3, "qwen3_5_moe_text": 5e-3}
"""Errors with integer products. A token of lfm2_moe falls to another expert, whose score differs by less than that; one
of qwen3_5_moe_text is ill-conditioned: activations rounded to 15 bits, in float64, alone change it by up to 3.3e-3."""


def packed_of(parameter: Tensor) -> Weight | None:
    """A parameter's packed weight; None if it is a plain tensor."""
    return parameter.packed if isinstance(parameter, PackedTensor) else None


needs_native = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")
pytestmark = [needs_native, pytest.mark.usefixtures("_inference")]


@pytest.fixture
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def cache_for(model: PreTrainedModel, types: KVTypes | None = None) -> ModelCache:
    specs = Policy(types or KVTypes("f32", "f32")).resolve(kv_facts(layer_facts(model.config)))
    return ModelCache(model.config, specs, guard=Guard())


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def native_step(model: PreTrainedModel, weights: WeightKind = "auto") -> NativeStep:
    """The native step over a Transformers model's weights, held as asked."""
    return NativeStep(native_model(model.config, source_of(model), weights))


@cache
def written(family: str, weights: str) -> Path:
    """A GGUF file of a family's random model."""
    directory = Path(mkdtemp(prefix="hybridkv-native-"))
    register(rmtree, directory)
    build(family).save_pretrained(directory / "model")
    return convert(directory / "model", directory / "model.gguf", weights=weights, tokenizer="omitted").path


def from_file(family: str, weights: str) -> NativeStep:
    """The native step over a mapped file."""
    mapped = map_gguf(written(family, weights))
    return NativeStep(native_model(mapped.config, mapped.source, "auto"))


def round_weights(model: PreTrainedModel, name: str = "q8_0") -> None:
    """Give every matrix the values of its q8_0 or q4_0 form."""
    fmt = FORMATS[name]
    for weight in model.parameters():
        if weight.dim() == 2 and weight.shape[1] % 32 == 0:
            planes = fmt.encode(weight.data.unsqueeze(0).unsqueeze(0), "absmax")
            weight.data.copy_(fmt.decode(planes, weight.shape[1])[0, 0])


def every_logit(family: str, source: str, pieces: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """DynamicCache, eager attention; the logits after every token of each piece, `[B, T, V]`.

    `source` is the model itself, its matrices rounded, or a file with matrices of a type, decoded.
    """
    if source in ("model", "rounded"):
        model = build(family)
    else:
        model = load_gguf(written(family, source), attn_implementation="eager").model
    if source == "rounded":
        round_weights(model)
    model = model.to(dtype)
    model.set_experts_implementation("eager")  # torch's grouped products take no float64
    if not takes_chunks(model.config):  # the class would start each piece over
        whole = model(input_ids=torch.cat(list(pieces), dim=1), use_cache=False).logits
        return list(torch.split(whole, [piece.shape[1] for piece in pieces], dim=1))
    cache, position, logits = DynamicCache(config=model.config), 0, []
    for piece in pieces:
        positions = torch.arange(position, position + piece.shape[1]).expand(piece.shape)
        answer = model(input_ids=piece, position_ids=positions, **remembering(cache), use_cache=True)
        logits.append(answer.logits)
        position += piece.shape[1]
    return logits


def transformers_logits(
    family: str, source: str, pieces: Sequence[Tensor], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """The logits after each piece."""
    return [logits[:, -1] for logits in every_logit(family, source, pieces, dtype)]


def error(got: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


RUNS = ([[1, 1, 1], [3, 1, 2], [70, 1, 33, 1]], [1, 3], ["best", "portable"])
"""Lengths of runs, sequences, instruction sets."""


@pytest.mark.parametrize(
    ("family", "source", "lengths", "batch", "isa"),
    [
        *pairwise([family for family in NATIVE if family not in DIRECTORIES], ["model", "f32", "q8_0"], *RUNS),
        *pairwise(DIRECTORIES, ["model"], *RUNS),
    ],
    indirect=["isa"],
)
def test_logits(family: str, source: str, lengths: list[int], batch: int, isa: str) -> None:
    """Float32 weights stay float32; q8_0 ones are multiplied as integers.

    Float rows are attended within 2e-5 of exact, in each layer; in AMX's tiles of bfloat16, within 5e-5.
    """
    pieces = [tokens(batch, n, seed) for seed, n in enumerate(lengths)]
    model = build(family, attention="hybridkv")
    step = NativeStep(model) if source == "model" else from_file(family, source)
    cache, position = cache_for(model), 0
    assert ("q8_0" in step.name) == (source == "q8_0")
    got = []
    for piece in pieces:
        got.append(step.forward(piece, cache, position))
        position += piece.shape[1]
    exact = torch.cat(transformers_logits(family, source, pieces))
    assert got[0].dtype == torch.float32
    floats = 1e-4 if step.name.startswith("native-amx") else 4e-5
    assert error(torch.cat(got), exact) < (ROUNDED.get(family, 1e-3) if source == "q8_0" else floats)


def test_a_prompt_longer_than_the_buffers() -> None:
    pieces = [tokens(2, MAX_ROWS // 2 + 77), tokens(2, 1, seed=1)]
    model = build("qwen3_5_text", attention="hybridkv")
    step, cache, position = NativeStep(model), cache_for(model), 0
    for piece, exact in zip(pieces, transformers_logits("qwen3_5_text", "model", pieces), strict=True):
        assert error(step.forward(piece, cache, position), exact) < 5e-5
        position += piece.shape[1]


@pytest.mark.parametrize("kind", [NativeStep, EagerStep])
@pytest.mark.parametrize("lengths", [(1,), (HEAD_ROWS + 3, 1, 31), (MAX_ROWS // 2 + 77, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_after_every_token(
    kind: type[NativeStep | EagerStep], batch: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of the head's and the layers' buffers, and after them `forward` goes on from the same states."""
    monkeypatch.setattr(eager, "PREFILL_CHUNK", 33)
    pieces = [tokens(batch, n, seed) for seed, n in enumerate((*lengths, 2))]
    model = build("qwen3_5_text", attention="hybridkv")
    step, cache, position, got = kind(model), cache_for(model), 0, []
    for piece in pieces[:-1]:
        got.append(step.logits(piece, cache, position))
        assert got[-1].shape == (*piece.shape, 97)
        assert got[-1].dtype == torch.float32
        position += piece.shape[1]
    exact = torch.cat(every_logit("qwen3_5_text", "model", pieces), dim=1)
    assert error(torch.cat(got, dim=1), exact[:, :position]) < 5e-5
    assert error(step.forward(pieces[-1], cache, position), exact[:, -1]) < 5e-5


@pytest.mark.parametrize("family", HYBRIDS)
def test_every_family_gives_every_logit(family: str) -> None:
    """Also those whose code takes a prompt at once, or knows no way to keep the last logits alone."""
    model = build(family, attention="hybridkv")
    step, cache, prompt = resolve_step(model.config, "cpu")(model), cache_for(model), tokens(2, 7)
    got = step.logits(prompt, cache, 0)
    exact = every_logit(family, "model", [prompt], torch.float32)[0]
    assert error(got, exact.double()) < 1e-4


@pytest.mark.parametrize("order", ["native first", "eager first"])
def test_neither_step_continues_the_other_s_states(order: str) -> None:
    """Value heads are in the file's order in one, in Transformers' in the other: silently wrong if it were let."""
    model = build("qwen3_5_text", attention="hybridkv")
    steps = [NativeStep(model), EagerStep(model)]
    if order == "eager first":
        steps.reverse()
    cache = cache_for(model)
    steps[0].forward(tokens(2, 9), cache, 0)
    with pytest.raises(ContextError, match="cannot continue each other's states"):
        steps[1].forward(tokens(2, 1), cache, 9)
    cache.reset()
    steps[1].forward(tokens(2, 9), cache, 0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("types", [("q4_0", "q4_0"), ("q8_KV", "iq4_nl"), ("f16", "q5_1"), ("q6_0", "bf16")])
def test_one_run_decodes_as_attention_between_runs_does(types: tuple[str, str], rotated: bool, batch: int) -> None:
    """The same kernel either way: where nothing is rotated, the same bits."""
    model = build("qwen3_5_text", attention="hybridkv")
    step, kv = NativeStep(model), KVTypes(*types, rotate_k=rotated, rotate_v=rotated)
    inside = cache_for(model, kv)
    # A kernel that is not the native one itself is called by the cache, between two runs.
    between = ModelCache(model.config, inside.specs, kernels=tuple(replace(k) for k in KERNELS), guard=Guard())
    for position, piece in ((0, tokens(batch, 6)), (6, tokens(batch, 1, seed=1)), (7, tokens(batch, 1, seed=2))):
        a, b = (step.forward(piece, cache, position) for cache in (inside, between))
        assert torch.allclose(a, b, atol=2e-2) if rotated else torch.equal(a, b)
    for a_layer, b_layer in zip(inside.kv_layers, between.kv_layers, strict=True):
        assert a_layer.n_seen == b_layer.n_seen == 8
        assert torch.allclose(a_layer.decode()[0], b_layer.decode()[0], atol=2e-2)


@pytest.mark.parametrize("mode", ["check", "off"])
def test_a_decode_that_goes_wrong_names_its_layer(mode: GuardMode) -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    specs = Policy(KVTypes("q8_0", "q8_0")).resolve(kv_facts(layer_facts(model.config)))
    step, cache = NativeStep(model), ModelCache(model.config, specs, guard=Guard(mode=mode))
    step.forward(tokens(1, 6), cache, 0)
    cache.kv_layers[1].view().segments[0].v[0][:, :, 2] = 0xFF  # the scales of a stored row become NaN
    if mode == "off":
        assert step.forward(tokens(1, 1), cache, 6).isnan().any()
        return
    with pytest.raises(NonFiniteError) as caught:
        step.forward(tokens(1, 1), cache, 6)
    assert caught.value.layer == 3
    assert "cpu-" in str(caught.value)


def test_cache_operations_between_steps() -> None:
    """Repeating, selecting and forgetting sequences: each goes on as if it were alone."""
    model = build("qwen3_5_text", attention="hybridkv")
    step, prompt, then = NativeStep(model), tokens(1, 7), tokens(3, 1, seed=1)
    alone = []
    for token in then:
        cache = cache_for(model)
        step.forward(prompt, cache, 0)
        alone.append(step.forward(token.unsqueeze(0), cache, 7))
    cache = cache_for(model)
    step.forward(prompt, cache, 0)
    cache.batch_repeat_interleave(3)
    assert torch.allclose(step.forward(then, cache, 7), torch.cat(alone), atol=1e-5)
    cache.batch_select_indices(torch.tensor([2]))
    last = step.forward(then[:1], cache, 8)
    assert last.shape == (1, 97)
    cache.reset()
    step.forward(prompt, cache, 0)
    assert torch.allclose(step.forward(then[:1], cache, 7), alone[0], atol=1e-5)


def test_two_caches_in_turn_get_the_bits_that_they_get_alone() -> None:
    """What is remembered of one cache's states is not taken for the other's."""
    model = build("qwen3_5_text", attention="hybridkv")
    pieces = [[tokens(1, 7, seed), *(tokens(1, 1, seed + n) for n in (1, 2, 3))] for seed in (0, 10)]

    def run(step: NativeStep, cache: ModelCache, own: Sequence[Tensor], at: int) -> Tensor:
        return step.forward(own[at], cache, 7 + at - 1 if at else 0)

    alone = []
    for own in pieces:
        step, cache = NativeStep(model), cache_for(model)
        alone.append([run(step, cache, own, at) for at in range(4)])
    step, caches = NativeStep(model), [cache_for(model), cache_for(model)]
    for at in range(4):
        for which in (0, 1):
            assert torch.equal(run(step, caches[which], pieces[which], at), alone[which][at])
    with pytest.raises((AssertionError, ModelError)):
        step.forward(tokens(2, 1), caches[1], 10)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_code_on_packed_weights(family: str, rounded: bool) -> None:
    """Every family, whatever its code does with a weight; against plain float32 weights."""
    pieces = [tokens(2, 7), tokens(2, 1, seed=1)]
    model = build(family, attention="hybridkv")
    if rounded:
        round_weights(model)
    cache, position, got = cache_for(model), 0, []
    pack_model(model, "int8" if rounded else "auto")
    step = EagerStep(model)
    assert ("q8_0" in step.name) == rounded
    for piece in pieces:
        got.append(step.forward(piece, cache, position))
        position += piece.shape[1]
    exact = torch.cat(transformers_logits(family, "rounded" if rounded else "model", pieces, torch.float32))
    assert error(torch.cat(got), exact.double()) < (2e-3 if rounded else 1e-4)


@pytest.mark.parametrize("kind", ["auto", "f32", "bf16", "int8", "int4"])
def test_weights_are_held_as_asked(kind: WeightKind) -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    step = native_step(model, kind)
    kept = {"auto": "f32", "int8": "q8_0", "int4": "q4_0 + q8_0"}.get(kind, kind)
    assert step.name.endswith(f"weights {kept}")
    exact = transformers_logits("qwen3_5_text", "model", [tokens(1, 7)])[0]
    got = step.forward(tokens(1, 7), cache_for(model), 0)
    least, most = {"auto": (0, 2e-5), "f32": (0, 2e-5), "int4": (1e-2, 1.0)}.get(kind, (1e-4, 0.1))
    assert least < error(got, exact) < most


def unpack_model(model: PreTrainedModel) -> None:
    """Make packed matrices plain tensors of the same values."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if (held := packed_of(parameter)) is not None:
                setattr(module, name, torch.nn.Parameter(decode(held), requires_grad=False))


@pytest.mark.parametrize("isa", ["best", "portable"], indirect=True)
@pytest.mark.parametrize("length", [1, 7, 70])
def test_int4_is_transformers_on_the_unpacked_values(length: int, isa: str) -> None:
    model, plain = build("qwen3_5_text", attention="hybridkv"), build("qwen3_5_text")
    pack_model(plain, "int4")
    unpack_model(plain)
    exact = plain.double()(tokens(2, length)).logits[:, -1]
    pack_model(model, "int4")
    assert error(EagerStep(model).forward(tokens(2, length), cache_for(model), 0), exact) < 1e-3


def test_int4_keeps_the_vocabulary_and_odd_widths_apart() -> None:
    """Embedding and head are int8, tied or not; rows that are no whole blocks, and what is q4_0, stay unchanged."""
    for tied in (False, True):
        model = build("qwen3_5_text")
        model.config.tie_word_embeddings = tied
        model.tie_weights()
        mlp = model.model.layers[0].mlp
        mlp.gate_proj.weight = torch.nn.Parameter(torch.randn(5, 33), requires_grad=False)
        fmt = FORMATS["q4_0"]
        filed = fmt.decode(fmt.encode(mlp.up_proj.weight, "absmax"), mlp.up_proj.weight.shape[1])
        mlp.up_proj.weight.data.copy_(filed)
        pack_model(model, "int4")
        types = {name: packed_of(p).format.name for name, p in model.named_parameters() if packed_of(p) is not None}
        ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
        assert {name for name, type_ in types.items() if type_ == "q8_0"} == ends
        assert {name for name, type_ in types.items() if type_ == "f32"} == {"model.layers.0.mlp.gate_proj.weight"}
        assert set(types.values()) == {"q8_0", "q4_0", "f32"}
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        assert torch.equal(mlp.up_proj.weight + 0, filed)


def test_a_packed_tensor_is_its_values_to_whoever_asks() -> None:
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(0))
    held = Holder("f32").of_values(torch.nn.Parameter(weight, requires_grad=False))
    assert isinstance(held, torch.nn.Parameter)
    assert held.shape == (33, 64)
    assert held.dtype == torch.float32
    assert torch.equal(held + 0, weight)
    assert torch.equal(held.T @ torch.ones(33), weight.T @ torch.ones(33))
    x, ids = torch.randn(2, 3, 64), torch.tensor([[4, 32]])
    linear = torch.nn.functional.linear(x, held, torch.ones(33))
    assert torch.allclose(linear, x @ weight.T + 1, atol=1e-5)
    assert torch.equal(torch.nn.functional.embedding(ids, held), weight[ids])
    vector = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    assert Holder("f32").of_values(vector) is vector


def test_tied_weights_stay_tied() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    pack_model(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("part", ["whole", "base"])
@pytest.mark.parametrize(
    ("family", "tied"), [("qwen3_5_text", False), ("qwen3_5_text", True), ("lfm2_moe", True), ("gemma3_text", True)]
)
def test_packed_weights_are_saved_unpacked(tmp_path: Path, family: str, tied: bool, part: str) -> None:
    model = build(family)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    pack_model(model)
    saved = model if part == "whole" else model.model
    saved.save_pretrained(tmp_path)
    back = type(saved).from_pretrained(tmp_path)
    prefix = "" if part == "whole" else "model."
    assert len(back.state_dict()) == len([name for name in expected if name.startswith(prefix)])
    for name, value in back.state_dict().items():
        assert torch.equal(value, expected[prefix + name]), name
    if part == "whole" and tied:
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert packed_of(model.model.embed_tokens.weight) is not None
    assert packed_of(model.state_dict(keep_vars=True)["model.embed_tokens.weight"]) is not None


def test_a_packed_model_is_copied_and_cast() -> None:
    model, ids = build("qwen3_5_text"), tokens(1, 5)
    pack_model(model)
    twin = copy.deepcopy(model)
    held = packed_of(twin.model.embed_tokens.weight)
    assert held is packed_of(model.model.embed_tokens.weight) is not None
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert twin.to(torch.bfloat16).model.embed_tokens.weight.dtype == torch.bfloat16
    assert packed_of(twin.model.embed_tokens.weight) is held


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda weight: weight.mul_(2),
    "data": lambda weight: weight.data.add_(1),
    "out": lambda weight: torch.add(weight + 0, 1.0, out=weight.data),
    "some values": lambda weight: weight.data.__setitem__(0, 0.0),
    "other data": lambda weight: setattr(weight, "data", torch.zeros(33, 64)),
    "data of another shape": lambda weight: setattr(weight, "data", torch.zeros(34, 64)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_change_of_packed_weights_is_an_error(name: str) -> None:
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(0))
    held = Holder("f32").of_values(torch.nn.Parameter(weight, requires_grad=False))
    with pytest.raises(ModelError, match=r"packed weights cannot be changed: .*\nhint: load the model with plain"):
        WRITES[name](held)
    assert torch.equal(held + 0, weight)


def test_a_checkpoint_is_not_loaded_into_packed_weights() -> None:
    model = build("qwen3_5_text")
    other = {name: value + 1 for name, value in model.state_dict().items()}
    pack_model(model)
    with pytest.raises(RuntimeError, match="packed weights cannot be changed"):
        model.load_state_dict(other)


def test_unknown_weights() -> None:
    with pytest.raises(UsageError, match="--weights 'int3'; allowed: auto, plain, f32, bf16, int8, int4"):
        parse_weights("int3")


@pytest.mark.parametrize("family", HYBRIDS)
def test_what_resolves_runs_and_what_does_not_says_why(family: str) -> None:
    config = build(family).config
    chosen = resolve_step(config, "cpu")
    assert (chosen.func if isinstance(chosen, partial) else chosen) is (
        NativeStep if family in NATIVE else EagerStep
    ), family
    assert resolve_step(config, "cpu", "eager") is EagerStep
    on_cuda = resolve_step(config, "cuda", graphs="off")
    assert (on_cuda.func if isinstance(on_cuda, partial) else on_cuda) is (
        steps._on_card if family in NATIVE and find_spec("triton") else EagerStep
    )
    assert resolve_step(config, "cuda", "eager", graphs="off") is EagerStep
    if family not in NATIVE:
        with pytest.raises(UsageError, match=f"cannot run this model: knows no {family} layers"):
            resolve_step(config, "cpu", "native")


def test_graphs_on_cuda_by_default() -> None:
    said = list[str]()
    step = resolve_step(build("lfm2").config, "cuda", notify=said.append)(build("lfm2"))
    assert isinstance(step, GraphStep)
    assert step.name == "eager, decode as a graph"
    assert said == []
    windowed = build("gemma2").config
    assert resolve_step(windowed, "cuda", notify=said.append) is EagerStep
    assert said == [
        "decoding is not recorded as a graph: layers 0 have a sliding window, for which Transformers makes a mask"
    ]
    with pytest.raises(UsageError, match="--graph 'yes'; allowed: on, off"):
        parse_graphs("yes")


def test_configs_that_the_family_refuses() -> None:
    config = build("qwen3_5_text").config
    config.hidden_act = "gelu"
    with pytest.raises(UsageError, match="activation 'gelu', not silu"):
        resolve_step(config, "cpu", "native")
    assert resolve_step(config, "cpu") is EagerStep


def test_unknown_step() -> None:
    with pytest.raises(UsageError, match="--backend 'fast'; allowed: auto, native, eager"):
        parse_backend("fast")


def test_a_model_that_takes_no_cache_is_refused() -> None:
    """A cache under a wrong name would vanish among the keyword arguments: every call would start over, in silence."""

    class Encoder(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return input_ids

    with pytest.raises(ModelError, match="Encoder takes no cache"):
        EagerStep(Encoder())


@pytest.mark.parametrize(
    ("family", "rounded", "isa"),
    slow_but(
        product(NATIVE, (False, True), ("best", "portable")),
        [(family, i % 2 == 0, ("best", "best", "portable")[i % 3]) for i, family in enumerate(NATIVE)],
    ),
    indirect=["isa"],
)
def test_separate_caches_get_the_bits_that_they_get_alone(family: str, rounded: bool, isa: str) -> None:
    """Eleven sequences of all lengths and several types in one run, weights of f32 and of q8_0."""
    model = build(family, attention="hybridkv")
    step = native_step(model, "int8" if rounded else "auto")
    kinds = (KVTypes("q8_0", "q8_0"), KVTypes("q4_0", "q4_0", rotate_k=True, tail=32, sink=2, center=True))
    together, apart, positions, newest = [], [], [], []
    for index in range(11):
        prompt = tokens(1, 1 + 13 * index, seed=index)
        cache = cache_for(model, kinds[index % 2])
        logits = step.forward(prompt, cache, 0)
        together.append(cache)
        apart.append(cache.copy())
        positions.append(prompt.shape[1])
        newest.append(int(logits.argmax()))
    for _ in range(4):
        answers = step.forward_many(torch.tensor(newest), together, positions)
        alone = [
            step.forward(torch.tensor([[token]]), cache, position)
            for token, cache, position in zip(newest, apart, positions, strict=True)
        ]
        assert not answers.failed
        assert torch.equal(answers.logits, torch.cat(alone))
        newest, positions = answers.logits.argmax(-1).tolist(), [p + 1 for p in positions]
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.kv_layers[-1].decode()[0], other.kv_layers[-1].decode()[0])


def test_a_sequence_that_is_not_finite_is_named_and_alone() -> None:
    """Its neighbours' logits are those without it."""
    model = build("qwen3_5_text", attention="hybridkv")
    step, caches = NativeStep(model), []
    for index in range(3):
        caches.append(cache_for(model, KVTypes("f32", "f32")))
        step.forward(tokens(1, 20, seed=index), caches[-1], 0)
    caches[1].kv_layers[0]._packed.planes.v[0][:, :, 3] = 0xFF
    expected = [step.forward(tokens(1, 1), caches[i].copy(), 20) for i in (0, 2)]
    answers = step.forward_many(tokens(3, 1).flatten()[:1].repeat(3), caches, [20] * 3)
    assert list(answers.failed) == [1]
    assert answers.failed[1].layer == 1
    assert torch.equal(answers.logits[[0, 2]], torch.cat(expected))


def test_each_sequence_of_several_is_checked_as_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same calls; one that does not hold is named, and its neighbours' bits are those without the check."""
    model = build("qwen3_5_text", attention="hybridkv")
    step, lengths = NativeStep(model), (20, 29, 31)
    checked: list[tuple[int, int]] = []
    bad: list[KVLayer] = []

    def checking(query: Tensor, packed: LayerView, params: AttentionParams, out: Tensor) -> None:
        checked.append((packed.layer.spec.facts.layer, packed.layer.n_seen))
        if any(packed.layer is layer for layer in bad):
            raise MismatchError("a test's doing")
        verify_call(query, packed, params, out)

    monkeypatch.setattr(checked_run, "verify_call", checking)

    def caches(mode: GuardMode) -> list[ModelCache]:
        made = []
        for index, length in enumerate(lengths):
            specs = Policy(KVTypes("q8_0", "q8_0")).resolve(kv_facts(layer_facts(model.config)))
            made.append(ModelCache(model.config, specs, n_ctx=64, guard=Guard(mode=mode)))
            step.forward(tokens(1, length, seed=index), made[-1], 0)
        return made

    newest = tokens(3, 6)
    alone, together, unwatched = caches("check"), caches("check"), caches("off")
    for index, length in enumerate(lengths):
        for t in range(6):
            step.forward(newest[index : index + 1, t : t + 1], alone[index], length + t)
    expected = sorted(checked)
    assert expected
    checked.clear()
    for t in range(6):
        positions = [length + t for length in lengths]
        answers = step.forward_many(newest[:, t], together, positions)
        assert not answers.failed
        assert torch.equal(answers.logits, step.forward_many(newest[:, t], unwatched, positions).logits)
    assert sorted(checked) == expected

    again, unwatched = caches("check"), caches("off")
    bad.append(again[1].kv_layers[1])
    answers = step.forward_many(newest[:, 0], again, lengths)
    assert list(answers.failed) == [1]
    assert "a test's doing" in str(answers.failed[1])
    assert torch.equal(answers.logits, step.forward_many(newest[:, 0], unwatched, lengths).logits)


def test_a_packed_model_from_a_gguf_file_is_saved(tmp_path: Path) -> None:
    loaded = load(describe(bundled_model()), dtype=torch.float32, device="cpu", weights="auto", backend="eager")
    held = packed_of(loaded.model.model.embed_tokens.weight)
    loaded.model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"], decode(held))
