"""Several processes of one program, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

needs_accelerate = pytest.mark.skipif(
    find_spec("accelerate") is None, reason='accelerate is not installed: pip install "hybridkv[tp]"'
)


def torchrun(*words: str, n: int = 2) -> subprocess.CompletedProcess[str]:
    """A module on several ranks, one thread each, and on CUDA one card each."""
    if 0 < torch.cuda.device_count() < n:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices for {n} ranks")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*start, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
