"""Guessed tokens change when logits are computed, and neither text nor cache nor distribution."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridkv.cache import KVTypes
from hybridkv.engine import Engine, Request, SamplingParams
from hybridkv.engine.draft_model import DraftModel
from hybridkv.engine.drafts import NOTHING, GoesOn, Guess
from hybridkv.engine.ngrams import NGrams
from hybridkv.engine.pace import Costs, Pace
from hybridkv.engine.speculation import Speculation, parse_spec, rejects_drafts
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import ModelError, UsageError
from hybridkv.hf import EagerStep, ModelCache
from hybridkv.kernels import cpu_native
from hybridkv.native import NativeStep
from hybridkv.policy import Guard, NonFiniteError
from hybridkv.runtime import StepResult
from tests.engine.serving import GREEDY, Q8, Q8_TAILED, drain, events, model, prompt, scheduler, specs_for
from tests.families import build
from tests.native.test_drafts import differences

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")

SAMPLED = SamplingParams(temp=1.1, top_k=12, seed=5)
PARAMS = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "penalties": replace(GREEDY, repeat_penalty=1.3, dry_multiplier=0.8),
    "xtc": replace(SAMPLED, xtc_probability=0.5, xtc_threshold=0.05, min_p=0.01),
}


class Free(Costs):
    """Runs that cost the same whatever their rows: any guess pays."""

    def of(self, n_rows: int) -> float:
        return 1.0

    def knows(self, n_rows: int) -> bool:
        return True


class Knowing:
    """Knows the text, and is wrong here and there; or always, without a text."""

    name = "knowing"
    seconds_each = None
    plans = False

    def __init__(self, text: Sequence[int], seed: int = 0) -> None:
        self._text, self._draw = list(text), random.Random(seed)
        self.n_asked = 0

    def guess(self, text: Sequence[int], n: int, goes_on: GoesOn) -> Guess:
        self.n_asked += 1
        known = self._text[len(text) : len(text) + n] or [3] * n
        return Guess([token if self._draw.random() < 0.8 else 96 - token for token in known], [1] * len(known))


def knowing(text: Sequence[int]) -> Speculation:
    """Speculation of sequences of which all have this text."""
    return Speculation(lambda: Knowing(text), n_max=5, costs=Free())


def engine(
    family: str,
    types: KVTypes,
    speculation: Speculation | None,
    step: NativeStep | None = None,
    guard: Guard | None = None,
) -> Engine:
    of = model(family)
    return Engine(
        of,
        specs_for(of, types),
        n_ctx=160,
        guard=guard or Guard(),
        notify=lambda _: None,
        step=step,
        speculation=speculation,
    )


def text_of(run: Engine, n: int, params: SamplingParams = GREEDY, n_prompt: int = 40) -> list[int]:
    return [token for (token,) in islice(run.generate(prompt(n_prompt), params, n_predict=90), n)]


@pytest.mark.parametrize("how", PARAMS)
@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h", "jamba", "lfm2", "falcon_h1", "mistral"])
def test_the_text_is_that_without_guesses(family: str, how: str) -> None:
    """Token for token, with the same seed."""
    without = text_of(engine(family, Q8, None), 90, PARAMS[how])
    run = engine(family, Q8, knowing([*prompt(40), *without]))
    assert text_of(run, 90, PARAMS[how]) == without
    assert run.timings.n_right >= 20
    assert run.timings.n_right < run.timings.n_guessed
    assert run.timings.n_runs < 70
    assert run.n_held == run.history.shape[1] - 1


@pytest.mark.parametrize("types", [Q8, Q8_TAILED], ids=["q8_0", "tail"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 30])
def test_whoever_stops_anywhere_finds_the_cache_of_single_tokens(n: int, types: KVTypes) -> None:
    """Guesses that were not drawn are undone, as the session file and the next turn need it."""
    single = engine("qwen3_5_text", types, None)
    text = text_of(single, 40)
    single = engine("qwen3_5_text", types, None)
    assert text_of(single, n) == text[:n]
    run = engine("qwen3_5_text", types, knowing([*prompt(40), *text]))
    assert text_of(run, n) == text[:n]
    assert (run.n_held, run.history.tolist()) == (single.n_held, single.history.tolist())
    assert differences(run.cache.stored(), single.cache.stored()) == []


def test_a_token_has_its_own_distribution() -> None:
    """Chi-square over 600 draws of the second token, of which the first guess is right now and then."""
    of, params, start = model(), replace(SAMPLED, temp=0.9, top_k=6, top_p=1.0, min_p=0.0), prompt(12)
    step = NativeStep(of)

    def shares(text: Sequence[int]) -> Tensor:
        run = engine("qwen3_5_text", Q8, None, step)
        with torch.inference_mode():
            logits = run.prefill(text)[0]
        best = logits.topk(params.top_k)
        return torch.zeros_like(logits).index_copy_(0, best.indices, torch.softmax(best.values / params.temp, -1))

    first = shares(start)
    expected = sum((first[t] * shares([*start, int(t)]) for t in first.nonzero()[:, 0]), torch.zeros_like(first))
    guessed = int(first.argmax())
    likely = [int(t) for t in shares([*start, guessed]).topk(2).indices]
    n, seen, n_right = 600, Counter[int](), 0
    for seed in range(n):
        # Guarded, the first token after the prompt is checked and runs by itself.
        speculation = Speculation(lambda: Fixed(likely), n_max=2, costs=Free())
        run = engine("qwen3_5_text", Q8, speculation, step, Guard(mode="off"))
        drawn = [t for (t,) in run.generate(start, replace(params, seed=seed), n_predict=3)]
        seen[drawn[1]] += 1
        # Of the two guesses that follow the first token, the first one is right if it is the second token.
        n_right += drawn[1] == likely[0]
        assert run.cache is not None
        assert (run.timings.n_right > 0) == (drawn[1] == likely[0])
    support = [t for t in range(len(expected)) if expected[t] * n >= 5]
    chi = sum((seen[t] - n * float(expected[t])) ** 2 / (n * float(expected[t])) for t in support)
    assert sum(seen[t] for t in support) > 0.97 * n
    assert n_right > n / 20
    # Three standard deviations of the statistic beyond its mean.
    assert chi < len(support) + 3 * (2 * len(support)) ** 0.5


class Fixed:
    """Guesses the same tokens always."""

    name = "fixed"
    seconds_each = None
    plans = False

    def __init__(self, guesses: list[int]) -> None:
        self._guesses = guesses

    def guess(self, text: Sequence[int], n: int, goes_on: GoesOn) -> Guess:
        return Guess(self._guesses[:n], [1] * len(self._guesses[:n])) if self._guesses else NOTHING


class FaultAt(NativeStep):
    """A step whose attention is not finite at one token of the text, once, wherever in a run that token is."""

    at, fired = -1, 0

    def forward_drafts(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[ModelCache], positions: Sequence[int]
    ) -> StepResult:
        answers = super().forward_drafts(tokens, caches, positions)
        first = 0
        for own, position in zip(tokens, positions, strict=True):
            if position <= self.at < position + len(own):
                row = first + self.at - position
                answers.logits[row] = torch.nan
                answers.failed[row] = NonFiniteError(layer=1, label="q8_0", kernel="k", n_tokens=1, source="cache")
            first += len(own)
        return answers


@pytest.mark.parametrize("in_text", [True, False])
def test_a_fault_counts_where_the_text_comes_to_it(in_text: bool) -> None:
    """One at a guess that was wrong is nobody's; one in the text rebuilds the cache at the next type."""
    without = text_of(engine("qwen3_5_text", Q8, None), 60)
    step = FaultAt(model())
    guesses = [*prompt(40), *without]
    if not in_text:
        guesses[50] = 96 - guesses[50]
    run = engine("qwen3_5_text", Q8, Speculation(lambda: Exactly(guesses), n_max=5, costs=Free()), step)
    step.at = 50
    got = text_of(run, 60)
    if in_text:
        assert run.timings.n_rebuilds == 1
        assert [s.types.label for s in run.cache.specs] == ["f16"] * 2
        assert got[:10] == without[:10]
        assert len(got) == 60
    else:
        assert (run.timings.n_rebuilds, got) == (0, without)


