"""`nemotron_h`: Nemotron-H, layers of one kind each: Mamba-2, attention or feed-forward.

How the file differs from Transformers' `NemotronHForCausalLM`: what kind a layer is follows from its KV heads and its
feed-forward width, both counted per layer: neither means Mamba. Query and key rows are interleaved as in `llama`,
though there is no RoPE. All norms are RMSNorms of one epsilon; llama.cpp insists on the key of LayerNorm's and prefers
that of RMSNorm's, so both are written and either is read. Transformers' class keeps a mixer's time steps above
`time_step_min`; the format has no place for that, and neither llama.cpp nor the original code does it.
"""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures import mamba2
from hybridkv.gguf.architectures.layers import checked_heads, head_dim, head_keys, n_blocks
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, Keys, TensorRule, embeddings, rotary_halves
from hybridkv.gguf.decode import Order
from hybridkv.gguf.metadata import Metadata

SIZES = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "mamba_num_heads": "ssm.time_step_rank",
    "ssm_state_size": "ssm.state_size",
    "n_groups": "ssm.group_count",
    "conv_kernel": "ssm.conv_kernel",
}
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_NO_LIMIT = 1e-30
"""For `time_step_min`, whose logarithm Transformers takes."""


def _query_rows(config: Config) -> Order:
    return rotary_halves(config.num_attention_heads, config.head_dim)


def _key_rows(config: Config) -> Order:
    return rotary_halves(config.num_key_value_heads, config.head_dim)


def _inner(config: Config) -> int:
    inner: int = config.mamba_num_heads * config.mamba_head_dim
    return inner


_NORM = TensorRule("attn_norm.weight", "norm.weight")
TENSORS = {
    "model": embeddings(embed="embeddings", norm="norm_f"),
    "linear_attention": (_NORM, *mamba2.mixer("mixer", "mamba_num_heads", "n_groups", _inner)),
    "full_attention": (
        _NORM,
        TensorRule("attn_q.weight", "mixer.q_proj.weight", rows=_query_rows),
        TensorRule("attn_k.weight", "mixer.k_proj.weight", rows=_key_rows),
        TensorRule("attn_v.weight", "mixer.v_proj.weight"),
        TensorRule("attn_output.weight", "mixer.o_proj.weight"),
    ),
    "mlp": (
        _NORM,
        TensorRule("ffn_up.weight", "mixer.up_proj.weight"),
        TensorRule("ffn_down.weight", "mixer.down_proj.weight"),
    ),
}


def _epsilon(meta: Metadata) -> float:
    """Return the epsilon of all norms: RMSNorm's of the two, where a file has both."""
    found = [meta.real(key) for key in _EPSILONS if meta.has(key)]
    return found[0] if found else meta.real(_EPSILONS[0])


def layer_fields(meta: Metadata, feed_forward: str) -> Fields:
    """Return heads and layer types; layers with a feed-forward width are of kind `feed_forward`."""
    meta.disregard("rope.")
    blocks, layers = n_blocks(meta)
    n_kv = meta.integers("attention.head_count_kv", blocks)[:layers]
    widths = meta.integers("feed_forward_length", blocks)[:layers]
    for key, counts in (("attention.head_count_kv", n_kv), ("feed_forward_length", widths)):
        if len(set(counts) - {0}) > 1 or max(counts) > meta.largest_dim:
            meta.expected(key, "one number in all layers that have any")
    if not any(n_kv):
        meta.expected("attention.head_count_kv", "at least one layer with KV heads")
    kinds = {(True, False): "full_attention", (False, True): feed_forward, (False, False): "linear_attention"}
    pairs = [(heads > 0, width > 0) for heads, width in zip(n_kv, widths, strict=True)]
    if (True, True) in pairs:
        meta.fail(f"layer {pairs.index((True, True))} has both KV heads and a feed-forward width")
    return {
        "time_step_min": _NO_LIMIT,
        "layer_norm_epsilon": _epsilon(meta),
        "layers_block_type": [kinds[each] for each in pairs],
        "num_key_value_heads": checked_heads(meta, meta.integer("attention.head_count"), max(n_kv)),
        "head_dim": head_dim(meta),
        "mamba_head_dim": mamba2.mixer_fields(meta)["head_dim"],
        "use_conv_bias": any(info.name.endswith("ssm_conv1d.bias") for info in meta.header.tensors),
        **({"intermediate_size": max(widths)} if max(widths) else {}),
    }


def keys(config: Config, width: int) -> Keys:
    """Return the metadata that `SIZES` leaves out, for feed-forward layers of this width."""
    kinds = config.layers_block_type
    return {
        **head_keys(config, [kind == "full_attention" for kind in kinds]),
        **mamba2.inner_keys(_inner(config)),
        **dict.fromkeys(_EPSILONS, float(config.layer_norm_epsilon)),
        "feed_forward_length": [width * (kind in ("mlp", "moe")) for kind in kinds],
    }


def problem(config: Config) -> str | None:
    """Return what cannot be written of a config."""
    if config.attention_bias or config.mlp_bias or config.mamba_proj_bias or config.use_bias:
        return "its projections have biases"
    if config.mlp_hidden_act != "relu2" or config.sliding_window:
        return "its feed-forward is no squared ReLU, or it has a sliding window"
    return None if "full_attention" in config.layers_block_type else "no layer attends"


def layers(config: Config) -> list[tuple[str, ...]]:
    """Return each layer's table."""
    return [(kind,) for kind in config.layers_block_type]


def _problem(config: Config) -> str | None:
    return "some of its layers have experts" if "moe" in config.layers_block_type else problem(config)


def derived(fields: Fields) -> Fields:
    """Return the kinds of layers in the words of other configs, and activations."""
    return {
        "layer_types": fields["layers_block_type"],
        "mamba_hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "sliding_window": None,
        "intermediate_size": 21504,  # the class's own, where no layer has a feed-forward
    }


ARCHITECTURE = Architecture(
    name="nemotron_h",
    config_class="NemotronHConfig",
    model_class="NemotronHForCausalLM",
    model_type="nemotron_h",
    sizes=SIZES,
    reals={},
    fields=lambda meta: layer_fields(meta, "mlp"),
    keys=lambda config: keys(config, config.intermediate_size),
    layers=layers,
    tensors=MappingProxyType(TENSORS),
    suits=_problem,
    derived=derived,
    source="gguf-py constants.py; llama.cpp conversion/nemotron.py and src/llama-model.cpp",
)
