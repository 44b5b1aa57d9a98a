"""How a model runs over new tokens: natively where that resolves, else by Transformers' own forward pass.

`resolve_step` is the one place that decides; the choice is printed by whoever asks for it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from hybridkv.errors import UsageError, one_of
from hybridkv.hf.step import native
from hybridkv.hf.step.eager import EagerStep
from hybridkv.hf.step.native import NativeStep
from hybridkv.hf.step.record import Step
from hybridkv.hf.step.weights import (
    WeightKind,
    pack_model,
    packed_bytes,
    packed_parameter,
    packing_rejects,
    parse_weights,
    vocabulary_rows,
)

StepKind = Literal["auto", "native", "eager"]


def parse_step(text: str) -> StepKind:
    """Check a name of a step.

    Raises
    ------
    UsageError
        Listing the names there are.
    """
    kinds: tuple[StepKind, ...] = get_args(StepKind)
    return one_of(text, kinds, "no step", hint="auto takes the native step where it runs the model")


def resolve_step(config: Any, device: str, kind: StepKind = "auto") -> type[EagerStep] | type[NativeStep]:
    """Which way a model of this config runs, before its weights are touched.

    Raises
    ------
    UsageError
        If the native step is asked for and cannot run it, with the reason.
    """
    if kind == "eager":
        return EagerStep
    reason = native.rejects(config, device)
    if reason is None:
        return NativeStep
    if kind == "native":
        raise UsageError(f"the native step cannot run this model: {reason}", hint="use --engine eager, or auto")
    return EagerStep


__all__ = [
    "EagerStep",
    "NativeStep",
    "Step",
    "StepKind",
    "WeightKind",
    "pack_model",
    "packed_bytes",
    "packed_parameter",
    "packing_rejects",
    "parse_step",
    "parse_weights",
    "resolve_step",
    "vocabulary_rows",
]
