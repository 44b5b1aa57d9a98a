"""The way on from non-finite values: the next types of the ladder, or an error that names the cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from hybridkv.cache import KVSpec
from hybridkv.errors import GuardError, ModelError
from hybridkv.model.protocols import LanguageModel
from hybridkv.native import NativeModel
from hybridkv.policy import Guard, MismatchError, NonFiniteError, next_types


def raised_specs(specs: Sequence[KVSpec], guard: Guard, error: NonFiniteError | MismatchError) -> tuple[KVSpec, ...]:
    """Raise every layer to the next types of the ladder, where there are any.

    Raises
    ------
    GuardError
        If there are none, or the mode forbids a fallback.
    """
    raised = tuple(replace(s, types=next_types(s.types) or s.types) for s in specs)
    climbed = raised != tuple(specs)
    if guard.mode in ("strict", "off") or not climbed:
        why = f"and the guard is {guard.mode!r}" if climbed else "and no larger type is left"
        raise GuardError(f"{error.message}, {why}", hint=error.hint) from error
    return raised


def labels_of(specs: Sequence[KVSpec]) -> str:
    """Name the layers' types, each once."""
    return ", ".join(dict.fromkeys(s.types.label for s in specs))


def check_weights(model: LanguageModel) -> None:
    """Refuse weights that are not finite themselves, and name the tensor.

    Raises
    ------
    ModelError
        Naming the first tensor that is not finite.
    """
    if (name := _bad_weight(model)) is not None:
        raise ModelError(
            f"the weights are not finite: {name} holds NaN or infinity",
            hint="the model file is damaged or was converted wrongly; no cache type can help",
        )


def _bad_weight(model: LanguageModel) -> str | None:
    """Name the first tensor of a model that is not finite."""
    if isinstance(model, NativeModel):
        return model.source.check()
    assert isinstance(model, torch.nn.Module), model
    return next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)
