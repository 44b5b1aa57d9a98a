"""`hybridkv run --session`: a conversation goes on where it was, or an error says why not."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Cli


def test_goes_on_as_one_run(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    """Two runs through a file give the tokens of one run over all that was said."""
    path, options = tmp_path / "talk", ("--temp", "0", "--json", "--ignore-eos", "-c", "128", "-ctk", "q8_0")
    first = cli("run", "-m", hybrid, "--ids", "3,4,5", "-n", "6", "--session", path, *options)
    assert first.code == 0, first.err
    answer = json.loads(first.out)["sequences"][0]["ids"]
    second = cli("run", "-m", hybrid, "--ids", "7,8", "-n", "5", "--session", path, *options)
    assert second.code == 0, second.err
    assert "--session: 8 of 11 prompt tokens reused" in " ".join(second.err.split())
    result = json.loads(second.out)
    everything = [3, 4, 5, *answer, 7, 8]
    assert result["prompt_ids"] == everything
    assert result["prompt_tokens"] == 3
    alone = cli("run", "-m", hybrid, "--ids", ",".join(map(str, everything)), "-n", "5", *options)
    assert result["sequences"] == json.loads(alone.out)["sequences"]
    third = cli("run", "-m", hybrid, "--ids", "9", "-n", "2", "--session", path, *options)
    assert "--session: 15 of 17 prompt tokens reused" in " ".join(third.err.split())


def test_other_types_are_converted_and_said(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "talk", ("--temp", "0", "-c", "128", "-n", "3", "--session", tmp_path / "talk")
    assert cli("run", "-m", hybrid, "--ids", "3,4,5", *options, "-ctk", "q8_0").code == 0
    done = cli("run", "-m", hybrid, "--ids", "6", *options, "-ctk", "f16", "-ctv", "f16")
    assert done.code == 0, done.err
    assert "were decoded and encoded again" in " ".join(done.err.split())
    assert path.exists()


def test_text_goes_on_behind_text(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "talk", ("--temp", "0", "--json", "-c", "256", "-n", "4", "--ignore-eos")
    first = cli("run", "-m", gguf, "-p", "Hello", "--session", path, *options)
    second = cli("run", "-m", gguf, "-p", " and", "--session", path, *options)
    assert (first.code, second.code) == (0, 0), second.err
    before, after = json.loads(first.out), json.loads(second.out)
    n = len(before["prompt_ids"]) + 4
    assert after["prompt_ids"][:n] == [*before["prompt_ids"], *before["sequences"][0]["ids"]]
    assert f"--session: {n - 1} of {len(after['prompt_ids'])} prompt tokens reused" in " ".join(second.err.split())


def test_refusals(cli: Cli, hybrid: Path, gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    both = cli("run", "-m", hybrid, "--ids", "3", "-np", "2", "--session", path)
    assert (both.code, "a session is one sequence" in both.err) == (2, True)
    nowhere = cli("run", "-m", hybrid, "--ids", "3", "--session", tmp_path / "no" / "talk")
    assert (nowhere.code, "there is no directory" in nowhere.err) == (2, True)
    assert cli("run", "-m", hybrid, "--ids", "3,4", "-n", "2", "--temp", "0", "--session", path).code == 0
    other = cli("run", "-m", gguf, "--ids", "3", "--session", path)
    assert (other.code, "is of another model" in " ".join(other.err.split())) == (2, True)
    path.write_bytes(path.read_bytes()[:-10])
    torn = cli("run", "-m", hybrid, "--ids", "3", "--session", path)
    assert (torn.code, "is torn" in " ".join(torn.err.split())) == (2, True)
