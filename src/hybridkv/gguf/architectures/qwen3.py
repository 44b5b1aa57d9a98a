"""`qwen3`: dense Qwen3 models, whose query and key heads are normalised. No conversions."""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures.layers import head_fields, head_keys
from hybridkv.gguf.architectures.llama import DENSE, FEED_FORWARD, REALS, SIZES
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, Keys, embeddings
from hybridkv.gguf.architectures.rope import SETTINGS, rope_fields, rope_keys, rope_problem
from hybridkv.gguf.metadata import Metadata


def fields(meta: Metadata) -> Fields:
    """Return what `SIZES` cannot say."""
    heads = head_fields(meta)
    return {
        **heads,
        "rope_parameters": rope_fields(meta, heads["head_dim"]),
        "attention_bias": meta.has_tensor("blk.0.attn_q.bias"),
    }


def keys(config: Config) -> Keys:
    """Return the metadata that `SIZES` leaves out."""
    return {**head_keys(config), **rope_keys(config, config.head_dim)}


def problem(config: Config) -> str | None:
    """Return what cannot be written of a config."""
    return "some of its layers have a sliding window" if config.sliding_window else rope_problem(config)


ARCHITECTURE = Architecture(
    name="qwen3",
    config_class="Qwen3Config",
    model_class="Qwen3ForCausalLM",
    model_type="qwen3",
    sizes=SIZES,
    reals=REALS,
    fields=fields,
    keys=keys,
    tensors=MappingProxyType({"model": embeddings(), "layer": DENSE + FEED_FORWARD}),
    suits=problem,
    settings=SETTINGS,
    source="gguf-py constants.py; llama.cpp conversion/qwen.py",
)
