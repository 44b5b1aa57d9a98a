"""`--device`: how a device is written, which one is meant, and what goes with a model on several of them."""

from __future__ import annotations

import argparse
import re
from typing import Literal

from hybridkv.errors import UsageError


def device_name(text: str) -> str:
    """Read a device in llama.cpp's words, or in torch's."""
    if text.lower() == "none":
        return "cpu"
    numbered = re.fullmatch(r"cuda(\d+)", text, re.IGNORECASE)
    return f"cuda:{numbered[1]}" if numbered else text


def check_ranks(a: argparse.Namespace, n: int, ranks: Literal["one", "many"]) -> None:
    """Refuse options that do not go with a model that is sharded over several processes."""
    if ranks == "one":
        raise UsageError(
            f"torchrun started {n} processes, but this command runs in one process",
            hint="only `hybridkv run` runs on several ranks",
        )
    if a.backend == "native":
        raise UsageError(
            f"--backend native on {n} ranks; allowed: auto, eager", hint="Transformers shards only its own layers"
        )
    if a.graph == "on":
        raise UsageError(f"--graph on with {n} ranks: a decode step that waits for other ranks cannot be recorded")
    if a.weights not in ("auto", "plain"):
        raise UsageError(f"--weights {a.weights} on {n} ranks; allowed: auto, plain", hint="leave --weights out")


def device_of_rank(name: str, n: int) -> str:
    """Find this rank's device: Transformers takes the machine's accelerators, or else the CPU."""
    import torch

    from hybridkv.hf.ranks import local_rank

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("auto", kind):
        raise UsageError(f"--device {name!r} on {n} ranks; allowed here: auto, {kind}")
    return f"cuda:{local_rank()}" if kind == "cuda" else "cpu"


def find_device(name: str) -> str:
    """Read `--device` where a model has one process: a device that is here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    known = kind in ("cpu", "cuda") and (not index or (kind == "cuda" and index.isdigit()))
    if not known:
        raise UsageError(f"--device {name!r}; allowed: auto, cpu, cuda, cuda:N", hint="try --device cpu")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use",
            hint="try --device cpu",
        )
    return name