class Exactly:
    """Guesses from a text, right or wrong; nothing for what comes next to a wrong guess."""

    name = "exactly"
    seconds_each = None
    plans = False

    def __init__(self, text: list[int]) -> None:
        self._text = text

    def guess(self, text: Sequence[int], n: int, goes_on: GoesOn) -> Guess:
        # A run that begins at the token that the fault waits for would be the text's own.
        known = [] if len(text) in (50, 51) else self._text[len(text) : len(text) + n]
        return Guess(known, [1] * len(known))


@pytest.mark.parametrize("types", [Q8, Q8_TAILED], ids=["q8_0", "tail"])
@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid", "zamba2"])
def test_sequences_of_a_scheduler_get_what_they_get_without(family: str, types: KVTypes) -> None:
    """Greedy and sampled, of several lengths, with log probabilities, end tokens and stored prefixes."""
    lengths = (40, 40, 7, 61, 40)
    asked = [
        Request(prompt(n), 30, p, logprobs=2 if i == 1 else None, stop_ids=(11,) if i == 3 else ())
        for i, (n, p) in enumerate(zip(lengths, [*PARAMS.values(), SAMPLED], strict=True))
    ]

    def run(speculation: Speculation | None) -> list[list[object]]:
        runner = scheduler(family, types=types, n_parallel=3, speculation=speculation, prefix_bytes=1 << 24)
        handles = [runner.submit(request) for request in asked]
        drain(runner)
        again = runner.submit(replace(asked[0], prompt_ids=(*handles[0].token_ids, 5)))
        drain(runner)
        assert again.usage.cached_tokens >= len(handles[0].token_ids) - 1
        return [events(handle) for handle in (*handles, again)]

    without = run(None)
    text = [*prompt(40), *(event.token for event in without[0])]
    speculation = knowing(text)
    assert run(speculation) == without


