"""Whether the native step on the CPU runs a model: answered from its config, without Transformers' models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from hybridkv.kernels import cpu_native
from hybridkv.kernels.cuda import available as kernels_available
from hybridkv.kernels.cuda.packed_layout import PACKED
from hybridkv.kernels.cuda.packed_layout import rejects as packed_rejects
from hybridkv.model import Attention, DeltaNet, Experts, Gated, Part, graph_of
from hybridkv.model import rejects as graph_rejects
from hybridkv.model.protocols import Config
from hybridkv.native import cpu as lowering

EngineKind = Literal["auto", "native", "eager"]

_ROPES = ("default", "linear", "llama3")
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
    if (reason := graph_rejects(config)) is not None:
        return reason
    graph = graph_of(config)
    branches = (branch for block in graph.blocks for branch in block.branches)
    if any(b.norm is None or b.after is not None or b.scale != 1 or len(b.parts) != 1 for b in branches):
        return "layers whose branches are not one part behind a norm"
    text = config.get_text_config(decoder=True)
    return next((reason for reason in (_part_rejects(part, text) for part in graph.parts) if reason is not None), None)


def _part_rejects(part: Part, text: Any) -> str | None:
    """Explain why the kernels on CUDA do not compute a part with packed weights."""
    if isinstance(part, Attention):
        plain = part.biased == "none" and not part.norms_together and part.q_norm is not None
        if not plain or part.rope is None or part.rope.pairs != "halves" or part.rope.kind is not None:
            return "attention that has a bias, no norms of heads, or RoPE of another kind"
        return None if text.rope_parameters["rope_type"] in _ROPES else "RoPE that scales cosines and sines"
    if isinstance(part, DeltaNet):
        usual = isinstance(part.qkv, str) and not part.joined_rates and part.update_scale == 1
        return None if usual else "delta nets whose projections are joined by heads"
    if isinstance(part, Gated):
        return None if part.act == "silu" and not part.biased else "feed-forwards with a bias or without SiLU"
    if isinstance(part, Experts):
        c = part.choice
        usual = c.gating == "softmax" and c.bias is None and c.n_groups == 1 and c.scale == 1 and part.gated
        shared = isinstance(part.shared, Gated) and part.weighed
        return None if usual and shared and not part.latent else "experts that are not Qwen's with a shared one"
    return f"knows no {type(part).__name__} on cuda"


def rejects_types(config: Config, types: Mapping[str, str]) -> str | None:
    """Explain why CUDA does not hold a file's types, by tensor, packed for a model that `rejects_packed` takes."""
    graph = graph_of(config)
    for index, block in enumerate(graph.blocks):
        for part in (part for branch in block.branches for part in branch.parts):
            if not isinstance(part, Experts) or not isinstance(part.shared, Gated):
                continue
            up = (part.gate_up,) if f"blk.{index}.{part.gate_up}" in types else (part.gate, part.up)
            pairs = (up, (part.shared.gate, part.shared.up), (part.down,), (part.shared.down,))
            for names in pairs:
                found = {types.get(f"blk.{index}.{name}", "none") for name in names}
                if len(found) > 1 or not found <= set(PACKED):
                    return f"experts of types {', '.join(sorted(found))}, layer {index}"
    known = {*PACKED, *_FLOATS}
    return next((packed_rejects(kind) for kind in types.values() if kind not in known), None)


def rejects_encoded(config: Config) -> str | None:
    """Explain why CUDA does not hold a model's matrices as int8 or int4, which `rejects_packed` takes."""
    graph = graph_of(config)
    for part in graph.parts:
        widths = (graph.hidden, part.width) if isinstance(part, Experts) else ()
        if any(width % 32 for width in widths):
            return f"experts with rows of {' and '.join(map(str, widths))} numbers, which are no whole blocks of 32"
    return None


def multiplies(config: Config) -> bool:
    """Check whether a directory's matrices are multiplied by numbers of the config, which leaves them float32."""
    from hybridkv.gguf.convert import find_tables

    tables = find_tables(config.get_text_config(decoder=True))
    return any(rule.scale is not None for rules in tables.tensors.values() for rule in rules)


def runs_natively(config: Config, device: str, engine: EngineKind = "auto") -> bool:
    """Check whether the native step runs a model, so that no Transformers class is needed for it."""
    return engine != "eager" and rejects(config, device.partition(":")[0]) is None
