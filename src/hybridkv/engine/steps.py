"""The choice of a model's step: our own operations where they know the model, else Transformers' forward pass.

Two questions, answered here and nowhere else. What computes: `native` is C++ on the CPU and Triton on CUDA, `eager` is
Transformers. And on CUDA, whether decode steps of either are recorded as a graph and replayed. The choice is printed by
whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from hybridkv.errors import UsageError, one_of
from hybridkv.kernels.weights import Activations, int8_rejects
from hybridkv.model.protocols import Config, LanguageModel
from hybridkv.native import NativeModel, NativeStep
from hybridkv.native.choice import BackendKind, rejects_packed
from hybridkv.native.choice import rejects as native_rejects
from hybridkv.runtime import Notify, Step

if TYPE_CHECKING:
    from hybridkv.hf.step import EagerStep
    from hybridkv.hf.step.fused_layers import LayersStep

GraphMode = Literal["on", "off"]


def parse_backend(text: str) -> BackendKind:
    """Check the name of a backend.

    Raises
    ------
    UsageError
        Listing the names there are.
    """
    kinds: tuple[BackendKind, ...] = get_args(BackendKind)
    return one_of(text, kinds, "--backend", hint="auto takes the native step where it runs the model")


def parse_graphs(text: str) -> GraphMode:
    """Check whether graphs are asked for.

    Raises
    ------
    UsageError
        Listing the modes.
    """
    modes: tuple[GraphMode, ...] = get_args(GraphMode)
    return one_of(text, modes, "--graph", hint="on records decode steps on CUDA, where it can")


def parse_activations(text: str) -> Activations:
    """Check what quantized weights are to be multiplied with.

    Raises
    ------
    UsageError
        Listing the kinds, or if this processor has no products with 8 bits.
    """
    kinds: tuple[Activations, ...] = get_args(Activations)
    found = one_of(text, kinds, "--activations", hint="int16 is the more exact one, and the default")
    if found == "int8" and (reason := int8_rejects()) is not None:
        raise UsageError(f"--activations int8: {reason}; allowed: int16", hint="leave --activations out")
    return found


def resolve_step(
    config: Config,
    device: str,
    kind: BackendKind = "auto",
    *,
    graphs: GraphMode = "on",
    activations: Activations = "int16",
    notify: Notify | None = None,
) -> Callable[[Any], Step]:
    """Choose how a model of this config runs, before its weights are touched; return the maker of its step.

    Parameters
    ----------
    device
        torch's device type.
    graphs
        Whether decode steps on CUDA are recorded as graphs.
    activations
        What the native step on the CPU multiplies quantized weights with.
    notify
        Where it is reported that they are not, though they should; a logger's warning by default.

    Raises
    ------
    UsageError
        If the native step is asked for and cannot run it, with the reason; if 8-bit activations are asked of another.
    """
    if device != "cuda" and kind != "eager":
        reason = native_rejects(config, device)
        if reason is None:
            return partial(NativeStep, activations=activations)
        if kind == "native":
            raise _no_native(reason)
    if activations == "int8":
        raise UsageError(
            "--activations int8 is for the native backend on the CPU, which does not run this model here",
            hint="leave --activations out",
        )
    return _transformers_step(config, device, kind, graphs, notify)


def _transformers_step(
    config: Config, device: str, kind: BackendKind, graphs: GraphMode, notify: Notify | None
) -> Callable[[Any], Step]:
    """Choose the maker of a Transformers model's step."""
    from hybridkv.hf.step import EagerStep, GraphStep, fused, graph

    decoder: Callable[[Any], EagerStep | LayersStep] = EagerStep
    native = False
    if device == "cuda" and kind != "eager":
        reasons = [rejects_packed(config, device), fused.rejects(config, device)]
        native = reasons[0] is None
        if None in reasons:
            decoder = partial(_on_card, kind)
        elif kind == "native":
            raise _no_native(str(reasons[0]))
    if device != "cuda" or graphs == "off":
        return decoder
    tell = graph.LOG.warning if notify is None else notify
    if (reason := graph.rejects(config, device, native=native)) is not None:
        tell(f"decoding is not recorded as a graph: {reason}")
        return decoder

    def recorded(model: LanguageModel) -> GraphStep:
        return GraphStep(decoder(model), notify=tell)

    return recorded


def _on_card(kind: BackendKind, model: LanguageModel) -> EagerStep | LayersStep:
    """Build the step on CUDA: from a model's records, or with a Transformers model's parameters.

    Raises
    ------
    UsageError
        If the native step is asked for and cannot run a Transformers model.
    """
    if isinstance(model, NativeModel):
        from hybridkv.native.cuda_step import PackedStep  # imports triton

        return PackedStep(model)
    from hybridkv.hf.step import EagerStep, FusedStep, fused

    reason = fused.rejects(model.config, "cuda")
    if reason is None:
        return FusedStep(model)
    if kind == "native":
        raise _no_native(f"{reason} from a model directory; from a GGUF file it runs all native families")
    return EagerStep(model)


def _no_native(reason: str) -> UsageError:
    return UsageError(f"the native step cannot run this model: {reason}", hint="use --backend eager, or auto")
