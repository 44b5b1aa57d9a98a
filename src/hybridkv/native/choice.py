"""The models that the native step on the CPU runs: answered from a config, without Transformers' models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from hybridkv.kernels import cpu_native
from hybridkv.kernels.cuda import available as kernels_available
from hybridkv.kernels.cuda.packed_layout import PACKED
from hybridkv.kernels.cuda.packed_layout import rejects as packed_rejects
from hybridkv.model import Experts, graph_of
from hybridkv.model import rejects as graph_rejects
from hybridkv.model.protocols import Config
from hybridkv.native import cpu as lowering

BackendKind = Literal["auto", "native", "eager"]

_FLOATS = ("f32", "f16", "bf16")


def rejects(config: Config, device: str) -> str | None:
    """Explain why the native step cannot run a model of this config on this type of device; None if it can."""
    if (missing := cpu_native.available()) is not None:
        return missing
    if device != "cpu":
        return f"runs on cpu, not on {device}"
    if getattr(config, "quantization_config", None) is not None:
        return "weights that another program quantized"
    reason = graph_rejects(config)
    return lowering.rejects(graph_of(config)) if reason is None else reason


def rejects_packed(config: Config, device: str) -> str | None:
    """Explain why no step with packed weights runs a model of this config on this type of device; None if one does."""
    if device != "cuda":
        return f"runs on cuda, not on {device}"
    if (missing := kernels_available(device)) is not None:
        return missing
    if getattr(config, "quantization_config", None) is not None:
        return "weights that another program quantized"
    return graph_rejects(config)


def rejects_types(config: Config, types: Mapping[str, str]) -> str | None:
    """Explain why CUDA does not hold a file's types, by tensor, packed for a model that `rejects_packed` takes."""
    graph = graph_of(config)
    for index, block in enumerate(graph.blocks):
        for part in (part for branch in block.branches for part in branch.parts):
            if not isinstance(part, Experts) or f"blk.{index}.{part.gate_up}" in types or not part.gated:
                continue
            found = {types.get(f"blk.{index}.{name}", "none") for name in (part.gate, part.up)}
            if len(found) > 1:
                return f"experts whose gates and what they gate are of types {', '.join(sorted(found))}, layer {index}"
    known = {*PACKED, *_FLOATS}
    return next((packed_rejects(kind) for kind in types.values() if kind not in known), None)


def rejects_encoded(config: Config) -> str | None:
    """Explain why CUDA does not hold a model's matrices as int8 or int4, which `rejects_packed` takes."""
    graph = graph_of(config)
    for part in graph.parts:
        widths = (graph.hidden, part.width) if isinstance(part, Experts) else ()
        if any(width % 32 for width in widths):
            return f"experts with rows of {' and '.join(map(str, widths))} values, which are no whole blocks of 32"
    return None


def multiplies(config: Config) -> bool:
    """Check whether a directory's matrices are multiplied by factors of the config, which leaves them float32."""
    from hybridkv.gguf.convert import find_tables

    tables = find_tables(config.get_text_config(decoder=True))
    return any(rule.scale is not None for rules in tables.tensors.values() for rule in rules)


def runs_natively(config: Config, device: str, backend: BackendKind = "auto") -> bool:
    """Check whether the native step runs a model, so that no Transformers class is needed for it."""
    return backend != "eager" and rejects(config, device.partition(":")[0]) is None
