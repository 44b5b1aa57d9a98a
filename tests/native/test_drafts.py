"""Drafted tokens in one run: what is kept of them is, to the byte, what single tokens leave."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.hf import ModelCache
from hybridkv.kernels import cpu_native
from hybridkv.model import kv_facts, layer_facts
from hybridkv.native import NativeStep, native_model, source_of
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import DraftStep
from tests.families import build
from tests.native.test_step import NATIVE, native_step, tokens
from tests.thin import mostly_long, pairwise

needs_native = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")
pytestmark = [needs_native, pytest.mark.usefixtures("_inference")]

TAIL = KVTypes("q4_0", "q4_0", rotate_k=True, tail=32, sink=2, center=True)
KINDS = {
    "q8_0": KVTypes("q8_0", "q8_0"),
    "f16": KVTypes("f16", "f16"),
    "q4_0, tail, sinks, center": TAIL,
    "q5_1/q8_KV": KVTypes("q5_1", "q8_KV"),
    "iq4_nl/q6_0, rotated": KVTypes("iq4_nl", "q6_0", rotate_k=True, rotate_v=True),
    "bf16/f32": KVTypes("bf16", "f32"),
    "q8_0, tail of 1": KVTypes("q8_0", "q8_0", tail=1),
    "q4_1, sinks that are not full": KVTypes("q4_1", "q4_1", sink=40),
    "q4_0, sinks and tail that are not full": KVTypes("q4_0", "q4_0", sink=30, tail=20),
}


@pytest.fixture
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def cache_of(config: Any, types: KVTypes, n_ctx: int | None = 160) -> ModelCache:
    """A cache that is guarded as by default."""
    specs = Policy(types).resolve(kv_facts(layer_facts(config)))
    return ModelCache(config, specs, n_ctx=n_ctx, guard=Guard())


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Places at which two copies of a cache differ."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.shape == other.shape
        return [] if same and torch.equal(_bytes(one), _bytes(other)) else [at]
    if isinstance(one, tuple | list):
        parts = [(a, b, f"{at}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))]
        return [found for part in parts for found in differences(*part)]
    if is_dataclass(one):
        names = [field.name for field in fields(one)]
        return [found for n in names for found in differences(getattr(one, n), getattr(other, n), f"{at}.{n}")]
    return [] if one == other else [at]


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


class Pair:
    """A sequence that takes drafts, and one that takes the same text token by token, in a step of its own if given."""

    def __init__(
        self,
        step: NativeStep,
        config: Any,
        types: KVTypes,
        n_prompt: int,
        seed: int,
        n_ctx: int = 160,
        alone: NativeStep | None = None,
    ) -> None:
        self.alone = alone or step
        self.step, self.text = step, tokens(1, n_prompt + 80, seed)[0].tolist()
        self.cache, self.position = cache_of(config, types, n_ctx), n_prompt
        step.forward(torch.tensor([self.text[:n_prompt]]), self.cache, 0)
        if alone is None:
            self.single = self.cache.copy()
        else:
            self.single = cache_of(config, types, n_ctx)
            alone.forward(torch.tensor([self.text[:n_prompt]]), self.single, 0)

    def draft(self, n_right: int, n_wrong: int) -> list[int]:
        """The next token, and guesses as far as there is room."""
        right = self.text[self.position : self.position + 1 + n_right]
        guesses = [*right, *(96 - token for token in self.text[:n_wrong])]
        return guesses[: self.step.room(self.cache, len(guesses))]

    def keep(self, n: int, logits: Tensor) -> None:
        """Keep `n` tokens, take them one by one in the other sequence, and compare."""
        self.step.keep(self.cache, n)
        for row in logits[:n]:
            one = torch.tensor([[self.text[self.position]]])
            assert torch.equal(self.alone.forward(one, self.single, self.position)[0], row)
            self.position += 1
        assert differences(self.cache.stored(), self.single.stored()) == []


def take_drafts(pairs: list[Pair], n_tokens: int, seed: int) -> int:
    """Run all pairs until each has taken so many tokens; how many guesses were right."""
    draw, ends = random.Random(seed), [pair.position + n_tokens for pair in pairs]
    step, n_accepted = pairs[0].step, 0
    assert isinstance(step, DraftStep)
    while going := [pair for pair, end in zip(pairs, ends, strict=True) if pair.position < end]:
        right = [draw.randrange(6) for _ in going]
        drafts = [pair.draft(n, draw.randrange(4)) for pair, n in zip(going, right, strict=True)]
        answers = step.forward_drafts(drafts, [p.cache for p in going], [p.position for p in going])
        assert not answers.failed
        begin = 0
        for pair, draft, n in zip(going, drafts, right, strict=True):
            kept = draw.randint(1, min(n + 1, len(draft)))
            pair.keep(kept, answers.logits[begin : begin + len(draft)])
            begin, n_accepted = begin + len(draft), n_accepted + kept - 1
    return n_accepted


ISA_OF = ("best", "best", "portable")


@pytest.mark.parametrize(
    ("family", "rounded", "isa"),
    mostly_long(
        product(NATIVE, (False, True), ("best", "portable")),
        [(family, i % 2 == 0, ISA_OF[i % 3]) for i, family in enumerate(NATIVE)],
    ),
    indirect=["isa"],
)
def test_every_family_keeps_what_single_tokens_leave(family: str, rounded: bool, isa: str) -> None:
    """Two sequences in one run, of two types."""
    model = build(family, attention="hybridkv")
    step = native_step(model, "int8" if rounded else "auto")
    pairs = [Pair(step, model.config, types, n, n) for types, n in ((KINDS["q8_0"], 29), (TAIL, 70))]
    assert take_drafts(pairs, 40, seed=len(family)) >= 10


@pytest.mark.parametrize("n_pairs", [1, 2])
def test_another_prompt_may_come_before_guesses_are_undone(n_pairs: int) -> None:
    """A longer one than any before: buffers are made anew while a run's inputs are still needed."""
    model = build("qwen3_5_text", attention="hybridkv")
    step = NativeStep(model)
    pairs = [Pair(step, model.config, KINDS["q8_0"], 9, n, alone=NativeStep(model)) for n in range(n_pairs)]
    for round_ in range(3):
        drafts = [pair.draft(1, 3) for pair in pairs]
        answers = step.forward_drafts(drafts, [p.cache for p in pairs], [p.position for p in pairs])
        step.forward(tokens(1, 60 + 40 * round_, 3), cache_of(model.config, KINDS["q8_0"]), 0)
        begin = 0
        for pair, draft in zip(pairs, drafts, strict=True):
            pair.keep(min(2, len(draft)), answers.logits[begin : begin + len(draft)])
            begin += len(draft)
    assert all(pair.position >= 9 + 4 for pair in pairs)


