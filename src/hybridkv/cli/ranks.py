"""`hybridkv run` under torchrun: only rank 0 prints; messages from other ranks carry their rank."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from hybridkv.cli.show import warning
from hybridkv.errors import HybridKVError, UsageError


def check_ranks(a: argparse.Namespace) -> None:
    """Refuse what several ranks cannot do, before a model is touched.

    Raises
    ------
    UsageError
        Saying why.
    """
    from hybridkv.hf.ranks import n_ranks

    if a.session is not None and n_ranks() > 1:
        raise UsageError(
            "--session on several ranks: a session file belongs to one process", hint="leave --session out"
        )


def silence_other_ranks(n_ranks: int) -> Callable[[str], None]:
    """Silence all ranks but the first; where the guard reports.

    A layer may hold on one rank and not on another, which has other heads: each says so itself.
    """
    from hybridkv.hf.ranks import rank

    if n_ranks == 1:
        return warning
    if rank() == 0:
        return lambda text: warning(f"rank 0: {text}")
    silent = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process is there
    sys.stdout = sys.stderr = silent
    return _say


def report_failure(error: HybridKVError) -> None:
    """Say what ended a silenced rank: the others may know nothing of it."""
    from hybridkv.hf.ranks import rank

    if rank():
        _say(f"error: {error}")


def leave_ranks(code: int) -> int:
    """End what the ranks talk through, and the process with it where there are several; else its exit code."""
    from hybridkv.hf.ranks import exit_rank

    return exit_rank(code)


def _say(text: str) -> None:
    from hybridkv.hf.ranks import rank

    print(f"rank {rank()}: {text}", file=sys.__stderr__, flush=True)
