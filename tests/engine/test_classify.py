"""Labels scored together as each (prompt, label) pair from scratch, and in the tokens that are claimed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, product

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridkv.cache import KVTypes
from hybridkv.engine.classify import Classifier, batches, label_tree, shared_length
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import ContextError, GuardError, UsageError
from hybridkv.hf import EagerStep, ModelCache
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import Step
from tests.families import HYBRIDS, build
from tests.thin import slow_but

SHARED = (5, 71, 8, 8, 40)
PROMPTS = tuple(SHARED + own for own in ((1, 2, 3), (9,), (1, 2, 4), (60, 61, 62, 63), (17,), (3, 2, 1)))
# One token; two; three, two of which the fourth and the last have too; and one that begins as the second does.
LABELS = ((11,), (12, 13), (14, 15, 16), (14, 15, 17, 18), (12, 19), (14, 15, 20, 21, 22), (23, 24))
F32 = KVTypes("f32", "f32")
OFF = Guard(mode="off")


class Counted:
    """A step that writes down what it is given, and may make some calls' logits NaN."""

    def __init__(self, step: Step, spoil: Sequence[int] = ()) -> None:
        self.step, self.spoil = step, spoil
        self.name, self.takes_chunks = "counted", step.takes_chunks
        self.calls: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        return self._counted(self.step.forward, tokens, cache, position)

    def logits(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        return self._counted(self.step.logits, tokens, cache, position)

    def _counted(self, run: Callable[..., Tensor], tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        assert cache.get_seq_length() == position
        logits = run(tokens, cache, position)
        self.calls.append(tuple(tokens.shape))
        return logits * torch.nan if len(self.calls) - 1 in self.spoil else logits


def classifier(
    model: PreTrainedModel,
    types: KVTypes = F32,
    *,
    labels: Sequence[Sequence[int]] = LABELS,
    guard: Guard = OFF,
    batch: int = 8,
    n_ctx: int = 64,
    step: Step | None = None,
    said: list[str] | None = None,
) -> Classifier:
    specs = Policy(types).resolve(kv_facts(layer_facts(model.config)))
    notify = [].append if said is None else said.append
    return Classifier(model, specs, labels, n_ctx=n_ctx, guard=guard, notify=notify, batch=batch, step=step)


def from_scratch(model: PreTrainedModel, prompt: Sequence[int], label: Sequence[int]) -> float:
    """Transformers' own logits over the whole sequence, without any cache."""
    ids = torch.tensor([[*prompt, *label]])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(label))


@cache
def exact_scores(family: str, prompts: tuple[tuple[int, ...], ...]) -> Tensor:
    model = build(family)
    return torch.tensor([[from_scratch(model, p, label) for label in LABELS] for p in prompts])


SCORED = (*HYBRIDS, "qwen3", "gemma3_text", "gpt_oss")
BATCHES = (1, 2, 8)


@pytest.mark.parametrize(
    ("family", "batch"), slow_but(product(SCORED, BATCHES), zip(SCORED[::2], cycle(BATCHES), strict=False))
)
def test_as_from_scratch(family: str, batch: int) -> None:
    model = build(family, attention="hybridkv")
    got = classifier(model, batch=batch).score(PROMPTS)
    assert got.dtype == torch.float32
    assert torch.allclose(got, exact_scores(family, PROMPTS), atol=2e-4)


def test_every_token_is_processed_as_often_as_needed() -> None:
    """The prefix once, each prompt's own tokens once, each node of the labels' tree once a row."""
    model = build("qwen3_5_text", attention="hybridkv")
    step = Counted(resolve_step(model.config, "cpu")(model))
    scorer = classifier(model, step=step)
    scorer.score(PROMPTS)
    own = [1, 3, 4]  # lengths after the prefix, of 2, 3 and 1 rows
    assert step.calls[0] == (1, len(SHARED))
    assert step.calls[1::5] == [(rows, n) for rows, n in zip((2, 3, 1), own, strict=True)]
    assert step.calls[2::5] == [(2 * rows, 1) for rows in (2, 3, 1)]  # 12 and 23
    assert step.calls[3::5] == [(rows, 2) for rows in (2, 3, 1)]  # 14 15
    assert step.calls[4::5] == [(rows, 1) for rows in (2, 3, 1)]  # 17 after them
    assert step.calls[5::5] == [(rows, 2) for rows in (2, 3, 1)]  # and 20 21
    assert sum(b * t for b, t in step.calls) == scorer.figures.n_processed
    assert scorer.figures.n_processed == len(SHARED) + (2 * 1 + 3 * 3 + 1 * 4) + 6 * 7
    assert (scorer.figures.n_rows, scorer.figures.n_shared, scorer.figures.n_saved) == (6, 5, 25)


def test_labels_of_one_token_need_no_step_of_their_own() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    step = Counted(resolve_step(model.config, "cpu")(model))
    classifier(model, step=step, labels=((11,), (12,), (96,))).score(PROMPTS)
    assert step.calls == [(1, 5), (2, 1), (3, 3), (1, 4)]


def test_the_guard_measures_one_whole_prompt_and_all_rows_are_stored_alike() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    said: list[str] = []
    step = Counted(EagerStep(model))
    q4_0, limit = KVTypes("q4_0", "q4_0"), 0.012
    scorer = classifier(model, q4_0, guard=Guard(mode="check", limit=limit), step=step, said=said)
    scorer.score(PROMPTS)
    assert step.calls[:2] == [(1, 9), (1, 5)]
    assert scorer.figures.n_processed == sum(b * t for b, t in step.calls)
    assert {s.types.label for s in scorer.specs} == {"q8_0"}
    assert len(said) == 4  # both layers from q4_0 to q6_0 and on to q8_0, and nothing at the batches
    with pytest.raises(GuardError, match="the guard stopped"):
        classifier(model, q4_0, guard=Guard(mode="strict", limit=limit)).score(PROMPTS)


@pytest.mark.parametrize("call", [0, 1, 2, 4])
def test_a_batch_that_is_not_finite_is_scored_again_at_the_next_types(call: int) -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    said: list[str] = []
    scorer = classifier(
        model,
        KVTypes("q8_0", "q8_0"),
        guard=Guard(mode="warn"),
        step=Counted(EagerStep(model), spoil=[call]),
        said=said,
    )
    got = scorer.score(PROMPTS)
    assert torch.allclose(got, exact_scores("qwen3_5_text", PROMPTS), atol=0.1)
    assert scorer.figures.n_rebuilds == 1
    assert {s.types.label for s in scorer.specs} == {"f16"}
    assert len(said) == 1
    assert said[0].endswith("; going on at f16")


def test_what_cannot_be_made_finite_ends_the_run() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    always = Counted(EagerStep(model), spoil=range(99))
    with pytest.raises(GuardError, match="no larger type is left"):
        classifier(model, KVTypes("f16", "f16"), guard=Guard(), step=always).score(PROMPTS)
    with pytest.raises(GuardError, match="the guard is 'off'"):
        classifier(model, KVTypes("q4_0", "q4_0"), step=Counted(EagerStep(model), spoil=[3])).score(PROMPTS)


def test_types_change_the_numbers_and_the_memory() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    exact = exact_scores("qwen3_5_text", PROMPTS)
    error, used = {}, {}
    for name in ("f16", "q8_0", "q4_0"):
        scorer = classifier(model, KVTypes(name, name))
        error[name] = float((scorer.score(PROMPTS) - exact).abs().max())
        used[name] = scorer.figures.kv_bytes
    assert 0 < error["f16"] < error["q8_0"] < error["q4_0"]
    # Two KV layers, K and V, two heads of 64; the shared tokens; 3 rows of 8 and 4 of labels; and a copy for the
    # first labels, twice as wide.
    assert used == {
        name: 2 * 2 * 2 * 64 * (5 + 3 * 12 + 6 * 12) * bits // 8
        for name, bits in (("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5))
    }
    assert scorer.figures.state_bytes == 10 * 2 * 4 * (160 * 4 + 6 * 16 * 16)


def test_what_does_not_fit() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    classifier(model, n_ctx=14).score(PROMPTS)
    with pytest.raises(ContextError, match=r"row 4: its prompt of 9 tokens and a label of 5 .* of 13\nhint: try -c 14"):
        classifier(model, n_ctx=13).score(PROMPTS)
    with pytest.raises(UsageError, match="row 2 has no tokens"):
        classifier(model).score([(1,), ()])
    with pytest.raises(UsageError, match="no rows"):
        classifier(model).score([])
    for labels in (((1,), ()), ((1, 2), (3,), (1, 2))):
        with pytest.raises(UsageError, match="every label must tokenize"):
            classifier(model, labels=labels)


def test_one_row_and_rows_that_are_all_the_same() -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    one = classifier(model).score(PROMPTS[:1])
    assert torch.allclose(one, exact_scores("qwen3_5_text", PROMPTS[:1]), atol=2e-4)
    scorer = classifier(model)
    assert torch.allclose(scorer.score([PROMPTS[0]] * 3), one.repeat(3, 1), atol=1e-5)
    assert scorer.figures.n_shared == len(PROMPTS[0]) - 1


def test_models_that_take_a_prompt_at_once_share_nothing() -> None:
    model = build("jamba", attention="hybridkv")
    step = EagerStep(model)
    assert not step.takes_chunks
    scorer = classifier(model, step=step)
    scorer.score(PROMPTS)
    assert scorer.figures.n_shared == scorer.figures.n_saved == 0


def test_label_tree() -> None:
    root = label_tree(LABELS, 9)
    assert (root.tokens, root.height) == ((), 4)
    assert root.ends == tuple((i, 0, ids[0]) for i, ids in enumerate(LABELS))
    twelve, fourteen, other = root.children
    assert (twelve.tokens, twelve.ends, twelve.children) == ((12,), ((1, 0, 13), (4, 0, 19)), ())
    assert (other.tokens, other.ends, other.children) == ((23,), ((6, 0, 24),), ())
    assert fourteen.tokens == (14, 15)
    assert fourteen.ends == ((2, 0, 15), (3, 0, 15), (5, 0, 15), (2, 1, 16), (3, 1, 17), (5, 1, 20))
    assert [(c.tokens, c.ends) for c in fourteen.children] == [
        ((17,), ((3, 0, 18),)),
        ((20, 21), ((5, 0, 21), (5, 1, 22))),
    ]
    fourteen = label_tree(LABELS, 1).children[1]
    assert (fourteen.tokens, [c.tokens for c in fourteen.children]) == ((14,), [(15,)])


@pytest.mark.parametrize(
    ("prompts", "n"),
    [([(1, 2, 3), (1, 2, 4)], 2), ([(1, 2), (1, 2, 4)], 1), ([(1, 2)], 1), ([(3,), (4,)], 0), ([(2, 9), (2, 1, 1)], 1)],
)
def test_shared_length(prompts: list[tuple[int, ...]], n: int) -> None:
    assert shared_length(prompts) == n


def test_batches_are_equally_long_and_hold_every_row_once() -> None:
    prompts = [(0,) * n for n in (3, 1, 3, 3, 2, 3, 1)]
    assert list(batches(prompts, 3)) == [(1, 6), (4,), (0, 2, 3), (5,)]
