"""Whether the native step on the CPU runs a model: answered from its config, without Transformers' models."""

from __future__ import annotations

from typing import Any, Literal

from hybridkv.kernels import cpu_native
from hybridkv.model import graph_of
from hybridkv.model import rejects as graph_rejects
from hybridkv.native import cpu as lowering

EngineKind = Literal["auto", "native", "eager"]


def rejects(config: Any, device: str) -> str | None:
    """Why the native step cannot run a model of this config on this type of device; None if it can."""
    if (missing := cpu_native.available()) is not None:
        return missing
    if device != "cpu":
        return f"runs on cpu, not on {device}"
    if getattr(config, "quantization_config", None) is not None:
        return "weights that another program quantized"
    reason = graph_rejects(config)
    return lowering.rejects(graph_of(config)) if reason is None else reason


def multiplies(config: Any) -> bool:
    """Whether a directory's matrices are multiplied by numbers of the config, which leaves them float32."""
    from hybridkv.gguf.convert import find_tables

    tables = find_tables(config.get_text_config(decoder=True))
    return any(rule.scale is not None for rules in tables.tensors.values() for rule in rules)


def runs_natively(config: Any, device: str, engine: EngineKind = "auto") -> bool:
    """Whether the native step runs a model, so that no Transformers class is needed for it."""
    return engine != "eager" and rejects(config, device.partition(":")[0]) is None