def test_a_server_counts_the_states_of_guesses() -> None:
    """A second copy of a sequence's states, which is what a wrong guess is undone with."""
    plain, guessing = scheduler(), scheduler(speculation=Speculation())
    specs = specs_for(model())
    states = guessing.admission.planned_bytes(specs, 100) - plain.admission.planned_bytes(specs, 100)
    run = engine("qwen3_5_text", Q8, None)
    text_of(run, 1)
    assert states == run.cache.state_bytes
    run = engine("qwen3_5_text", Q8, knowing([]))
    text_of(run, 9)
    assert run.cache.state_bytes == 2 * states


def test_a_step_that_takes_no_guesses_goes_without() -> None:
    step = EagerStep(model())
    assert "one by one" in str(rejects_drafts(step))
    run = Engine(
        model(),
        specs_for(model()),
        n_ctx=80,
        guard=Guard(),
        notify=lambda _: None,
        step=step,
        speculation=Speculation(),
    )
    assert len(text_of(run, 5)) == 5
    assert run.timings.n_guessed == 0
    assert rejects_drafts(resolve_step(model().config, "cpu")(model())) is None


def test_sequences_in_step_are_not_guessed() -> None:
    speculation = knowing([])
    run = engine("qwen3_5_text", Q8, speculation)
    got = list(run.generate(prompt(20), SAMPLED, n_predict=8, n_seqs=2))
    assert (len(got), run.timings.n_guessed) == (8, 0)


def test_ngrams_find_what_followed_before() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    guesser = NGrams()
    assert guesser.guess(text, 4) == Guess([4, 5, 6, 7], [3] * 4)
    assert guesser.guess([*text, 9], 4) == Guess([], [])
    loop = [5, 6, 7] * 3
    assert NGrams().guess(loop, 7) == Guess([5, 6, 7, 5, 6, 7, 5], [6] * 7)  # it goes on beyond its own end
    assert NGrams().guess([1, 2], 3) == Guess([], [])
    newest = [1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3]
    assert NGrams().guess(newest, 1).tokens == [5]


def test_a_longer_match_wins() -> None:
    text = [*range(20), 50, 17, 18, 19, 51, *range(20)]
    assert NGrams().guess(text, 1) == Guess([50], [12])


def test_the_newest_place_that_matches_longest_is_found() -> None:
    """Of the sixteen newest at which three tokens match, in texts that come in pieces; against a plain search."""
    draw, n_found = random.Random(3), 0
    for n_words in (2, 3, 8, 40):
        text = [draw.randrange(n_words) for _ in range(300)]
        guesser, end = NGrams(), 5
        while end < len(text):
            known, end = text[:end], end + draw.randrange(1, 9)
            places = [p for p in range(len(known) - 1, 2, -1) if known[p - 3 : p] == known[-3:]][:16]
            alike = {p: next((n for n in range(12, 3, -1) if known[:p][-n:] == known[-n:]), 3) for p in places}
            if not places:
                assert guesser.guess(known, 1).tokens == []
                continue
            best, n_found = max(places, key=lambda p: (alike[p], p)), n_found + 1
            kind = next(size for size in (12, 6, 3) if alike[best] >= size)
            assert guesser.guess(known, 1) == Guess([known[best]], [kind])
    assert n_found > 100


