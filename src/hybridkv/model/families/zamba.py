"""Zamba2: Mamba-2 layers, some of which read what a shared transformer block adds to their input."""

from __future__ import annotations

from typing import Any

from hybridkv.model.families.parts import (
    Family,
    act_rejects,
    attention,
    bias_rejects,
    first,
    gated,
    graph,
    head_dim,
    norm,
    rope_rejects,
)
from hybridkv.model.graph import Block, Branch, ModelGraph
from hybridkv.model.layers import Adapter, Attention, Gated, Mamba2, Norm, Shared


def _rejects(c: Any) -> str | None:
    adapted, n_kv_heads = c.use_shared_attention_adapter, c.num_key_value_heads
    return first(
        act_rejects(c, wanted="gelu"),
        rope_rejects(c) if c.use_mem_rope else None,
        bias_rejects(c, "add_bias_linear"),
        f"adapters of {n_kv_heads} KV heads beside {c.num_attention_heads} query heads"
        if adapted and n_kv_heads != c.num_attention_heads
        else None,
        f"{c.num_mem_blocks} shared blocks" if c.num_mem_blocks < 1 else None,
        f"Mamba-2 heads of {c.mamba_headdim} values that do not fill {_inner(c)}"
        if c.n_mamba_heads * c.mamba_headdim != _inner(c)
        else None,
    )


def shared_owners(c: Any) -> dict[int, int]:
    """Map each layer with a shared block to the layer that holds the block's weights: the first that uses it."""
    layers = [layer for layer, kind in enumerate(c.layer_types) if kind == "hybrid"]
    return {layer: layers[use % c.num_mem_blocks] for use, layer in enumerate(layers)}


def _inner(c: Any) -> int:
    return int(c.mamba_expand * c.hidden_size)


def _zamba2(c: Any) -> ModelGraph:
    """Build Zamba2's graph: use i of a shared block is of block `i % num_mem_blocks`, with adapters of its own.

    Time steps have no bounds, as in the original code.
    """
    mamba = Mamba2(
        n_heads=c.n_mamba_heads,
        n_groups=c.mamba_ngroups,
        head_dim=c.mamba_headdim,
        state_dim=c.mamba_d_state,
        kernel=c.mamba_d_conv,
        # An epsilon of its own. Source: transformers, modeling_zamba2.py.
        norm=Norm("ssm_norm.weight", 1e-5),
    )
    before = norm(c, "attn_norm.weight")
    plain = Block((Branch(before, (mamba,)),))
    blocks = [plain] * len(c.layer_types)
    for use, (layer, owner) in enumerate(shared_owners(c).items()):
        adapter = Adapter(c.adapter_rank, use)
        shared = Shared(
            owner=owner,
            attn_norm=norm(c, "attn_norm.weight"),
            attention=attention(
                c,
                pairs="halves" if c.use_mem_rope else None,
                scale=(head_dim(c) / 2) ** -0.5,
                adapter=adapter if c.use_shared_attention_adapter else None,
            ),
            ffn_norm=norm(c, "ffn_norm.weight"),
            ffn=gated(c, act="gelu_erf", adapter=adapter),
            norm=before,
            mixer=mamba,
        )
        blocks[layer] = Block((Branch(None, (shared,)),))
    return graph(c, blocks)


FAMILIES = {"zamba2": Family(_rejects, _zamba2, (Mamba2, Attention, Gated, Shared), ("linear_attention", "hybrid"))}
