"""What building says on a machine where something is missing: one line that names it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def configure(tmp_path: Path, *options: str, **variables: str) -> list[str]:
    """Lines that CMake prints as an error."""
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DPython_EXECUTABLE={sys.executable}", *options]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Call Stack" not in done.stderr
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith("CMake Error at CMakeLists.txt")]


@pytest.mark.parametrize("compiler", ["/nonexistent", "/bin/false"])
def test_no_compiler(tmp_path: Path, compiler: str) -> None:
    (line,) = configure(tmp_path, CXX=compiler)
    assert line.startswith(f"hybridkv needs a C++17 compiler, and CXX={compiler} does not compile; install one: apt")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler to get so far")
def test_no_python_headers(tmp_path: Path) -> None:
    (line,) = configure(tmp_path, "-DPython_INCLUDE_DIR=/nonexistent")
    assert line == "hybridkv needs Python 3.11 or newer with its C headers; install them: apt install python3-dev"
