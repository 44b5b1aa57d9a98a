"""Decide which weights and which backend a model gets, for commands and `hybridkv.load` alike."""

from __future__ import annotations

import torch

from hybridkv.engine.describe import Description
from hybridkv.errors import UsageError
from hybridkv.held import WeightKind
from hybridkv.kernels import cpu_native
from hybridkv.native.choice import BackendKind


def backend_for(device_type: str, weights: WeightKind, backend: BackendKind) -> BackendKind:
    """Choose the backend to ask for: on the CPU, plain weights are Transformers' tensors and run in its forward pass.

    Raises
    ------
    UsageError
        If the native backend is to take them.
    """
    if device_type != "cpu" or weights != "plain":
        return backend
    if backend == "native":
        raise UsageError(
            "--weights plain with --backend native; allowed: auto, f32, bf16, int8, int4",
            hint="plain weights are Transformers' own tensors, for --backend eager; f32 keeps every value too",
        )
    return "eager"


def weights_on(
    device: str, asked: WeightKind, backend: BackendKind, description: Description
) -> tuple[WeightKind, torch.dtype]:
    """Choose how matrices are held, and their dtype: packed on the CPU, but plain for a backend that was asked to be.

    On CUDA, those of a GGUF file stay packed where its kernels read all of its types.

    Raises
    ------
    UsageError
        If this build cannot pack weights, or no kernel on the device runs this model with packed ones.
    """
    if not device.startswith("cpu"):
        reason = description.rejects_packed(device.partition(":")[0], asked, backend)
        if reason is None:
            return asked, torch.float32
        if asked in ("int8", "int4"):
            raise UsageError(
                f"--weights {asked} on {device.partition(':')[0]}: {reason}; allowed: auto, plain, f32, bf16",
                hint="leave --weights out, or take --device cpu, which packs the weights of every model",
            )
        return "plain", torch.float32 if asked == "f32" else torch.bfloat16
    reason = cpu_native.available()
    if asked == "auto" and (reason is not None or backend == "eager"):
        return "plain", torch.float32
    if asked not in ("auto", "plain") and reason is not None:
        raise UsageError(f"--weights {asked}: {reason}; allowed: auto, plain", hint="leave --weights out")
    return asked, torch.float32
