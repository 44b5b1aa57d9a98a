"""`hybridkv bench` as a user sees it: tables, the JSON line, missing peers, wrong answers."""

from __future__ import annotations

import json
import os
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridkv.kernels import Segment, cpu_native
from hybridkv_lab import attention_bench, ceilings, decode_bench, store_bench, timing
from hybridkv_lab.peers import Found, ik_library
from tests.cli.conftest import Cli, Outcome

HERE = util.find_spec("ik_llama_cpp") is not None
pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")

SHAPES = ("--shape", "64,4,2,1,256", "--shape", "64,4,2,5,300")
TINY = ("-t", 1, "--types", "q8_0,f16")
DECODE = ("-t", 1, "--types", "q8_0", "--depths", "0,40", "--prompt", 16, "-n", 4)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No probes of the machine, and as few calls as there can be."""
    monkeypatch.setattr(cpu_native, "probe", lambda kind, n_threads, data=None: 1e10)
    for module in (attention_bench, store_bench):
        monkeypatch.setattr(
            module, "interleaved", lambda calls, budget_s: timing.interleaved(calls, budget_s=0.0), raising=True
        )
    monkeypatch.setattr(ceilings, "MEMORY_BYTES", 1 << 16)


def absent() -> Found:
    return Found("ik", "not installed (pip install ik-llama-cpp-python)")


def last_line(done: Outcome) -> dict[str, Any]:
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    assert len(done.out.splitlines()) == 1  # the tables are on stderr
    return found


def test_attention_prints_a_table(cli: Cli) -> None:
    done = cli("bench", "attention", *SHAPES, *TINY, "--against", "torch")
    assert done.code == 0
    for word in ("D=64 4/2 T=1 S=256", "of ceiling", "torch ms", "ratio", "ceilings: read", "scratch", "GB/s a core"):
        assert word in done.out
    assert "ik ms" not in done.out


def test_attention_json(cli: Cli) -> None:
    found = last_line(cli("bench", "attention", *SHAPES, *TINY, "--against", "torch", "--json"))
    assert list(found["ratio"]) == [
        f"D=64 4/2 {rows} {t}" for rows in ("T=1 S=256", "T=5 S=300") for t in TINY[3].split(",")
    ]
    assert all(ratios["torch"] > 0 for ratios in found["ratio"].values())
    assert found["machine"]["threads"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert {case["kv_type"]: case["kv_bytes"] for case in found["cases"][:2]} == {
        "q8_0": 2 * 2 * 256 * 68,
        "f16": 2 * 2 * 256 * 128,
    }
    assert all(case["scratch_bytes"] > 0 and case["error"] < 2e-3 for case in found["cases"])
    decode = "D=64 4/2 T=1 S=256"
    q8_0 = next(store for store in found["store"] if store["kv_type"] == "q8_0")
    assert q8_0["bulk_gb_s"] > 0
    assert list(q8_0["of_decode"]) == [decode]


def test_scaling_is_there_with_two_threads(cli: Cli) -> None:
    options = ("--shape", "64,4,2,1,256", "--types", "q8_0", "--against", "", "--json")
    assert last_line(cli("bench", "attention", *options, "-t", 2))["cases"][0]["scaling"] > 0
    assert last_line(cli("bench", "attention", *options, "-t", 1))["cases"][0]["scaling"] is None


def test_a_missing_peer_is_named_and_has_no_column(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_bench.PEERS, "ik", absent)
    done = cli("bench", "attention", *SHAPES, *TINY, "--against", "ik")
    assert done.code == 0
    assert "ik: not installed (pip install ik-llama-cpp-python)" in done.out
    assert "ik ms" not in done.out


def test_a_wrong_kernel_is_not_timed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = cpu_native.attend

    def wrong(q: torch.Tensor, segments: list[Segment], *args: Any, **options: Any) -> torch.Tensor:
        out = attend(q, segments, *args, **options)
        return out * 1.01 if segments[0].format_k.name == "q8_0" else out

    monkeypatch.setattr(cpu_native, "attend", wrong)
    done = cli("bench", "attention", *SHAPES, *TINY, "--against", "", "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert {wrong["kv_type"] for wrong in found["wrong"]} == {"q8_0"}
    assert {case["kv_type"] for case in found["cases"]} == {"f16"}
    assert "relative RMSE 1.0e-02 against float64 is above 2e-03: not timed" in done.err


def test_a_kernel_that_gives_nan_is_wrong(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native, "attend", lambda q, *args, **options: q * torch.nan)
    done = cli("bench", "attention", *SHAPES, *TINY, "--against", "torch")
    assert done.code == 1
    assert done.out.count("WRONG") == 4


@pytest.mark.parametrize("rows", [attention_bench.DISTINCT_ROWS, 96])
def test_the_gate_knows_repeated_rows(cli: Cli, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """300 stored tokens out of 96 rows: three copies of some and four of others, and causality through them."""
    monkeypatch.setattr(attention_bench, "DISTINCT_ROWS", rows)
    found = last_line(cli("bench", "attention", *SHAPES, *TINY, "--against", "", "--json"))
    assert max(case["error"] for case in found["cases"]) < 1e-3


@pytest.mark.skipif(not HERE, reason="ik-llama-cpp-python is not installed (x86-64 Linux only)")
def test_ik_is_timed_beside_ours(cli: Cli) -> None:
    found = last_line(cli("bench", "attention", *SHAPES, *TINY, "--against", "ik", "--json"))
    with_ik = [case for case, ratio in found["ratio"].items() if "ik" in ratio]
    assert with_ik == ["D=64 4/2 T=1 S=256 q8_0", "D=64 4/2 T=1 S=256 f16"]  # 300 rows it does not take
    assert all(error < 0.02 for case in found["cases"] for error in case["peer_error"].values())
    peer = found["peers"]["ik"]
    assert Path(peer["path"]).is_file()
    assert peer["version"]
    assert peer["build"] in ("native", "plain AVX2", "partial")
    assert peer["build"] in peer["about"]


# Whole models


def test_decode_prints_tokens_per_second(cli: Cli, gguf: Path) -> None:
    done = cli("bench", "decode", "-m", gguf, *DECODE, "--against", "")
    assert done.code == 0, done.err
    for word in ("tiny, backend ", "no peer: answers were not compared", "generation", "depth", "tokens/s"):
        assert word in done.out
    assert "ik" not in done.out


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_decode_json(cli: Cli, gguf: Path, backend: str) -> None:
    found = last_line(cli("bench", "decode", "-m", gguf, *DECODE, "--against", "", "--backend", backend, "--json"))
    assert found["backend"].startswith(backend)
    assert [(step["kv_type"], step["depth"]) for step in found["steps"]] == [("q8_0", 0), ("q8_0", 40)]
    assert all(step["tok_s"]["hybridkv"] > 0 for step in (*found["steps"], *found["prompt"]))
    assert all(step["time"]["hybridkv"]["n_calls"] == 4 for step in found["steps"])
    assert set(found["ratio"]) == {"q8_0 depth 0", "q8_0 depth 40", "q8_0 prompt 16"}


def test_a_profile_says_where_a_token_s_time_goes(cli: Cli, gguf: Path) -> None:
    """Its parts are the whole: what is no operation is named too. Other steps say that they have none."""
    found = last_line(cli("bench", "decode", "-m", gguf, *DECODE, "--against", "", "--profile", "--json"))
    for step in found["steps"]:
        assert {"product", "attention", "head: product", "outside"} <= set(step["profile"])
        assert all(ms >= 0 for ms in step["profile"].values())
    (prompt,) = found["prompt"]
    assert {"product", "attention, and outside"} <= set(prompt["profile"])
    done = cli("bench", "decode", "-m", gguf, *DECODE, "--against", "", "--profile", "--backend", "eager")
    assert "no profile: operations are timed where the native step runs" in done.out


def test_decode_without_ik_says_so(cli: Cli, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode_bench.PEERS, "ik", absent)
    done = cli("bench", "decode", "-m", gguf, *DECODE)
    assert done.code == 0
    assert "ik: not installed (pip install ik-llama-cpp-python)" in done.out
    assert "ik tokens/s" not in done.out


def test_decode_leaves_ik_out_for_a_directory(cli: Cli, hybrid: Path) -> None:
    done = cli("bench", "decode", "-m", hybrid, *DECODE)
    assert done.code == 0
    assert "ik: left out: it reads GGUF files only" in done.out or "ik: not installed" in done.out


@pytest.mark.skipif(not HERE, reason="ik-llama-cpp-python is not installed (x86-64 Linux only)")
def test_decode_beside_ik(cli: Cli) -> None:
    options = ("-t", 1, "--types", "q8_0", "--depths", "4,300", "--prompt", 16, "-n", 4, "--json")
    found = last_line(cli("bench", "decode", *options))
    assert found["gates"][0]["passed"]
    assert found["gates"][0]["agreed"] == 16
    assert all(ratio["ik"] > 0 for ratio in found["ratio"].values())


@pytest.mark.skipif(not HERE, reason="ik-llama-cpp-python is not installed (x86-64 Linux only)")
def test_a_model_that_answers_otherwise_is_not_timed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = decode_bench.OurRunner.advance
    monkeypatch.setattr(decode_bench.OurRunner, "advance", lambda self, ids: advance(self, ids)[::-1])
    done = cli("bench", "decode", *DECODE, "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert found["steps"] == found["prompt"] == []
    assert "WRONG, above 0.1: not timed, against ik" in done.err


@pytest.mark.skipif(not HERE, reason="ik-llama-cpp-python is not installed (x86-64 Linux only)")
def test_a_difference_above_the_limit_is_timed_only_where_it_is_allowed(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = decode_bench.OurRunner.advance
    monkeypatch.setattr(decode_bench.OurRunner, "advance", lambda self, ids: advance(self, ids)[::-1])
    done = cli("bench", "decode", *DECODE, "--difference-limit", 5, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert len(found["steps"]) == 2
    (gate,) = found["gates"]
    assert gate["limit"] == 5
    assert gate["passed"]
    assert 0.1 < gate["difference"] < 5
    assert "q8_0: differs from ik, which --difference-limit 5 allows: logits within " in done.err
    done = cli("bench", "decode", *DECODE, "--difference-limit", 0.2)
    assert done.code == 1
    assert "WRONG, above 0.2: not timed, against ik" in done.out


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "much"])
def test_a_difference_limit_is_a_number(cli: Cli, limit: str) -> None:
    done = cli("bench", "decode", *DECODE, "--difference-limit", limit)
    assert done.code == 2
    assert f"--difference-limit {limit!r}; allowed: a number above 0 and at most 100" in done.err
    assert "hint: " in done.err


@pytest.mark.skipif(not HERE, reason="ik-llama-cpp-python is not installed (x86-64 Linux only)")
def test_rotated_rows_are_timed_beside_ik_s(cli: Cli) -> None:
    options = ("-t", 1, "--types", "q4_0", "--depths", "0,40", "--prompt", 16, "-n", 4)
    found = last_line(cli("bench", "decode", *options, "-khad", "-vhad", "--json"))
    assert [gate["kv_type"] for gate in found["gates"]] == ["q4_0 -khad -vhad"]
    assert found["gates"][0]["passed"]
    assert set(found["ratio"]) == {f"q4_0 -khad -vhad {at}" for at in ("depth 0", "depth 40", "prompt 16")}


def test_library_folder_is_found_or_not() -> None:
    assert (ik_library.library_folder() is not None) == HERE


@pytest.mark.parametrize("bench", ["decode", "attention"])
def test_torch_spins_as_briefly_as_in_the_commands(bench: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its idle threads take a third of a step that `run` does not lose."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert cli("bench", bench, "--types", "nothing").code == 2
    assert os.environ["GOMP_SPINCOUNT"] == "20000"
