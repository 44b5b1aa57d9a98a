"""An evaluation of a tiny random hybrid: against Transformers' own cache, interrupted, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from hybridkv.engine.steps import resolve_step
from hybridkv.errors import UsageError
from hybridkv.model import kv_facts, layer_facts
from hybridkv_lab.candidates import Candidate, expand
from hybridkv_lab.corpus import Corpus, cut, read_text, snippet
from hybridkv_lab.evaluate import Evaluator, Mode, agreement
from hybridkv_lab.journal import Journal
from hybridkv_lab.run import Evaluation
from tests.families import build, remembering

N_CTX = 37
IDENTITY = {"model": "tiny", "context": N_CTX}


def corpus(n_windows: int = 2) -> Corpus:
    ids = torch.randint(3, 97, (n_windows * N_CTX + 1,), generator=torch.Generator().manual_seed(5))
    return cut("random", ids.tolist(), N_CTX, n_windows)


def candidates(*labels: str) -> list[Candidate]:
    (reference,) = expand(["f32"])
    return [
        Candidate("f32", reference.policy, "reference"),
        Candidate("f32 (again)", reference.policy, "floor"),
        *expand(labels),
    ]


def make(path: Path, *labels: str, mode: Mode = "prefill", n_greedy: int = 0, resume: bool = False) -> Evaluation:
    model = build("qwen3_5_text", attention="hybridkv")
    evaluator = Evaluator(model, resolve_step(model.config, "cpu")(model), kv_facts(layer_facts(model.config)), N_CTX)
    evaluator.piece = 8  # several pieces a window
    journal = Journal(path, IDENTITY)
    if resume:
        journal.load()
    return Evaluation(evaluator, corpus(), candidates(*labels), mode, journal, n_greedy=n_greedy)


def results(run: Evaluation) -> dict[str, Any]:
    facts = kv_facts(layer_facts(build("qwen3_5_text").config))
    return {r.label: r for r in run.results(facts, lambda window, position: f"{window}:{position}")}


def silent(_: int) -> None:
    pass


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_the_reference_is_the_model_itself(tmp_path: Path, mode: Mode) -> None:
    run = make(tmp_path / "a.npz", "q4_0", "q8_0", mode=mode)
    assert run.execute(silent)
    model, nll = build("qwen3_5_text"), []
    for window in corpus().windows:
        logits = model(window[:-1].unsqueeze(0), **remembering(DynamicCache(config=model.config))).logits[0]
        nll.append(torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="none").detach())
    found = results(run)
    assert found["f32"].perplexity == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-4)
    assert found["f32"].kld_max == 0
    assert found["f32"].same_top == 1
    assert 0 <= found["f32 (again)"].kld_mean < 1e-7
    assert found["f32 (again)"].kld_mean < found["q8_0"].kld_mean < found["q4_0"].kld_mean
    assert all(r.n_tokens == 2 * N_CTX and r.n_non_finite == 0 for r in found.values())
    assert sum(n for _, _, n in found["q4_0"].positions) == 2 * N_CTX
    speeds = [found["q4_0"].prefill_tok_s, found["q4_0"].decode_tok_s]
    assert [s is not None for s in speeds] == ([True, False] if mode == "prefill" else [False, True])


def test_worst_positions_are_found_in_their_window(tmp_path: Path) -> None:
    run = make(tmp_path / "a.npz", "q4_0")
    run.execute(silent)
    found = results(run)["q4_0"]
    assert len(found.worst) == 5
    assert all(text in (f"0:{position}", f"1:{position}") for position, _, text in found.worst)
    assert found.worst[0][1] == pytest.approx(found.kld_max)


def test_greedy_and_layers(tmp_path: Path) -> None:
    run = make(tmp_path / "a.npz", "q4_0", "q8_0", n_greedy=6)
    ticks: list[int] = []
    assert run.execute(ticks.append)
    found = results(run)
    assert found["f32"].greedy_agreement == 1
    assert found["f32"].greedy_first_divergence == 6
    assert 0 <= found["q4_0"].greedy_agreement <= 1
    assert [layer for layer, _ in found["q4_0"].layers] == [1, 3]
    for (_, small), (_, large) in zip(found["q8_0"].layers, found["q4_0"].layers, strict=True):
        assert 0 < small < large
    assert sum(ticks) == make(tmp_path / "b.npz", "q4_0", "q8_0", n_greedy=6).n_ticks


def stop_after(n: int) -> Callable[[int], None]:
    count = 0

    def tick(_: int) -> None:
        nonlocal count
        count += 1
        if count == n:
            raise KeyboardInterrupt

    return tick


@pytest.mark.parametrize("n", [1, 3, 6, 10])
def test_what_is_done_when_interrupted_is_kept_and_resumed(tmp_path: Path, n: int) -> None:
    whole = make(tmp_path / "whole.npz", "q4_0")
    ticks_of_all = whole.n_ticks
    whole.execute(silent)
    first = make(tmp_path / "a.npz", "q4_0")
    assert not first.execute(stop_after(n))
    kept = results(first)
    assert len({r.n_tokens for r in kept.values()}) <= 1  # the same tokens of all
    again = make(tmp_path / "a.npz", "q4_0", resume=True)
    assert again.n_ticks <= ticks_of_all
    assert again.execute(silent)
    for label, expected in results(whole).items():
        found = results(again)[label]
        assert found.n_tokens == expected.n_tokens
        assert found.kld_mean == pytest.approx(expected.kld_mean, abs=1e-9)
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)


def test_a_new_candidate_is_added_to_a_finished_run(tmp_path: Path) -> None:
    make(tmp_path / "a.npz", "q4_0").execute(silent)
    counted: list[int] = []
    more = make(tmp_path / "a.npz", "q4_0", "q8_0", resume=True)
    assert more.execute(counted.append)
    fresh = make(tmp_path / "b.npz", "q4_0", "q8_0")
    ticks_of_all = fresh.n_ticks
    fresh.execute(silent)
    assert results(more)["q8_0"].kld_mean == pytest.approx(results(fresh)["q8_0"].kld_mean, abs=1e-9)
    assert sum(counted) < ticks_of_all


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    make(path, "q4_0").execute(silent)
    with pytest.raises(UsageError, match="of another run: context 37 then, 38 now"):
        Journal(path, {**IDENTITY, "context": 38}).load()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_damaged_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        Journal(path, IDENTITY).load()


def test_an_archive_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros(3))
    with pytest.raises(UsageError, match="cannot be read"):
        Journal(path, IDENTITY).load()


@pytest.mark.parametrize(
    ("reference", "found", "expected"),
    [([1, 2, 3, 4], [1, 2, 3, 4], (1.0, 4)), ([1, 2, 3, 4], [1, 2, 9, 4], (0.5, 2)), ([1, 2], [], (0.0, 0))],
)
def test_agreement(reference: list[int], found: list[int], expected: tuple[float, int]) -> None:
    assert agreement(reference, found) == expected


class TestCorpus:
    def test_windows_follow_each_other(self) -> None:
        found = cut("x", list(range(25)), 8, None)
        assert [w.tolist() for w in found.windows] == [list(range(i, i + 9)) for i in (0, 8, 16)]
        assert found.n_ctx == 8

    def test_other_tokens_have_another_digest(self) -> None:
        assert cut("x", list(range(9)), 8, 1).digest != cut("x", list(range(1, 10)), 8, 1).digest

    @pytest.mark.parametrize(("n", "windows"), [(8, None), (0, 1), (16, 2)])
    def test_too_short(self, n: int, windows: int | None) -> None:
        with pytest.raises(UsageError, match=f"x has {n} tokens, enough for"):
            cut("x", list(range(n)), 8, windows)

    def test_unreadable_texts(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="No such file"):
            read_text(tmp_path / "none.txt")
        (tmp_path / "bad.txt").write_bytes(b"abc\xff")
        with pytest.raises(UsageError, match="not UTF-8 text \\(byte 3\\)"):
            read_text(tmp_path / "bad.txt")

    def test_snippet_without_a_tokenizer(self) -> None:
        assert snippet(None, torch.arange(10), 3, n_before=2) == "2 3 [4]"