@pytest.mark.parametrize(
    ("family", "kind", "prompts"), pairwise(("qwen3_5_text", "mistral"), KINDS, ((3,), (33,), (1, 20, 45)))
)
def test_every_kind_of_rows_keeps_what_single_tokens_leave(family: str, kind: str, prompts: tuple[int, ...]) -> None:
    """One sequence, or several in one run. Mistral's window lets rows go."""
    model = build(family, attention="hybridkv")
    native = native_model(model.config, source_of(model), "auto")
    step = NativeStep(native)
    # Each step continues one cache, so that drafts and single tokens are taken by what it holds for it.
    alone = NativeStep(native) if len(prompts) == 1 else None
    pairs = [Pair(step, model.config, KINDS[kind], n, n, alone=alone) for n in prompts]
    n_accepted = take_drafts(pairs, 60 if len(pairs) > 1 else 75, seed=7)
    # Before rows are packed, nothing is guessed: the guard waits for them. A tail may be all of a window.
    guessed = max(prompts) > KINDS[kind].tail + KINDS[kind].sink and family != "mistral"
    assert n_accepted >= (5 if guessed else 0)


@pytest.mark.parametrize(
    ("types", "n_prompt", "_threads", "isa"),
    pairwise(
        ("q8_0/q8_0", "f16/f16", "q4_1/iq4_nl", "q5_0/bf16"), (90, 500, 1000), (1, 3), ("best", "avx2", "portable")
    ),
    indirect=["_threads", "isa"],
)
@pytest.mark.usefixtures("_threads")
def test_long_caches_are_read_together(types: str, n_prompt: int, isa: str) -> None:
    """Over the ends of tiles and of parts of the cache, with several threads too."""
    model = build("qwen3_5_text", attention="hybridkv")
    step = NativeStep(model)
    pair = Pair(step, model.config, KVTypes(*types.split("/")), n_prompt, n_prompt, 1200, NativeStep(model))
    assert take_drafts([pair], 70, seed=n_prompt) >= 10
