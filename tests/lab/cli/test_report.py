"""`hybridkv report`: two files from one, or one clear error."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from hybridkv_lab.results import write_jsonl
from tests.cli.conftest import Cli
from tests.cli.test_bad_input import one_error
from tests.lab.evaluation import CONDITIONS, RESULTS


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    write_jsonl(path, CONDITIONS, RESULTS[:5])
    return path


def test_beside_the_run(cli: Cli, run: Path) -> None:
    done = cli("report", run)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [str(run.with_suffix(".md")), str(run.with_suffix(".html"))]
    assert "q8_KV" in run.with_suffix(".md").read_text(encoding="utf-8")
    assert run.with_suffix(".html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_in_a_directory_that_is_made(cli: Cli, run: Path, tmp_path: Path) -> None:
    done = cli("report", run, "-o", tmp_path / "new" / "place")
    assert done.code == 0
    assert sorted(p.name for p in (tmp_path / "new" / "place").iterdir()) == ["run.html", "run.md"]
    assert not run.with_suffix(".md").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read .*: No such file or directory"),
        ("", "is empty"),
        ("# Title\n", "line 1 is not JSON"),
        ('{"format": "other"}\n', "is not an evaluation"),
        ('{"format": "hybridkv-eval", "version": 7}\n', "has version 7; allowed: 2"),
        ('{"format": "hybridkv-eval", "version": 2, "conditions": {}}\n', "line 1 has missing or unknown fields"),
    ],
)
def test_bad_files(cli: Cli, tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_text(content)
    message = one_error(cli("report", path))
    assert re.search(problem, message)
    assert "hint: " in message


def test_output_that_is_a_file(cli: Cli, run: Path) -> None:
    assert "cannot create directory" in one_error(cli("report", run, "-o", run))


def test_a_run_is_never_overwritten(cli: Cli, run: Path) -> None:
    odd = run.rename(run.with_suffix(".md"))
    before = odd.read_text()
    assert "overwritten by its own report" in one_error(cli("report", odd))
    assert odd.read_text() == before


def test_without_matplotlib(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hybridkv_lab.plots", raising=False)
    monkeypatch.delattr("hybridkv_lab.plots", raising=False)
    message = one_error(cli("report", run))
    assert "matplotlib, which is missing\nhint: pip install matplotlib" in message
