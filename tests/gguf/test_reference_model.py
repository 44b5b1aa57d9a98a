"""The bundled reference model: its original config, and ik_llama.cpp on the same file."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from hybridkv.gguf.load import LoadedModel, load_gguf
from tests.gguf.reference import REFERENCE, config_from_gguf, heldout_text, original_config
from tests.oracles import ik_llama

# A greedy choice that two implementations round differently ends the agreement; these prompts meet none.
PROMPTS = ("Hello world", "The function returns", "To install the package, run", "def main(argv):\n")


@cache
def reference() -> LoadedModel:
    return load_gguf(REFERENCE)


def test_config_is_the_original() -> None:
    ours = config_from_gguf(REFERENCE).to_dict()
    expected = original_config()
    for key in ("dtype", "transformers_version"):
        expected.pop(key)
    assert {key: ours[key] for key in expected} == expected


def test_every_weight_is_finite_and_in_place() -> None:
    model = reference().model
    assert sum(weight.numel() for weight in model.parameters()) == 29_174_856
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_agree_with_ik_llama(prompt: str) -> None:
    """Each of its 64 tokens is our choice after those before it, which is what generating one by one would find."""
    loaded = reference()
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer(prompt).input_ids
    with ik_llama.model(REFERENCE, n_ctx=256) as engine:
        expected = engine.greedy(ids, 64)
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids + expected[:-1]])).logits[0, len(ids) - 1 :]
    assert logits.argmax(-1).tolist() == expected


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).exp())


def test_perplexity_agrees_with_ik_llama() -> None:
    loaded = reference()
    assert loaded.tokenizer is not None
    ids = torch.tensor(loaded.tokenizer(heldout_text()).input_ids[:1024])
    with ik_llama.model(REFERENCE, n_ctx=1024) as engine:
        expected = perplexity(torch.from_numpy(engine.logits(ids.tolist())), ids)
    with torch.inference_mode():
        ours = perplexity(loaded.model(ids[None]).logits[0], ids)
    assert 5 < expected < 50
    assert ours == pytest.approx(expected, rel=5e-3)
