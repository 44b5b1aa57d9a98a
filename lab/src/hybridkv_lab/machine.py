"""The conditions of a figure: processor, instruction set, threads, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from hybridkv.kernels import cpu_native

_PACKAGES = ("hybridkv", "torch", "transformers", "numpy")


def machine(n_threads: int) -> dict[str, str | int]:
    """Describe the processor model, cores, the kernels' instruction set, and threads."""
    return {"cpu": cpu_model(), "cores": os.cpu_count() or 1, "isa": cpu_native.isa(), "threads": n_threads}


def load() -> float:
    """Count the processes that wanted a core during the last minute, on average."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def cpu_model() -> str:
    """Read the processor's own name (Linux), else its architecture."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """List the instruction sets that the processor has, in the operating system's spelling (Linux)."""
    return next((set(line.split()) for line in _cpuinfo() if line.startswith("flags")), set())


def versions() -> dict[str, str]:
    """List the versions of what runs here."""
    return {name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
