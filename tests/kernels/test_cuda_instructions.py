"""The kernel for one token, compiled for an H100 without one: what it spends on a value is what its speed rests on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).parents[2] / "bench" / "instructions_cuda.py"


def test_a_value_costs_few_instructions(tmp_path: Path) -> None:
    """A register more than 255, or a value that left its register, would show as instructions."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--types", "q8_0,q6_0,q4_0"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    spent = {(kv_type, int(dim)): (float(value), most) for kv_type, dim, _, _, value, most in rows}
    assert len(spent) == 6
    for (kv_type, _), (value, most) in spent.items():
        assert 2 < value <= (4.6 if kv_type == "q6_0" else 3.6), (kv_type, value)
        assert "HMMA" in most or value > 4, most
        assert "LDL" not in most
