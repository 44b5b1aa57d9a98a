"""Zamba2, which is read from directories alone: llama.cpp has no architecture of it.

Names are ours where GGUF has none: a shared block's tensors and adapters are `blk.N.shared.*` of the first layer that
uses it, where Transformers has them too.
"""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures import mamba2
from hybridkv.gguf.architectures.record import Config, Tables, TensorRule, embeddings
from hybridkv.model.families.zamba import shared_owners

_SHARED = (
    TensorRule("shared.attn_norm.weight", "shared_transformer.input_layernorm.weight"),
    TensorRule("shared.attn_q.weight", "shared_transformer.self_attn.q_proj.weight"),
    TensorRule("shared.attn_k.weight", "shared_transformer.self_attn.k_proj.weight"),
    TensorRule("shared.attn_v.weight", "shared_transformer.self_attn.v_proj.weight"),
    TensorRule("shared.attn_output.weight", "shared_transformer.self_attn.o_proj.weight"),
    TensorRule("shared.ffn_norm.weight", "shared_transformer.pre_ff_layernorm.weight"),
    TensorRule(
        ("shared.ffn_gate.weight", "shared.ffn_up.weight"), "shared_transformer.feed_forward.gate_up_proj.weight"
    ),
    TensorRule("shared.ffn_down.weight", "shared_transformer.feed_forward.down_proj.weight"),
)


def _mixer(layer: str) -> tuple[TensorRule, ...]:
    """List the rules of a layer's own norm and Mamba-2, by what their names start with."""
    mixer = mamba2.mixer(
        f"{layer}mamba", "n_mamba_heads", "mamba_ngroups", lambda c: int(c.mamba_expand * c.hidden_size)
    )
    return TensorRule("attn_norm.weight", f"{layer}input_layernorm.weight"), *mixer


def _layers(c: Config) -> list[tuple[str, ...]]:
    owners = shared_owners(c)
    shared = {layer: ("hybrid", "shared", f"adapters of {layer}") for layer in owners.values()}
    return [shared.get(layer, (kind,)) for layer, kind in enumerate(c.layer_types)]


def _adapters(c: Config) -> dict[str, tuple[TensorRule, ...]]:
    """List the adapters of all uses of a block, which its first layer holds."""
    rules: dict[str, tuple[TensorRule, ...]] = {}
    for use, owner in enumerate(shared_owners(c).values()):
        name, block = f"adapters of {owner}", "shared_transformer."
        rules[name] = rules.get(name, ()) + tuple(
            TensorRule(
                f"shared.attn_{p}.lora_{ab}.{use}.weight", f"{block}self_attn.linear_{p}_adapter_list.{use}.{n}.weight"
            )
            for p in "qkv"
            for n, ab in enumerate("ab")
        )
        feed = f"{block}feed_forward.gate_up_proj_adapter_list.{use}"
        both = f"shared.ffn_gate.lora_b.{use}.weight", f"shared.ffn_up.lora_b.{use}.weight"
        rules[name] += (
            TensorRule(f"shared.ffn_gate.lora_a.{use}.weight", f"{feed}.0.weight"),
            TensorRule(both, f"{feed}.1.weight"),
        )
    return rules


TABLES = Tables(
    config_class="Zamba2Config",
    layers=_layers,
    tensors=MappingProxyType(
        {
            "model": embeddings(norm="final_layernorm"),
            "linear_attention": _mixer(""),
            "hybrid": (*_mixer("mamba_decoder."), TensorRule("shared_join.weight", "linear.weight")),
            "shared": _SHARED,
        }
    ),
    more=_adapters,
)