def test_a_changed_word_does_not_end_a_match() -> None:
    """Not once, nor behind tokens that match again; two words in a row do."""
    page = [*range(100, 140)]
    guesser = NGrams()
    for changed, end in ((12, 13), (12, 14), (12, 15)):
        text = [*page, 7, *page[:changed], 9, *page[changed + 1 : end]]
        assert guesser.guess([*page, 7, *page[:changed]], 1) == Guess([page[changed]], [12])
        assert guesser.guess(text, 3) == Guess(page[end : end + 3], [1] * 3)
        guesser = NGrams()
    guesser.guess([*page, 7, *page[:12]], 1)
    assert guesser.guess([*page, 7, *page[:12], 9, 8], 3) == Guess([], [])
    assert NGrams().guess([*page, 9], 3) == Guess([], [])


class Counted(NativeStep):
    """Counts how often it is asked what one run takes."""

    n_asked = 0

    def room(self, cache: ModelCache, n_tokens: int) -> int:
        self.n_asked += 1
        return super().room(cache, n_tokens)


def test_a_token_without_a_guess_asks_for_little() -> None:
    """How much a run takes matters where something was found, and to tell which runs may be timed: one in a few."""
    step = Counted(model())
    run = engine("qwen3_5_text", Q8, Speculation(lambda: Fixed([])), step)
    assert len(text_of(run, 80)) == 80
    assert run.timings.n_runs == 79
    assert 0 < step.n_asked < 20


def test_guesses_are_made_where_they_pay() -> None:
    costs = Costs({1: 1.0, 2: 1.1, 4: 1.4, 8: 2.4})
    pace = Pace(costs, 7)
    for _ in range(20):
        pace.note([1] * 3, 3, ended=False)
    assert pace.choose([1] * 7, 0) == 7  # all of them hold: eight tokens in 2.4 seconds
    assert pace.choose([1] * 2, 0) == 2
    for _ in range(20):
        pace.note([1] * 3, 1, ended=True)
    assert pace.choose([1] * 7, 0) in (1, 2, 3)


def test_where_none_pay_none_are_made_for_longer_and_longer() -> None:
    said: list[tuple[int, int]] = []
    pace = Pace(Costs({1: 1.0, 2: 1.9, 8: 7.0}), 7, on_pause=lambda right, of: said.append((right, of)))
    pace.note([3] * 4, 0, ended=True)
    assert [pace.choose([3] * 7, 0) for _ in range(4000)] == [0] * 4000
    assert said[0] == (0, 4)
    assert 5 <= len(said) <= 9
    assert pace.choose([9] * 7, 0) >= 0  # another kind has odds of its own


@pytest.mark.parametrize("reading", [1.0, 4.0])
@pytest.mark.parametrize("n", [250, 1000, 4000])
def test_guesses_that_cost_something_lose_little_where_none_holds(n: int, reading: float) -> None:
    """A guess takes a third of a token's time and its row half, and what is new is read before the first of a try."""
    pace, lost, paused = Pace(Costs({1: 1.0, 2: 1.5}), 3, priors={-5: 0.9}), 0.0, True
    for _ in range(n):
        if not pace.goes_on([], 0, 0.3):
            paused = True
            continue
        if paused:
            pace.note_reading(reading)
        lost, paused = lost + 0.8 + reading * paused, False
        pace.note([-5], 0, ended=True, seconds=0.3)
    assert 0.0 < lost <= 0.02 * n


def test_guesses_that_pay_go_on() -> None:
    """Of four guesses three are right, each worth a token, at half of one; tries that fail by chance are repeated."""
    pace, draw, gained = Pace(Costs({1: 1.0, 2: 1.3}), 3, priors={-5: 0.9}), random.Random(1), 0.0
    for _ in range(2000):
        if pace.goes_on([], 0, 0.2):
            right = draw.random() < 0.75
            gained += right - 0.5
            pace.note([-5], int(right), ended=not right, seconds=0.2)
    assert gained > 0.2 * 2000


def test_a_time_that_another_program_has_drawn_out_counts_little() -> None:
    costs = Costs()
    assert not costs.knows(1)
    for seconds in (9.0, 1.0, 1.5, 1.1):
        costs.note(1, seconds)
    assert costs.knows(1)
    assert costs.of(1) == 1.0
    costs.note(1, 100.0)
    assert costs.of(1) == pytest.approx(1.05)
    costs.note(4, 2.05)
    assert costs.of(2) == pytest.approx(1.05 + 1.0 / 3)


def test_a_number_of_rows_that_looked_slow_is_soon_seen_to_be_fast() -> None:
    """What looks slow is run less, so that few measurements have to do."""
    costs = Costs()
    for _ in range(4):
        costs.note(8, 3.0)
    for seconds in (1.1, 1.2, 1.0, 1.1):
        costs.note(8, seconds)
    assert costs.of(8) < 1.3


