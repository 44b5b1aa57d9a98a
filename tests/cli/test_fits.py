"""What does not fit is refused before its weights are read: with the numbers, and with what would fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

import pytest

from hybridkv.engine.load import bundled_model
from hybridkv.memory import Available
from tests.cli.conftest import Cli
from tests.cli.models import ModelStore
from tests.with_lab import needs_lab

MIB = 2**20


@pytest.fixture
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("weights were read")

    monkeypatch.setattr("hybridkv.engine.load.load", refuse)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    return path


def refused(cli: Cli, *options: object) -> str:
    done = cli(*options)
    assert done.code == 2, done.err
    return done.err[done.err.index("error: ") :]


@pytest.mark.usefixtures("_nothing_is_loaded")
@pytest.mark.parametrize(
    "command",
    ["run", "serve", pytest.param("eval", marks=needs_lab), "classify", pytest.param("tune", marks=needs_lab)],
)
def test_every_command_that_loads_a_model_refuses(cli: Cli, command: str, rows: Path, tmp_path: Path) -> None:
    options = {
        "run": ("--ids", "1"),
        "serve": ("--port", "0"),
        "eval": ("-o", str(tmp_path / "x.jsonl"), "-c", "64"),
        "classify": ("-f", str(rows), "--labels", "a,b"),
        "tune": ("--budget", "5.0bpv", "-o", str(tmp_path / "x.toml")),
    }[command]
    option = "--total-memory" if command in ("serve", "tune") else "--memory"
    said = refused(cli, command, *options, "--device", "cpu", option, "20MiB")
    assert re.match(r"error: not enough memory: this takes \d+\.\d MiB, and 20\.0 MiB are allowed by " + option, said)
    assert "weights 29.7 MiB (29.5 MiB q8_0 + 192.3 KiB f32 (vectors))" in said
    assert f"; {option} SIZE replaces what is free" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("_nothing_is_loaded")
def test_the_machine_is_asked(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Available(10 * MIB, "free in this container of 1.00 GiB")
    monkeypatch.setattr("hybridkv.memory.available_memory", lambda: found)
    assert ", and 10.0 MiB are free in this container of 1.00 GiB\n" in refused(cli, "run", "--ids", 1)


def test_a_machine_that_says_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridkv.memory.available_memory", lambda: None)
    done = cli("run", "--ids", 1, "-n", 1)
    assert done.code == 0
    assert "note: cannot find out how much memory is free, so the plan was not checked" in done.err


def test_the_option_overrides_the_machine(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridkv.memory.available_memory", lambda: Available(0, "free on this machine"))
    assert cli("run", "--ids", 1, "-n", 1).code == 2
    assert cli("run", "--ids", 1, "-n", 1, "--memory", "1GiB").code == 0


@pytest.mark.parametrize("types", ["f16", "q4_0"])
def test_what_would_fit_fits(cli: Cli, types: str) -> None:
    """Each proposal is taken at its word; a token more does not fit."""
    line = (
        "run",
        "--ids",
        1,
        "-n",
        1,
        "-c",
        32768,
        "-ctk",
        types,
        "-ctv",
        types,
        "--memory",
        "150MiB" if types == "f16" else "80MiB",
    )
    said = refused(cli, *line)
    hint = said[said.index("hint: ") :]
    assert "KV of 1 x 32768 tokens at " in said
    context = int(re.search(r"-c (\d+) fits", hint)[1])  # type: ignore[index]
    shorter = [context if word == 32768 else word for word in line]
    assert cli(*shorter).code == 0
    assert cli(*[context + 1 if word == context else word for word in shorter]).code == 2
    smaller = re.search(r"-ctk (\w+) -ctv (\w+)", hint)
    assert (smaller is not None) == (types == "f16")
    if smaller is not None:
        assert smaller[1] == smaller[2]
        assert cli(*[smaller[1] if word == types else word for word in line]).code == 0


def test_smaller_weights_are_proposed_where_they_fit(cli: Cli) -> None:
    said = refused(cli, "run", "--ids", 1, "-n", 1, "--weights", "f32", "--memory", "100MiB")
    assert "--weights int8 holds the weights in 29.7 MiB and fits" in said
    assert cli("run", "--ids", 1, "-n", 1, "--weights", "int8", "--memory", "100MiB").code == 0


def test_weights_as_they_are_are_proposed_first(cli: Cli) -> None:
    said = refused(cli, "run", "--ids", 1, "-n", 1, "--weights", "plain", "--memory", "100MiB")
    assert "hint: without --weights and --backend they are held as they are, in 29.7 MiB, and fit; " in said
    assert cli("run", "--ids", 1, "-n", 1, "--memory", "100MiB").code == 0


@pytest.mark.usefixtures("_nothing_is_loaded")
def test_no_weights_help_experts(cli: Cli, models: ModelStore) -> None:
    """Of the eager backend, whose experts are float32."""
    line = ("-m", models.family("qwen3_5_moe_text"), "--ids", 1, "--memory", "100KB")
    said = refused(cli, "run", *line, "--backend", "eager")
    assert "KiB f32 (experts) + " in said
    assert "(experts)" not in refused(cli, "run", *line)
    assert "hint: the weights do not fit: take a smaller model, or a machine with more memory; " in said


def test_what_is_proposed_is_counted_for_the_engine_that_will_run_it(cli: Cli, models: ModelStore) -> None:
    """Without `plain`, the native backend holds experts as int8 too; the eager one does not."""
    line = ("run", "-m", models.family("qwen3_5_moe_text"), "--ids", 1, "-n", 1, "-c", 16, "--memory", "3.8MiB")
    said = refused(cli, *line, "--weights", "plain")
    held = re.search(r"--weights int8 holds the weights in (\d+\.\d KiB) and fits", said)
    done = cli(*line, "--weights", "int8")
    assert (held is not None, done.code) == (True, 0), said
    assert "KiB q8_0 + " in done.err
    assert "--weights int8" not in refused(cli, *line, "--backend", "eager")


@pytest.mark.usefixtures("_nothing_is_loaded")
def test_a_directory_is_float32_first(cli: Cli, hybrid: Path) -> None:
    """Under the eager backend; the native one reads and encodes one matrix after the other."""
    line = ("-m", hybrid, "--ids", 1, "--weights", "int4", "--memory", "100KB")
    said = refused(cli, "run", *line, "--backend", "eager")
    assert re.search(r"weights \d+\.\d KiB \(.* q8_0.*; \d+\.\d MiB while they are loaded\)", said)
    said = refused(cli, "run", *line)
    assert re.search(r"weights \d+\.\d KiB \(.* q8_0[^;]*; \d+\.\d KiB while they are loaded\)", said)


@pytest.mark.usefixtures("_nothing_is_loaded")
def test_what_a_server_counts(cli: Cli) -> None:
    """All sequences at full length, or what --memory gives them, and stored prefixes."""
    line = ("serve", "--port", 0, "-c", 32768, "-np", 8, "-ctk", "f16", "-ctv", "f16", "--total-memory", "500MiB")
    said = refused(cli, *line)
    assert "KV of 8 x 32768 tokens at f16 1.50 GiB" in said
    assert "stored prefixes get 0 B of free memory" in cli(*line).err
    said = refused(cli, *line, "--memory", "200MiB", "--prefix-memory", "400MiB")
    assert "KV of 8 x 32768 tokens at f16 161.8 MiB, states 19.1 MiB, states behind guesses 19.1 MiB" in said
    unguessed = refused(cli, *line, "--memory", "200MiB", "--prefix-memory", "400MiB", "--spec", "off")
    assert "KV of 8 x 32768 tokens at f16 180.9 MiB, states 19.1 MiB, stored" in unguessed
    assert "stored prefixes 400.0 MiB" in said
    said = refused(cli, *line, "--memory", "700MiB", "--prefix-memory", "1MiB")
    (budget,) = re.findall(r"hint: --memory (\d+)MiB for running sequences fits", said)
    assert 350 < int(budget) < 460
    assert "-np 2 fits" in refused(cli, *line, "--prefix-memory", "1MiB")


@pytest.mark.usefixtures("_nothing_is_loaded")
@pytest.mark.parametrize("command", ["run", "serve"])
def test_a_draft_model_is_counted(cli: Cli, command: str) -> None:
    """Its weights, and for each sequence its cache and its states twice: once to go back to."""
    options = ("--ids", "1") if command == "run" else ("--port", "0", "-np", 3, "--prefix-memory", 0)
    line = (command, *options, "-c", 4096, "-ctk", "q8_0", "-ctv", "q8_0", "-md", bundled_model(), "--device", "cpu")
    option, limit, n_seqs = ("--memory", 95, 1) if command == "run" else ("--total-memory", 130, 3)
    said = refused(cli, *line, option, f"{limit}MiB")
    for name, mib in (("states behind guesses", 2.39), ("caches of what guesses", 24 + 2 * 2.39)):
        (shown,) = re.findall(rf"{name} (\d+\.\d) MiB", said)
        assert float(shown) == pytest.approx(n_seqs * mib, abs=0.06)
    assert "the draft model 29.7 MiB" in said
    assert re.search(r"hint: without the draft model \(-md\) it takes \d+\.\d MiB less, and fits", said)


def test_a_server_within_its_budget_goes_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class LoadedError(Exception):
        pass

    def load(*_: object, **__: object) -> NoReturn:
        raise LoadedError

    monkeypatch.setattr("hybridkv.engine.load.load", load)
    with pytest.raises(LoadedError):
        cli("serve", "--port", 0, "-c", 32768, "-np", 8, "--total-memory", "600MiB", "--memory", "200MiB")


@needs_lab
def test_eval_counts_every_cache(cli: Cli, tmp_path: Path) -> None:
    line = ("eval", "-o", tmp_path / "x.jsonl", "-c", 32768, "--types", "q8_0,q4_0", "--memory", "200MiB")
    said = refused(cli, *line)
    # 32768 tokens of 3 layers of 2 x 256 values, K and V: two times f16, q8_0, q4_0
    total = 32768 * 3 * 1024 * (2 + 2 + 34 / 32 + 18 / 32) / MIB
    assert f"KV of 1 x 32768 tokens in 4 caches {total:.1f} MiB" in said


def test_memory_that_is_no_size(cli: Cli) -> None:
    assert "--memory 'much'; allowed: a positive number" in refused(cli, "run", "--ids", 1, "--memory", "much")
    assert "--total-memory '0'; allowed" in refused(cli, "serve", "--port", 0, "--total-memory", 0)


def test_other_devices_have_memory_of_their_own(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridkv.cli.fits import Demand, check_memory
    from hybridkv.cli.model_options import Opened

    opened = object.__new__(Opened)
    object.__setattr__(opened, "device", "cuda:0")
    object.__setattr__(opened, "split", None)
    monkeypatch.setattr("hybridkv.memory.available_memory", lambda: Available(0, "free on this machine"))
    check_memory(opened, Demand((), 10))
