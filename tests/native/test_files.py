"""Quantized GGUF files end to end: the native step over the mapped file, against the decoded file in Transformers.

The oracle is gguf-py's decoding and Transformers' own forward pass in float64; files are rounded by ggml's quantizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hybridkv.cache import KVTypes
from hybridkv.engine.describe import describe
from hybridkv.engine.load import load
from hybridkv.errors import ModelFileError
from hybridkv.gguf.load import load_gguf
from hybridkv.held import WeightKind
from hybridkv.hf import EagerStep, ModelCache
from hybridkv.kernels import cpu_native
from hybridkv.model import kv_facts, layer_facts
from hybridkv.native import NativeModel, NativeStep, map_gguf, native_model
from hybridkv.policy import Guard, Policy
from tests.families import remembering
from tests.native.quantized import MIXES, SIZES, plain_file, quantized_file
from tests.thin import mostly_long, pairwise

pytestmark = [
    pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built"),
    pytest.mark.usefixtures("_inference"),
]
ISAS = ("best", "avx2", "portable")
LEAST_GAP = 1e-3
MOST = 2e-3
"""Relative error of the logits; what differs is activations of 15 bits, layer by layer."""


@pytest.fixture
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


PIECES = [tokens(2, 37), tokens(2, 1, seed=1), tokens(2, 3, seed=2), tokens(2, 1, seed=3)]


@cache
def native(family: str, mix: str, isa: str, tensors_per_part: int = 0) -> NativeStep:
    """The step over the mapped file, for the instruction set that the environment asks for."""
    del isa
    mapped = map_gguf(quantized_file(family, mix, tensors_per_part))
    return NativeStep(native_model(mapped.config, mapped.source, "auto"))


def decoded(path: Path) -> PreTrainedModel:
    model = load_gguf(path, attn_implementation="eager").model.double()
    model.set_experts_implementation("eager")  # torch's grouped products take no float64
    return model


class Gaps:
    """How clearly a model chooses experts: the least distance to the next best, of every token `[B, T]`.

    In units of the spread of the token's scores. Where it is next to nothing, rounding chooses another expert.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._n_used = getattr(model.config, "num_experts_per_tok", 0)
        self._found: list[Tensor] = []
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(self._note)

    def _note(self, module: Any, inputs: tuple[Tensor], output: object) -> None:
        del output
        scores = inputs[0].flatten(0, -2) @ module.weight.T
        ranked = scores.sort(dim=-1, descending=True).values
        self._found.append((ranked[:, self._n_used - 1] - ranked[:, self._n_used]) / scores.std(dim=-1))

    def take(self, shape: torch.Size) -> Tensor:
        """Of one forward pass over tokens of this shape."""
        found, self._found = self._found, []
        return torch.stack(found).amin(0).view(shape) if found else torch.full(shape, torch.inf)


