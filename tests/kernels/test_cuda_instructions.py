"""Kernels of a decode step, compiled for an H100 without one: their instructions are what their speed rests on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "bench" / "instructions_cuda.py"


def table(cache: Path, *options: str) -> list[list[str]]:
    """The rows that the script prints."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    words = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]


@pytest.mark.long
def test_a_value_costs_few_instructions(tmp_path: Path) -> None:
    """A register more than 255, or a value that left its register, would show as instructions."""
    rows = table(tmp_path, "--types", "q8_0,q6_0,q4_0")
    spent = {(kv_type, int(dim)): (float(value), most) for kv_type, dim, _, _, value, most in rows}
    assert len(spent) == 6
    for (kv_type, _), (value, most) in spent.items():
        assert 2 < value <= (4.6 if kv_type == "q6_0" else 3.6), (kv_type, value)
        assert "HMMA" in most or value > 4, most
        assert "LDL" not in most


def test_experts_are_read_in_pieces_of_16_bytes_without_barriers(tmp_path: Path) -> None:
    rows = table(tmp_path, "--experts")
    assert [row[0] for row in rows] == ["_up", "_down"]
    for _, registers, wide, narrow, barriers in rows:
        assert int(registers) <= 160
        assert int(wide) >= 6
        assert (narrow, barriers) == ("0", "0")


def test_a_product_asks_for_all_of_its_weights_before_it_waits(tmp_path: Path) -> None:
    """Two rows of 2560, 5 times 16 bytes a thread; with a gate four; one row of 4096 and of 9216."""
    rows = table(tmp_path, "--products")
    assert [(row[0], row[1], row[3], row[4]) for row in rows] == [
        ("2560", "False", "5", "0"),
        ("2560", "True", "10", "0"),
        ("4096", "False", "4", "0"),
        ("9216", "False", "9", "0"),
    ]
    assert max(int(row[2]) for row in rows) <= 100  # five programs a multiprocessor
