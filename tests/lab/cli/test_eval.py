"""`hybridkv eval` as its user sees it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hybridkv.engine.load import bundled_model
from hybridkv_lab.results import read_jsonl
from tests.cli.conftest import Cli
from tests.cli.models import ModelStore
from tests.cli.test_bad_input import one_error

SMALL = ("-c", "96", "-n", "4", "-t", "1")


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_table_and_files(cli: Cli, tmp_path: Path, mode: str) -> None:
    output = tmp_path / "run.jsonl"
    done = cli("eval", *SMALL, "--mode", mode, "--types", "q8_0,q8_0/q4_0", "--rotate", "none,kv", "-o", output)
    assert done.code == 0, done.err
    conditions, results = read_jsonl(output)
    assert [r.label for r in results] == [
        "f16",
        "f16 (again)",
        "q8_0",
        "q8_0+kv",
        "q8_0/q4_0",
        "q8_0/q4_0+kv",
    ]
    assert [r.role for r in results] == ["reference", "floor", *["candidate"] * 4]
    assert (conditions.mode, conditions.n_ctx, conditions.n_tokens, conditions.complete) == (mode, 96, 96, True)
    reference, floor, q8, *_, mixed = results
    assert reference.kld_max == 0
    assert floor.kld_mean < 1e-3
    assert 0 < q8.kld_mean < mixed.kld_mean
    assert q8.bits_per_value == 8.5
    assert mixed.bytes_per_token == 3 * 2 * 256 * (8.5 + 4.5) / 8
    assert [layer for layer, _ in q8.layers] == [3, 7, 11]
    assert all(r.label in done.out for r in results)
    assert "reference-hybrid-29m, 1 x 96 tokens of heldout_long.txt" in done.out
    page = output.with_suffix(".html").read_text()
    assert "<svg" in page
    assert "q8_0/q4_0" in page
    assert "| q8_0 |" in output.with_suffix(".md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_resume_adds_a_type_and_keeps_the_others(cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "run.jsonl"
    assert cli("eval", *SMALL, "--types", "q8_0", "-o", output).code == 0
    before = {r.label: r for r in read_jsonl(output)[1]}
    assert "exists\nhint: --resume" in one_error(cli("eval", *SMALL, "--types", "q8_0", "-o", output))
    done = cli("eval", *SMALL, "--types", "q8_0,q4_0", "-o", output, "--resume")
    assert done.code == 0, done.err
    after = {r.label: r for r in read_jsonl(output)[1]}
    assert list(after) == ["f16", "f16 (again)", "q8_0", "q4_0"]
    assert after["q8_0"].kld_mean == before["q8_0"].kld_mean
    assert after["q4_0"].kld_mean > after["q8_0"].kld_mean
    other = cli("eval", *SMALL, "--mode", "decode", "--types", "q8_0", "-o", output, "--resume")
    assert "is of another run: mode 'prefill' then, 'decode' now" in one_error(other)


@pytest.mark.usefixtures("no_pictures")
def test_ctrl_c_keeps_what_is_done(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run.jsonl"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridkv_lab.evaluate.Evaluator.greedy", stop)
    done = cli("eval", *SMALL, "--types", "q4_0", "-o", output)
    assert done.code == 130
    assert "interrupted: the measurements are kept" in done.err
    conditions, results = read_jsonl(output)
    assert not conditions.complete
    assert [r.n_tokens for r in results] == [96, 96, 96]
    assert results[2].greedy_agreement is None
    monkeypatch.undo()
    assert cli("eval", *SMALL, "--types", "q4_0", "-o", output, "--resume").code == 0
    conditions, results = read_jsonl(output)
    assert conditions.complete
    assert results[2].greedy_agreement is not None


def test_the_page_needs_its_extra_and_the_results_do_not(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hybridkv_lab.plots", raising=False)
    monkeypatch.delattr("hybridkv_lab.plots", raising=False)
    output = tmp_path / "run.jsonl"
    done = cli("eval", *SMALL, "--types", "q8_0", "-o", output)
    assert done.code == 0
    assert "no page was drawn: " in done.err
    assert "pip install matplotlib" in done.err
    assert len(read_jsonl(output)[1]) == 3


def test_a_model_without_a_kv_cache(cli: Cli, models: ModelStore, tmp_path: Path) -> None:
    error = one_error(cli("eval", "-m", models.mamba2(), *SMALL, "-o", tmp_path / "run.jsonl"))
    assert "has no KV cache, so there is nothing to compare" in error


def test_a_model_without_a_tokenizer(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    assert "this model has no tokenizer" in one_error(cli("eval", "-m", hybrid, *SMALL, "-o", tmp_path / "run.jsonl"))


BAD: dict[str, tuple[list[object], str]] = {
    "unknown type": (["--types", "q9_0"], "unknown KV cache type 'q9_0'; allowed: f32"),
    "unknown option of a type": (["--types", "q4_0+rot"], "unknown option 'rot' of a cache type; allowed: k, v, kv"),
    "no types": (["--types", ","], "--types is empty"),
    "rotation": (["--rotate", "both"], "--rotate 'both'; allowed: none, k, v, kv"),
    "scale": (["--scale", "best"], "unknown scale rule 'best'"),
    "tail": (["--tail", "-3"], "--tail '-3'; allowed: token counts"),
    "sink": (["--sink", "x"], "--sink 'x'; allowed: token counts"),
    "mode": (["--mode", "both"], "--mode 'both'; allowed: prefill, decode"),
    "reference": (["--reference", "q8_0"], "--reference 'q8_0'; allowed: f16, f32"),
    "greedy": (["-n", "-1"], "-n -1; allowed: 0 to 4096"),
    "windows": (["--windows", "-1"], "--windows -1; allowed: 0 to"),
    "too many windows": (["--windows", "100000", "-c", "32768"], "asked: 100000\nhint: take a longer text"),
    "context": (["-c", "1"], "-c 1; allowed: 2 or more"),
    "text": (["-f", "/nowhere/text.txt"], "-f /nowhere/text.txt: No such file or directory"),
    "output's name": (["-o", "run.txt"], "-o 'run.txt'; allowed: a file name that ends in .jsonl"),
    "output's directory": (["-o", "/nowhere/run.jsonl"], "there is no directory /nowhere"),
    "nothing to resume": (["--resume"], "--resume: there is no "),
    "model": (["-m", "/nowhere.gguf"], "no model at /nowhere.gguf"),
    "threads": (["-t", "0"], "-t 0; allowed: 1 to 1024"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cli: Cli, tmp_path: Path, case: str) -> None:
    options, message = BAD[case]
    output = [] if "-o" in options else ["-o", tmp_path / "run.jsonl"]
    text = one_error(cli("eval", "-c", "96", *output, *options))
    assert message in text.removeprefix("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_pictures")
def test_results_are_json_without_nan(cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "run.jsonl"
    assert cli("eval", *SMALL, "-m", bundled_model(), "--types", "q8_0", "-o", output).code == 0
    for line in output.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
