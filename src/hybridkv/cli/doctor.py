"""`hybridkv doctor`: what is installed, what this machine has, and which kernel runs every case."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from hybridkv import __version__
from hybridkv.cli.collector import import_torch
from hybridkv.cli.show import simple_table, size, stdout_console
from hybridkv.errors import UsageError
from hybridkv.memory import available_memory

NAME = "doctor"
HELP = "print versions, CPU features, devices and the kernel matrix with the reason for each refusal"

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 512)
"""Head dims of released hybrid models."""

_PACKAGES = ("torch", "transformers", "gguf", "tokenizers", "numpy", "triton")
_RECURRENT = {"fla": "delta rules", "causal_conv1d": "short convolutions", "mamba_ssm": "Mamba scans"}
"""Packages that Transformers' own code takes for recurrent layers on CUDA where they are installed."""

_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv doctor`."""
    parser.add_argument("--device", metavar="KIND", help="cpu or cuda (default: what torch finds)")
    parser.add_argument("--head-dim", type=int, metavar="N", help="check only this head dim")
    parser.add_argument(
        "--full", action="store_true", help="print one line per pair of types, head dim and phase, with refusals"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(arguments: argparse.Namespace) -> int:
    """Look, resolve every case, print."""
    import_torch()
    import torch

    a = arguments
    if a.head_dim is not None and a.head_dim < 1:
        raise UsageError(f"--head-dim {a.head_dim}; allowed: 1 or more")
    if a.device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {a.device!r}; allowed: cpu, cuda")
    devices = [a.device] if a.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    dims = HEAD_DIMS if a.head_dim is None else (a.head_dim,)
    versions = {"hybridkv": __version__, **{name: _version(name) for name in _PACKAGES}}
    versions["python"] = platform.python_version()
    features = _cpu_features()
    matrix = [case for device in devices for case in _matrix(device, dims)]
    backends, recurrent = _backends(), _recurrent()
    memory, weights = available_memory(), _weights()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if a.json:
        found = {"versions": versions, "cpu": features, "cuda": gpus, "backends": backends, "recurrent": recurrent}
        bytes_free = None if memory is None else {"available_bytes": memory.n_bytes, "source": memory.source}
        print(json.dumps({**found, "memory": bytes_free, "weights": weights, "matrix": matrix}))
        return 0
    console = stdout_console()
    console.print("versions    " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    console.print(
        f"cpu         {platform.machine()}, {os.cpu_count()} cores, {' '.join(features) or 'no known features'}"
    )
    console.print(f"cuda        {', '.join(gpus) or 'none that torch can use'}")
    free = "not said by this system" if memory is None else f"{size(memory.n_bytes)} {memory.source}"
    console.print(f"memory      {free}")
    console.print("weights     " + "; ".join(f"{place}: {how}" for place, how in weights.items()))
    console.print("backends    " + "; ".join(f"{name}: {models}" for name, models in backends.items()))
    console.print(
        "recurrent   eager backend on cuda: " + ", ".join(f"{kind} by {package}" for kind, package in recurrent.items())
    )
    _print_full(matrix) if a.full else _print_summary(matrix)
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_features() -> list[str]:
    """List the SIMD features among those that matter, from the kernel's own list (Linux)."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.is_file() else set()
    return [feature for feature in _FEATURES if feature in words]


def _backends() -> dict[str, str]:
    """List the backends for the layers outside of attention, and which models each one runs."""
    from hybridkv.hf.step import fused as fused_step
    from hybridkv.kernels import cpu_native
    from hybridkv.model import FAMILIES

    missing = cpu_native.available()
    native = f"cannot run, {missing}" if missing else f"{', '.join(FAMILIES)} on cpu-{cpu_native.isa()}"
    reason = fused_step.rejects_device("cuda")
    names, own = ", ".join(FAMILIES), ", ".join(fused_step.FAMILY_NAMES)
    known = f"{names} of GGUF files on cuda, {own} of model directories, decode as a graph"
    fused = f"cannot run, {reason}" if reason else known
    return {"native": native, "native-triton": fused, "eager": "whatever Transformers runs"}


def _weights() -> dict[str, str]:
    """Describe how each kind of weight is held, on the CPU and on CUDA."""
    from hybridkv.formats.weights import WEIGHTS
    from hybridkv.kernels import cpu_native
    from hybridkv.kernels.cuda.packed_layout import PACKED

    missing = cpu_native.available()
    matrices = f"float32, decoded: {missing}" if missing else f"as a file has them: {', '.join(WEIGHTS)}"
    wide = [name for name, fmt in WEIGHTS.items() if fmt.is_quantized and name not in PACKED]
    packed = f"packed under native-triton ({', '.join(PACKED)})"
    also = f", as are files with {', '.join(wide)}" if wide else ""
    on_cuda = f"{packed}, else expanded to bf16{also}"
    return {
        "matrices and stacks of experts on cpu": matrices,
        "vectors, convolutions, stacks of experts under the eager backend on cpu": "float32",
        "matrices of a GGUF file on cuda": on_cuda,
    }


def _recurrent() -> dict[str, str]:
    """Describe what runs the eager backend's recurrent layers on CUDA, per kind of layer."""
    names = metadata.packages_distributions()
    return {
        kind: f"{names[package][0]} {_version(names[package][0])}" if package in names else "torch"
        for package, kind in _RECURRENT.items()
    }


def _matrix(device: str, dims: tuple[int, ...]) -> list[dict[str, Any]]:
    """List every pair x head dim x phase: the kernel that runs it, and every kernel's reason to refuse."""
    from hybridkv.formats import FORMATS
    from hybridkv.kernels import KERNELS, PHASES, AttentionCase, explain

    found = []
    for dim in dims:
        for phase in PHASES:
            for k in FORMATS:
                for v in FORMATS:
                    case = AttentionCase(device, k, v, dim, dim, group=1, phase=phase)
                    answers = explain(case, KERNELS)
                    chosen = next((name for name, reason in answers if reason is None), None)
                    refusals = {name: reason for name, reason in answers if reason is not None}
                    found.append(
                        {
                            "device": device,
                            "type_k": k,
                            "type_v": v,
                            "head_dim": dim,
                            "phase": phase,
                            "kernel": chosen,
                            "refusals": refusals,
                        }
                    )
    return found


def _print_summary(matrix: list[dict[str, Any]]) -> None:
    """Print one line per device, head dim and phase: pairs per kernel; then each distinct refusal with its count."""
    table = simple_table(
        "device", "head dim", "phase", "pairs per kernel", left=("device", "phase", "pairs per kernel")
    )
    keys = dict.fromkeys((case["device"], case["head_dim"], case["phase"]) for case in matrix)
    for device, dim, phase in keys:
        here = [r for r in matrix if (r["device"], r["head_dim"], r["phase"]) == (device, dim, phase)]
        counts = Counter(case["kernel"] or "NO KERNEL" for case in here)
        table.add_row(device, str(dim), phase, ", ".join(f"{name} {n}" for name, n in counts.items()))
    console = stdout_console()
    console.print(table)
    refusals = Counter((name, reason) for case in matrix for name, reason in case["refusals"].items())
    console.print("refusals" if refusals else "refusals    none")
    for (name, reason), count in refusals.most_common():
        console.print(f"  {name}: {reason} ({count} cases)")
    console.print("`hybridkv doctor --full` prints a line per pair of types")


def _print_full(matrix: list[dict[str, Any]]) -> None:
    table = simple_table(
        "device",
        "head dim",
        "phase",
        "K",
        "V",
        "kernel",
        "refused by",
        left=("device", "phase", "K", "V", "kernel", "refused by"),
    )
    for case in matrix:
        refusals = "; ".join(f"{name}: {reason}" for name, reason in case["refusals"].items())
        table.add_row(
            case["device"],
            str(case["head_dim"]),
            case["phase"],
            case["type_k"],
            case["type_v"],
            case["kernel"] or "NONE",
            refusals or "-",
        )
    stdout_console().print(table)
