"""Builds the kernels for 64-bit ARM and runs their tests under QEMU: `python -m tests.arm.run`, from the checkout.

Needs a cross compiler and the emulator: `apt install g++-aarch64-linux-gnu qemu-user cmake make`. Arguments are
pytest's; without any, all tests of native kernels run, each on every instruction set of its processor.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
NEEDED = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user", "cmake": "cmake", "make": "make"}
# A processor with dot products and one without, and what is asked of each: instruction sets, as they stand in test ids.
PROCESSORS = {"max": "dotprod or portable", "cortex-a72": "neon"}
FILES = tuple(f"tests/kernels/test_{name}.py" for name in ("cpu_native", "segments", "attend", "step", "weights"))


def missing() -> str | None:
    """What this machine lacks; None if it lacks nothing."""
    packages = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    return f"needs {' '.join(packages)}" if packages else None


def build(folder: Path) -> Path:
    """The program that serves the kernels."""
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
        "nanobind_DIR": str(Path(__file__).parent),
    }
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Unix Makefiles"]
    _run([*configure, *(f"-D{name}={value}" for name, value in options.items())])
    _run(["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
    return folder / "_cpu"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}:\n{done.stdout}{done.stderr}")


def run(program: Path, processor: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Pytest with the kernels of a processor in place of this one's."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.arm.remote", "-p", "no:cacheprovider", "-q", *arguments]
    environment = {**os.environ, "HYBRIDKV_REMOTE_CPU": f"{EMULATOR} -cpu {processor} {program}"}
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)


def main(arguments: Sequence[str]) -> int:
    """The exit status of the first run that failed, 0 if none did."""
    lacking = missing()
    if lacking is not None:
        print(lacking, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for processor, isas in PROCESSORS.items():
            done = run(program, processor, arguments or [*FILES, "-k", isas])
            print(f"{processor}:\n{done.stdout}")
            if done.returncode != 0:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
