"""A model with 8-bit activations: near the exact one, the same bits alone and beside others, and said in its name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hybridkv.cache import KVTypes
from hybridkv.engine.steps import parse_activations
from hybridkv.errors import UsageError
from hybridkv.kernels import cpu_native
from hybridkv.kernels.weights import Activations, takes_int8
from hybridkv.native import NativeStep, map_gguf, native_model
from tests.native.quantized import quantized_file
from tests.native.test_files import PIECES, cache_of, error, exact, tokens

pytestmark = [
    pytest.mark.skipif(
        cpu_native.available() is not None or not takes_int8("q4_K"), reason="no products with 8-bit activations here"
    ),
    pytest.mark.usefixtures("_inference"),
]
FAMILIES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3")


@pytest.fixture
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def native(family: str, mix: str, activations: Activations = "int8") -> NativeStep:
    mapped = map_gguf(quantized_file(family, mix))
    return NativeStep(native_model(mapped.config, mapped.source, "auto"), activations)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", ["q4_k_m", "q2_k"])
def test_logits_are_as_near_as_eight_bits_are(family: str, mix: str) -> None:
    """Further away than 15 bits, so that they are used, in prompts and in single tokens, and near all the same."""
    step, past, position = native(family, mix), None, 0
    past = cache_of(family, mix)
    for piece, (right, sure) in zip(PIECES, exact(family, mix), strict=True):
        got = step.logits(piece, past, position)
        if sure.any() and "moe" not in family:  # another expert may be chosen, which is no rounding
            assert 2e-3 < error(got[sure], right[sure]) < 6e-2, (position, piece.shape)
        position += piece.shape[1]
        assert torch.isfinite(got).all()
    prompt = step.logits(PIECES[0][:, :3], cache_of(family, mix), 0)
    assert error(prompt, exact(family, mix)[0][0][:, :3]) < 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_get_the_bits_that_they_get_alone(family: str) -> None:
    """Single tokens, whose arguments are kept from token to token, beside sequences that are decoded together."""
    step = native(family, "q4_k_m")
    prompts, newest = [tokens(1, n, seed=n) for n in (5, 17, 2)], tokens(3, 4, seed=9)
    together, alone = ([cache_of(family, "q4_k_m", KVTypes("q8_0", "q8_0")) for _ in prompts] for _ in range(2))
    for prompt, one, other in zip(prompts, together, alone, strict=True):
        assert torch.equal(step.forward(prompt, one, 0), step.forward(prompt, other, 0))
    answers = []
    for t in range(newest.shape[1]):
        found = step.forward_many(newest[:, t], together, [prompt.shape[1] + t for prompt in prompts])
        assert not found.failed
        answers.append(found.logits)
    for i, (own, prompt) in enumerate(zip(alone, prompts, strict=True)):
        for t, logits in enumerate(answers):
            got = step.forward(newest[i : i + 1, t : t + 1], own, prompt.shape[1] + t)
            assert torch.equal(logits[i : i + 1], got), (i, t)


def test_processors_without_them_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_activations("int8") == "int8"
    monkeypatch.setenv("HYBRIDKV_ISA", "portable")
    assert parse_activations("int16") == "int16"
    with pytest.raises(
        UsageError, match="--activations int8: portable has no products with 8-bit activations"
    ) as caught:
        parse_activations("int8")
    assert caught.value.hint == "leave --activations out"


def test_a_step_is_named_by_what_it_uses() -> None:
    assert "activations" not in native("qwen3", "q4_k_m", "int16").name
    assert native("qwen3", "q4_k_m").name.endswith(", activations int8")
    assert native("qwen3", "iq4_xs").name.endswith(", activations int8 (int16 with iq4_xs)")
    assert native("qwen3", "q8_0").name.endswith(", activations int16 (no int8 with q8_0)")
