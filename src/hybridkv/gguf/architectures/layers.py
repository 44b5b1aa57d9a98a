"""The metadata that several architectures share about their layers and heads: into fields, and back.

Does not own RoPE (`rope.py`) or tensors (`record.py`). Used by `architectures/*.py` and `load.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridkv.gguf.architectures.record import Config, Fields, Keys
from hybridkv.gguf.metadata import Metadata


def n_blocks(meta: Metadata) -> tuple[int, int]:
    """Return the number of blocks in the file and of layers in the model.

    Blocks of multi-token prediction follow the model's own and are counted as blocks.
    """
    blocks = meta.integer("block_count", high=len(meta.header.tensors))
    if not meta.has("nextn_predict_layers"):
        return blocks, blocks
    return blocks, blocks - meta.integer("nextn_predict_layers", low=0, high=blocks - 1)


def kv_heads(meta: Metadata) -> int:
    """Return the number of KV heads that all layers have, the query heads' where the file says none."""
    n_heads = meta.integer("attention.head_count")
    if meta.is_array("attention.head_count_kv"):
        n_kv_heads, attends = kv_heads_per_layer(meta)
        if not all(attends):
            meta.expected("attention.head_count_kv", "KV heads in all layers")
        return n_kv_heads
    n_kv_heads = meta.integer("attention.head_count_kv") if meta.has("attention.head_count_kv") else n_heads
    return checked_heads(meta, n_heads, n_kv_heads)


def kv_heads_per_layer(meta: Metadata) -> tuple[int, list[bool]]:
    """Return the number of KV heads, and per layer whether it attends: its count in the file is not zero."""
    blocks, layers = n_blocks(meta)
    counts = meta.integers("attention.head_count_kv", blocks)[:layers]
    distinct = set(counts) - {0}
    if len(distinct) != 1 or max(distinct) > meta.largest_dim:
        meta.expected("attention.head_count_kv", "one number of KV heads in all attention layers")
    n_heads = meta.integer("attention.head_count")
    return checked_heads(meta, n_heads, distinct.pop()), [count > 0 for count in counts]


def checked_heads(meta: Metadata, n_heads: int, n_kv_heads: int) -> int:
    """Return `n_kv_heads`, which must divide the query heads."""
    if n_heads % n_kv_heads:
        meta.fail(f"{n_heads} query heads are no multiple of {n_kv_heads} KV heads")
    return n_kv_heads


def head_dim(meta: Metadata) -> int:
    """Return the head dim that K and V share: said by the file, or the width spread over the heads."""
    size = meta.integer("embedding_length") // meta.integer("attention.head_count")
    if meta.has("attention.key_length"):
        size = meta.integer("attention.key_length")
    if meta.has("attention.value_length"):
        meta.integer("attention.value_length", low=size, high=size)
    if not size:
        meta.fail(f"{meta.integer('attention.head_count')} heads share {meta.integer('embedding_length')} values")
    return size


def spread_head_dim(meta: Metadata) -> int:
    """Return the head dim where it can only be the width spread over the heads, since the config has no other."""
    size = head_dim(meta)
    spread = meta.integer("embedding_length") // meta.integer("attention.head_count")
    if size != spread:
        meta.expected("attention.key_length", f"{spread}, the embedding's width over the heads")
    return size


def config_head_dim(config: Config) -> int:
    """Return the head dim of a config: its own, or the width spread over the heads where it has none."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def head_fields(meta: Metadata) -> Fields:
    """Return KV heads and head dim of a model that has one of each."""
    return {"num_key_value_heads": kv_heads(meta), "head_dim": head_dim(meta)}


def head_keys(config: Config, attends: Sequence[bool] | None = None) -> Keys:
    """Return the keys of KV heads, per layer if `attends` is given, and of head dims."""
    n_kv_heads = config.num_key_value_heads
    size = config_head_dim(config)
    return {
        "attention.head_count_kv": n_kv_heads if attends is None else [n_kv_heads * each for each in attends],
        "attention.key_length": size,
        "attention.value_length": size,
    }
