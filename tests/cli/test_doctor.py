"""`hybridkv doctor`: which kernel runs what here, and why others do not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

import hybridkv
from hybridkv.cli.doctor import HEAD_DIMS
from hybridkv.formats import FORMATS
from hybridkv.kernels import KERNELS, AttentionCase, select
from tests.cli.conftest import Cli


def test_what_is_printed(cli: Cli) -> None:
    done = cli("doctor", "--device", "cpu")
    assert done.code == 0
    assert done.err == ""
    assert f"hybridkv {hybridkv.__version__}, torch 2." in done.out
    assert "matrices and stacks of experts on cpu: as a file has them: f32, f16, bf16, q8_0, " in done.out
    assert "; matrices of a GGUF file on cuda: packed under native-triton (q8_0, q4_0, " in done.out
    assert "else expanded to bf16" in done.out
    assert "vectors, convolutions, stacks of experts under the eager backend on cpu: float32; " in done.out
    for line in ("memory      ", "weights     ", "cpu         ", "cuda        ", "recurrent   ", "refusals"):
        assert f"\n{line}" in done.out
    rows = [line.split() for line in done.out.splitlines() if line.startswith(" cpu ")]
    assert [(int(row[1]), row[2]) for row in rows] == [(d, p) for d in HEAD_DIMS for p in ("prefill", "decode")]
    assert "NO KERNEL" not in done.out


def test_a_head_dim_that_blocks_do_not_divide(cli: Cli) -> None:
    done = cli("doctor", "--device", "cpu", "--head-dim", 20)
    assert done.code == 0
    free = [name for name, fmt in FORMATS.items() if fmt.rejects(20) is None]
    assert 0 < len(free) < len(FORMATS)
    assert f"NO KERNEL {len(FORMATS) ** 2 - len(free) ** 2}" in done.out
    for name in FORMATS.keys() - free:
        assert f"torch-reference: {name} needs a head dim that is a multiple of 16, not 20" in done.out


def test_json_is_the_truth_about_every_case(cli: Cli) -> None:
    done = cli("doctor", "--json", "--device", "cpu")
    answer = json.loads(done.out)
    assert answer.keys() == {"versions", "cpu", "cuda", "backends", "recurrent", "memory", "weights", "matrix"}
    assert 2**20 < answer["memory"]["available_bytes"] < 2**50
    assert "qwen3_5_text" in answer["backends"]["native"]
    assert answer["backends"].keys() == {"native", "native-triton", "eager"}
    fla = importlib.util.find_spec("fla") is not None
    assert answer["recurrent"]["delta rules"].startswith("flash-linear-attention" if fla else "torch")
    assert answer["versions"]["hybridkv"] == hybridkv.__version__
    assert {"torch", "transformers", "gguf", "tokenizers", "numpy", "python"} < answer["versions"].keys()
    keys = {"device", "type_k", "type_v", "head_dim", "phase", "kernel", "refusals"}
    assert all(row.keys() == keys for row in answer["matrix"])
    cases = {(r["type_k"], r["type_v"], r["head_dim"], r["phase"]): r for r in answer["matrix"]}
    assert len(cases) == len(answer["matrix"]) == len(FORMATS) ** 2 * len(HEAD_DIMS) * 2
    for (k, v, dim, phase), row in cases.items():
        assert row["kernel"] == select(AttentionCase("cpu", k, v, dim, dim, 1, phase), KERNELS).name
        assert row["kernel"] not in row["refusals"]
        assert row["refusals"].keys() <= {kernel.name for kernel in KERNELS}
        assert all(row["refusals"].values())


def test_full_prints_a_line_per_case(cli: Cli) -> None:
    done = cli("doctor", "--full", "--device", "cpu", "--head-dim", 20)
    rows = [line for line in done.out.splitlines() if line.startswith(" cpu ")]
    assert len(rows) == 2 * len(FORMATS) ** 2
    row = next(row.split() for row in rows if row.split()[2:5] == ["decode", "q4_0", "f16"])
    assert row[5] == "NONE"
    assert "q4_0 needs a head dim that is a multiple of 16, not 20" in " ".join(row)
    assert "…" not in done.out


@pytest.mark.parametrize("option", ["--full", pytest.param("--json", marks=pytest.mark.slow)])
def test_a_reader_that_has_enough_ends_it_calmly(option: str) -> None:
    """`hybridkv doctor --full | head -1`."""
    command = [sys.executable, "-m", "hybridkv.cli", "doctor", option]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) in (1, 141)


def test_help_and_version(cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    for argv, expected in (
        (["--version"], f"hybridkv {hybridkv.__version__}\n"),
        (["run", "--help"], "usage: hybridkv run"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli(*argv)
        assert ended.value.code == 0
        assert expected in capfd.readouterr().out
