"""How a model runs over new tokens: by our own operations where they know it, else by Transformers' forward pass.

Two questions, answered here and nowhere else. What computes: `native` is C++ on the CPU and Triton on CUDA, `eager` is
Transformers. And on CUDA, whether decode steps of either are recorded as a graph and replayed. The choice is printed by
whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from hybridkv.errors import UsageError, one_of
from hybridkv.hf.step import EagerStep, FusedStep, GraphStep, fused, graph
from hybridkv.hf.step.graph import Decoder
from hybridkv.native import NativeStep
from hybridkv.native.choice import EngineKind
from hybridkv.native.choice import rejects as native_rejects
from hybridkv.runtime import Step
from hybridkv.runtime.view import Notify

StepKind = EngineKind
GraphMode = Literal["on", "off"]


def parse_step(text: str) -> StepKind:
    """Check a name of a step.

    Raises
    ------
    UsageError
        Listing the names there are.
    """
    kinds: tuple[StepKind, ...] = get_args(StepKind)
    return one_of(text, kinds, "no step", hint="auto takes the native step where it runs the model")


def parse_graphs(text: str) -> GraphMode:
    """Check whether graphs are asked for.

    Raises
    ------
    UsageError
        Listing the modes.
    """
    modes: tuple[GraphMode, ...] = get_args(GraphMode)
    return one_of(text, modes, "--graph", hint="on records decode steps on CUDA, where it can")


def resolve_step(
    config: Any, device: str, kind: StepKind = "auto", *, graphs: GraphMode = "on", notify: Notify | None = None
) -> Callable[[Any], Step]:
    """Which way a model of this config runs, before its weights are touched: what makes its step from the model.

    Parameters
    ----------
    device
        torch's device type.
    graphs
        Whether decode steps on CUDA are recorded as graphs.
    notify
        Where it is reported that they are not, though they should; a logger's warning by default.

    Raises
    ------
    UsageError
        If the native step is asked for and cannot run it, with the reason.
    """
    chosen = _computes(config, device, kind)
    if chosen is NativeStep or device != "cuda" or graphs == "off":
        return chosen
    tell = graph.LOG.warning if notify is None else notify
    if (reason := graph.rejects(config, device)) is not None:
        tell(f"decoding is not recorded as a graph: {reason}")
        return chosen
    decoder: type[EagerStep] | type[FusedStep] = FusedStep if chosen is FusedStep else EagerStep
    return partial(_recorded, decoder, notify=tell)


def _computes(config: Any, device: str, kind: StepKind) -> type[EagerStep] | type[FusedStep] | type[NativeStep]:
    if kind == "eager":
        return EagerStep
    reason = fused.rejects(config, device) if device == "cuda" else native_rejects(config, device)
    if reason is None:
        return FusedStep if device == "cuda" else NativeStep
    if kind == "native":
        raise UsageError(f"the native step cannot run this model: {reason}", hint="use --engine eager, or auto")
    return EagerStep


def _recorded(decoder: Callable[[Any], Decoder], model: Any, *, notify: Notify) -> GraphStep:
    return GraphStep(decoder(model), notify=notify)