@cache
def exact(family: str, mix: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Of every piece, the logits after each token, float64, and which tokens come before a choice that is no choice."""
    with torch.inference_mode():
        model = decoded(quantized_file(family, mix))
        past, position, logits = DynamicCache(config=model.config), 0, []
        gaps, clear = Gaps(model), torch.ones(PIECES[0].shape[0], 1)
        for piece in PIECES:
            positions = torch.arange(position, position + piece.shape[1]).expand(piece.shape)
            answer = model(input_ids=piece, position_ids=positions, **remembering(past), use_cache=True)
            sure = torch.cat([clear, (gaps.take(piece.shape) > LEAST_GAP).float()], dim=1).cummin(dim=1).values
            clear = sure[:, -1:]
            logits.append((answer.logits, sure[:, 1:].bool()))
            position += piece.shape[1]
        return tuple(logits)


def cache_of(family: str, mix: str, types: KVTypes | None = None) -> ModelCache:
    config = map_gguf(quantized_file(family, mix)).config
    specs = Policy(types or KVTypes("f32", "f32")).resolve(kv_facts(layer_facts(config)))
    return ModelCache(config, specs, guard=Guard())


def error(got: Tensor, right: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - right).square().mean().sqrt() / right.square().mean().sqrt())


ALL = list(product(SIZES, MIXES, ISAS))
QUICK = [(tuple(SIZES)[i % len(SIZES)], mix, isa) for i, (mix, isa) in enumerate(product(MIXES, ISAS))]
"""Every mix on every instruction set, the families by turns: each file and its exact answer cost a second."""


@pytest.mark.parametrize(("family", "mix", "isa"), mostly_long(ALL, QUICK), indirect=["isa"])
def test_logits_of_prompt_and_decode(family: str, mix: str, isa: str) -> None:
    """Each type is what the file says: nothing was rounded again on the way."""
    step = native(family, mix, isa)
    names = {"q4_k_m": {"q4_K", "q6_K"}, "iq4_xs": {"iq4_xs", "q6_K"}, "q3_k": {"q3_K", "q5_K"}}.get(mix, set())
    assert names <= set(step.name.partition("weights ")[2].split(" + ")), step.name
    past, position = cache_of(family, mix), 0
    n_compared = 0
    for piece, (right, sure) in zip(PIECES, exact(family, mix), strict=True):
        got = step.logits(piece, past, position)
        assert torch.isfinite(got).all()
        if sure.any():
            assert error(got[sure], right[sure]) < MOST, (position, piece.shape)
        n_compared += int(sure.sum())
        position += piece.shape[1]
    assert n_compared >= 20


@pytest.mark.parametrize(("family", "mix", "isa"), pairwise(SIZES, ["q4_k_m", "q3_k"], ISAS), indirect=["isa"])
def test_sequences_with_caches_of_their_own_get_the_bits_that_they_get_alone(family: str, mix: str, isa: str) -> None:
    """Of prompts of different lengths, decoded together; and those in one cache the same numbers up to rounding."""
    step = native(family, mix, isa)
    prompts, newest = [tokens(1, n, seed=n) for n in (5, 17, 2)], tokens(3, 4, seed=9)
    together, alone = ([cache_of(family, mix, KVTypes("q8_0", "q8_0")) for _ in prompts] for _ in range(2))
    for prompt, one, other in zip(prompts, together, alone, strict=True):
        assert torch.equal(step.forward(prompt, one, 0), step.forward(prompt, other, 0))
    for t in range(newest.shape[1]):
        positions = [prompt.shape[1] + t for prompt in prompts]
        answers = step.forward_many(newest[:, t], together, positions)
        assert not answers.failed
        for i, (own, position) in enumerate(zip(alone, positions, strict=True)):
            assert torch.equal(answers.logits[i : i + 1], step.forward(newest[i : i + 1, t : t + 1], own, position))
    shared, single = cache_of(family, mix), cache_of(family, mix)
    prompt = tokens(3, 7)
    both = step.forward(prompt, shared, 0), step.forward(prompt[1:2], single, 0)
    assert error(both[0][1:2], both[1].double()) < 1e-5
    both = step.forward(newest[:, :1], shared, 7), step.forward(newest[1:2, :1], single, 7)
    assert error(both[0][1:2], both[1].double()) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "llama_unbiased"])
def test_a_split_file_is_the_same_model(family: str) -> None:
    whole, parts = native(family, "q4_k_m", "best"), native(family, "q4_k_m", "best", 7)
    assert len(list(quantized_file(family, "q4_k_m", 7).parent.glob("q4_k_m-7-*.gguf"))) > 2
    assert torch.equal(*(step.logits(PIECES[0], cache_of(family, "q4_k_m"), 0) for step in (whole, parts)))


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_5_text"])
@pytest.mark.parametrize("kind", ["f32", "bf16", "int8", "int4"])
def test_k_quants_held_otherwise(kind: WeightKind, family: str) -> None:
    """Encoded from what they mean: float32 keeps it, the others are as far away as their bits."""
    loaded = load(describe(quantized_file(family, "q6_k")), dtype=torch.float32, device="cpu", weights=kind)
    step = NativeStep(loaded.model)
    held = {"int8": "q8_0", "int4": "q4_0"}.get(kind, kind)
    assert held in step.name
    assert "q6_K" not in step.name
    got = step.logits(PIECES[0], cache_of(family, "q6_k"), 0)
    least, most = {"f32": (0.0, 1e-4), "bf16": (1e-4, 0.1), "int8": (1e-4, 0.2), "int4": (1e-2, 1.0)}[kind]
    assert least <= error(got, exact(family, "q6_k")[0][0]) < most


def test_no_matrix_is_held_in_two_forms(tmp_path: Path) -> None:
    """A directory's values are let go of once they are encoded."""
    directory = plain_file("qwen3_moe").parent / "model"
    loaded = load(describe(directory), dtype=torch.float32, device="cpu", weights="int8")
    NativeStep(loaded.model)
    assert isinstance(loaded.model, NativeModel)
    own = loaded.model.source._source  # type: ignore[attr-defined]
    assert [weight.format.name for weight in own.matrices() if weight.n_out > 1] == []


@pytest.mark.parametrize("mix", ["q4_k_m", "q2_k"])
def test_the_eager_engine_over_the_same_file(mix: str) -> None:
    """What lies in the file as in the model stays there; the rest is decoded."""
    path = quantized_file("qwen3_moe", mix)
    loaded = load(describe(path), dtype=torch.float32, device="cpu", weights="auto", backend="eager")
    step = EagerStep(loaded.model)
    assert {"q4_k_m": "q4_K", "q2_k": "q2_K"}[mix] in step.name
    specs = Policy(KVTypes("f32", "f32")).resolve(kv_facts(layer_facts(loaded.model.config)))
    got = step.logits(PIECES[0], ModelCache(loaded.model.config, specs, guard=Guard()), 0)
    right, sure = exact("qwen3_moe", mix)[0]
    assert error(got[sure], right[sure]) < MOST


NAME = "blk.1.ffn_gate.weight"


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """Of a file that says so: the header is refused."""
    path = tmp_path / "rows.gguf"
    data = bytearray(quantized_file("qwen3", "q4_k_m").read_bytes())
    at = data.index(NAME.encode()) + len(NAME) + 4
    assert int.from_bytes(data[at : at + 8], "little") == 256
    data[at : at + 8] = (96).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"96|whole"):
        map_gguf(path)
