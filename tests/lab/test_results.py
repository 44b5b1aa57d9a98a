"""The JSONL file of an evaluation: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridkv.errors import UsageError
from hybridkv_lab.results import front, read_jsonl, write_jsonl
from tests.lab.evaluation import CONDITIONS, FLOOR, REFERENCE, RESULTS, result

ODD = replace(
    result("q4_0", 4.5, 1e-3),
    label='a "label"\n\u2028 with \ud800 and <b>',
    kld_max=math.inf,
    ratio=-math.inf,
    positions=(),
    histogram=(),
    worst=((7, math.inf, "ü \x00 \u2028"),),
    greedy_agreement=None,
    decode_tok_s=None,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    write_jsonl(path, CONDITIONS, RESULTS)
    return path


@pytest.mark.parametrize("results", [RESULTS, (ODD,), ()], ids=["14 candidates", "odd values", "none yet"])
def test_round_trip(tmp_path: Path, results: Any) -> None:
    path = tmp_path / "run.jsonl"
    conditions = replace(CONDITIONS, commit=None, complete=False)
    write_jsonl(path, conditions, results)
    assert read_jsonl(path) == (conditions, tuple(results))
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


def test_nan_comes_back(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "run.jsonl", CONDITIONS, [replace(ODD, kld_mean=math.nan)])
    _, (back,) = read_jsonl(tmp_path / "run.jsonl")
    assert math.isnan(back.kld_mean)


def test_every_line_is_json_without_extensions(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_jsonl(path, CONDITIONS, [replace(ODD, kld_mean=math.nan)])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    head, row = (json.loads(line, parse_constant=refuse) for line in path.read_text().split("\n")[:-1])
    assert (head["format"], head["version"]) == ("hybridkv-eval", 2)
    assert (row["kld_mean"], row["kld_max"], row["ratio"], row["decode_tok_s"]) == ("nan", "inf", "-inf", None)


def test_whole_numbers_are_floats_where_floats_are_meant(run: Path) -> None:
    run.write_text(run.read_text().replace('"bits_per_value": 8.5', '"bits_per_value": 8'))
    back = read_jsonl(run)[1][2].bits_per_value
    assert back == 8.0
    assert type(back) is float


def test_others_may_read_it(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(run.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_failed_write_leaves_the_old_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.read_text()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UsageError, match=r"cannot write .*run.jsonl: No space left"):
        write_jsonl(run, CONDITIONS, ())
    assert run.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


def test_no_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write .*: No such file or directory"):
        write_jsonl(tmp_path / "none" / "run.jsonl", CONDITIONS, ())


def edit(run: Path, line: int, **changes: Any) -> None:
    """Set fields of a line; `...` removes one."""
    lines = run.read_text().splitlines()
    values = json.loads(lines[line - 1]) | changes
    lines[line - 1] = json.dumps({k: v for k, v in values.items() if v is not ...})
    run.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("line", "changes", "problem"),
    [
        (1, {"format": "other"}, "is not an evaluation"),
        (1, {"version": 1}, "has version 1; allowed: 2"),
        (1, {"conditions": None}, "line 1 has missing or unknown fields"),
        (2, {"label": ...}, "line 2 has missing or unknown fields: label"),
        (3, {"color": 1}, "line 3 has missing or unknown fields: color"),
        (2, {"label": 4}, r"line 2 has a wrong 'label'"),
        (2, {"tail": True}, r"line 2 has a wrong 'tail'"),
        (2, {"tail": 1.5}, r"line 2 has a wrong 'tail'"),
        (2, {"perplexity": "eight"}, r"line 2 has a wrong 'perplexity'"),
        (2, {"perplexity": None}, r"line 2 has a wrong 'perplexity'"),
        (2, {"perplexity": 10**400}, r"line 2 has a wrong 'perplexity'"),
        (2, {"role": "best"}, r"line 2 has a wrong 'role'"),
        (2, {"role": []}, r"line 2 has a wrong 'role'"),
        (2, {"positions": {}}, r"line 2 has a wrong 'positions'"),
        (2, {"positions": [[0, 1.0]]}, r"line 2 has a wrong 'positions'"),
        (2, {"worst": [[0, 1.0, 3]]}, r"line 2 has a wrong 'worst'"),
    ],
)
def test_damaged_fields(run: Path, line: int, changes: dict[str, Any], problem: str) -> None:
    edit(run, line, **changes)
    with pytest.raises(UsageError, match=problem) as caught:
        read_jsonl(run)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"GGUF\x00\xff\xfe", "is not a text file"),
        (b"perplexity,8.4\n", "line 1 is not JSON"),
        (b"[1]\n", "line 1 is no JSON object"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"a": NaN}', "line 1 is not JSON"),
        (b"{}\n", "is not an evaluation"),
    ],
)
def test_foreign_files(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        read_jsonl(path)


def test_cut_short(run: Path) -> None:
    run.write_bytes(run.read_bytes()[:-20])
    with pytest.raises(UsageError, match=f"line {len(RESULTS) + 1} is not JSON"):
        read_jsonl(run)


def test_missing_and_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none: No such file"):
        read_jsonl(tmp_path / "none")
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        read_jsonl(tmp_path)


def test_front_is_what_no_other_beats() -> None:
    """Beside the definition, pair by pair."""
    rows = [r for r in RESULTS if r.role == "candidate"]
    beaten = {
        r.label
        for r in rows
        for o in rows
        if o is not r and o.bits_per_value <= r.bits_per_value and o.kld_mean <= r.kld_mean
    }
    assert [r.label for r in sorted(rows, key=lambda r: r.bits_per_value) if r.label not in beaten] == [
        r.label for r in front(RESULTS)
    ]
    assert beaten
    assert front((REFERENCE, FLOOR)) == ()
    assert front([replace(RESULTS[2], kld_mean=math.nan)]) == ()