def test_a_match_of_many_tokens_is_worth_a_try_where_a_short_one_is_not() -> None:
    """Eight rows take five times one, and two nearly twice: only guesses that mostly hold pay."""
    costs = {1: 1.6, 2: 3.0, 3: 4.1, 4: 4.9, 5: 6.2, 6: 6.8, 7: 7.4, 8: 8.2}
    assert Pace(Costs(costs), 7, priors=NGrams.priors).choose([3] * 7, 0) == 0
    assert Pace(Costs(costs), 7, priors=NGrams.priors).choose([12] * 7, 0) > 3


def test_a_time_that_was_measured_once_is_measured_again_if_it_was_long() -> None:
    """The first run of several rows makes buffers."""
    costs = Costs({1: 1.0, 8: 2.4})
    costs.note(4, 9.0)
    assert costs.of(4) == pytest.approx(1.6)
    assert Pace(costs, 3).choose([12] * 3, 0) == 3
    costs.note(4, 1.5)
    assert costs.of(4) == 1.5


def test_nothing_is_guessed_before_single_tokens_have_been_measured() -> None:
    pace = Pace(Costs(), 7)
    assert pace.choose([3] * 7, 0) == 0
    for _ in range(4):
        pace.costs.note(1, 1.0)
    assert pace.choose([3] * 7, 0) > 1  # what was never tried looks cheap


@pytest.mark.parametrize(
    ("options", "said"), [({"n_max": 0}, "--draft-max 0"), ({"n_max": 64}, "64"), ({"n_min": 9}, "--draft-min 9")]
)
def test_bad_numbers(options: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Speculation(**options)


def test_unknown_kinds() -> None:
    with pytest.raises(UsageError, match="allowed: auto"):
        parse_spec("eagle")
    assert parse_spec("off") == "off"


def noisy(family: str, noise: float) -> PreTrainedModel:
    """A family's model, or one that does not agree with it."""
    small = build(family, attention="hybridkv")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return small


@pytest.mark.parametrize("how", PARAMS)
@pytest.mark.parametrize(("family", "noise"), [("qwen3_5_text", 0.0), ("qwen3_5_text", 0.02), ("lfm2", 0.01)])
def test_a_draft_model_changes_no_text(family: str, noise: float, how: str) -> None:
    """One that agrees, one that does now and then, and one of another family."""
    without = text_of(engine("qwen3_5_text", Q8, None), 60, PARAMS[how])
    small = noisy(family, noise)
    draft = DraftModel(small, NativeStep(small), n_ctx=160)
    run = engine("qwen3_5_text", Q8, Speculation(draft.guesser, n_max=4, costs=Free()))
    assert text_of(run, 60, PARAMS[how]) == without
    assert run.cache is not None
    assert run.timings.n_guessed > 20
    if (noise, how) == (0.0, "greedy"):
        assert run.timings.n_right > 0.8 * run.timings.n_guessed


def test_what_a_draft_model_takes_for_a_sequence_is_what_is_counted() -> None:
    """Its rows and states, and states to go back to, which `--memory` counts."""
    small = build("qwen3_5_text", attention="hybridkv")
    draft = DraftModel(small, NativeStep(small), n_ctx=160)
    guesser = draft.guesser()
    guesser.guess(prompt(40), 4)
    assert draft.sequence_bytes == guesser._cache.kv_bytes + 2 * guesser._cache.state_bytes
    of, more = model("qwen3_5_text"), Speculation(draft.guesser, sequence_bytes=draft.sequence_bytes)
    step = NativeStep(of)
    plain, with_draft = (scheduler(step=step, speculation=how).admission for how in (Speculation(), more))
    specs = specs_for(of, Q8)
    assert with_draft.planned_bytes(specs, 9) - plain.planned_bytes(specs, 9) == draft.sequence_bytes


def test_draft_models_that_cannot_go_back_or_speak_otherwise_are_refused() -> None:
    small = build("mistral", attention="hybridkv")
    with pytest.raises(ModelError, match="sliding window"):
        DraftModel(small, NativeStep(small), n_ctx=64)
    other = build("qwen3", attention="hybridkv")
    draft = DraftModel(other, NativeStep(other), n_ctx=64)
    draft.check_vocabulary(None, model(), None)
    other.config.vocab_size = 98
    with pytest.raises(ModelError, match="98 tokens, not 97"):
        draft.check_vocabulary(None, model(), None)
