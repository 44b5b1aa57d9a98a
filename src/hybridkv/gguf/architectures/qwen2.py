"""`qwen2`: dense Qwen2 and Qwen2.5 models, with biases on queries, keys and values. No conversions."""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures.layers import head_keys, kv_heads, spread_head_dim
from hybridkv.gguf.architectures.llama import DENSE, FEED_FORWARD, REALS, SIZES
from hybridkv.gguf.architectures.qwen3 import problem
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, Keys, embeddings
from hybridkv.gguf.architectures.rope import SETTINGS, rope_fields, rope_keys
from hybridkv.gguf.metadata import Metadata


def _fields(meta: Metadata) -> Fields:
    return {"num_key_value_heads": kv_heads(meta), "rope_parameters": rope_fields(meta, spread_head_dim(meta))}


def _keys(config: Config) -> Keys:
    return {**head_keys(config), **rope_keys(config, config.hidden_size // config.num_attention_heads)}


ARCHITECTURE = Architecture(
    name="qwen2",
    config_class="Qwen2Config",
    model_class="Qwen2ForCausalLM",
    model_type="qwen2",
    sizes=SIZES,
    reals=REALS,
    fields=_fields,
    keys=_keys,
    tensors=MappingProxyType({"model": embeddings(), "layer": DENSE + FEED_FORWARD}),
    suits=problem,
    settings=SETTINGS,
    source="gguf-py constants.py; llama.cpp conversion/qwen.py",
)
