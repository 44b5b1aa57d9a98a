"""Kernels of a CUDA device that are compiled by other processes while a model loads.

Owns when such a process is started, and for what. It takes seconds to import its libraries, so where nothing was ever
compiled it starts before this one imports its own. What was compiled once is marked in Triton's directory.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec
    from hybridkv.cli.model_options import Opened
    from hybridkv.kernels.cuda.ahead import Ahead

_started: list[subprocess.Popen[bytes]] = []


def start_early(a: argparse.Namespace) -> None:
    """Start the process, if this machine has a card that may be used and no kernel of ours was compiled on it."""
    if a.device == "cpu" or not Path("/dev/nvidiactl").exists() or any(_kept().glob(f"{_prefix()}*")):
        return
    _started.append(_start())


def compile_ahead(opened: Opened, specs: Sequence[KVSpec]) -> Ahead | None:
    """Have a model's kernels compiled; None where that was done before, or for a model that no packed step runs."""
    started = _started.pop() if _started else None
    request = _request(opened, specs)
    mark = None if request is None else _kept() / f"{_prefix()}{_digest(request)}"
    if request is None or mark is None or mark.exists():
        if started is not None:
            started.kill()
            started.wait()
        return None
    from hybridkv.kernels.cuda.ahead import Ahead

    return Ahead(started or _start(), request, mark)


def _request(opened: Opened, specs: Sequence[KVSpec]) -> bytes | None:
    """Describe the model for the process."""
    description = opened.description
    packed = opened.device_type == "cuda" and opened.weights == "auto" and not opened.hosted
    if not packed or description.rejects_packed("cuda", opened.weights, opened.backend) is not None:
        return None
    import torch

    from hybridkv.gguf.saved import saved_types
    from hybridkv.kernels.cuda.card import facts_of
    from hybridkv.native.rehearsal import Request

    header, card = description.header, facts_of(torch.device(opened.device))
    assert header is not None and card is not None
    shapes = {info.name: info.shape for info in header.tensors}
    tensors = {name: (shapes[name], kind) for name, kind in saved_types(header).items()}
    return pickle.dumps(Request(description.config, tensors, tuple(specs), card, opened.n_ctx))


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "hybridkv.native.rehearsal"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def _kept() -> Path:
    """Find Triton's directory without importing it."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def _prefix() -> str:
    """Name the marks of the kernels as they are in this version."""
    sources = sorted((Path(__file__).parent.parent / "kernels" / "cuda").glob("*.py"))
    return f"hybridkv-{_digest(b''.join(file.read_bytes() for file in sources))}-"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
