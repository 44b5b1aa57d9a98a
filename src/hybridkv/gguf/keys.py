"""The metadata keys that no architecture's table reads: harmless ones, those that must be neutral, and unknown ones.

Owns the two tables below, which are the same for all architectures: a key that an architecture's own file reads is
never looked up here. What a key of another kind of model says is refused unless its value means nothing, since the
model that the file describes would not be the one that is computed. Does not own reading keys (`metadata.py`,
`architectures/`). Called by `load.py` once the config's fields are read.

Source: gguf-py constants.py (`Keys`); llama.cpp, src/llama-arch.cpp (`LLM_KV_NAMES`) and src/llama-model.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from hybridkv.gguf.architectures.layers import head_dim
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.reader import Value

HARMLESS: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "the rows of the embedding say it",
        "tensor_data_layout": "names the layout that this architecture's tensors have anyway",
        "feed_forward_length": "no layer is dense, and the experts' width has its own key",
        "expert_gating_func": "no layer has experts",
        "expert_weights_norm": "no layer has experts",
        "expert_weights_scale": "no layer has experts",
        "norm_top_k_prob": "no layer has experts",
        "expert_shared_count": "the shared expert's width says it",
        "decoder_start_token_id": "an encoder-decoder's",
        "full_attention_interval": "the layers' kinds are told by another key",
        "n_deepstack_layers": "concerns images",
        "deepstack_mapping": "concerns images",
        "attention.layer_norm_epsilon": "no layer has a LayerNorm; the RMSNorm's key is read",
        "rope.dimension_sections": "all axes of a text's positions are equal",
        "rope.mrope_section": "all axes of a text's positions are equal",
        "rope.mrope_interleaved": "all axes of a text's positions are equal",
        "rope.freq_base_swa": "no layer has a sliding window",
        "rope.scaling.finetuned": "says how the model was trained, not what it computes",
        "rope.scaling.original_context_length": "YaRN's, and the scaling is another",
        "rope.scaling.yarn_log_multiplier": "YaRN's, and the scaling is another",
        "rope.scaling.yarn_ext_factor": "YaRN's, and the scaling is another",
        "rope.scaling.yarn_attn_factor": "YaRN's, and the scaling is another",
        "rope.scaling.yarn_beta_fast": "YaRN's, and the scaling is another",
        "rope.scaling.yarn_beta_slow": "YaRN's, and the scaling is another",
        "image_token_id": "concerns images",
        "vision_start_token_id": "concerns images",
        "vision_end_token_id": "concerns images",
    }
)
"""Keys that do not change what is computed here, and why."""

HARMLESS_PREFIXES: Mapping[str, str] = MappingProxyType(
    {"vision.": "the image encoder's, which is not loaded", "audio.": "the audio encoder's, which is not loaded"}
)


@dataclass(frozen=True, slots=True)
class Neutral:
    """A key that is not computed, and the values at which there is nothing to compute.

    Parameters
    ----------
    expected
        The value that is allowed, and what others ask for.
    values
        All that are neutral.
    holds
        Says whether a value is neutral where that depends on the rest of the file.
    """

    expected: str
    values: tuple[float, ...] = (0,)
    holds: Callable[[Metadata, Value], bool] | None = None

    def suits(self, meta: Metadata, value: Value) -> bool:
        """Check whether a value is neutral; an array or a list is if all its elements are."""
        if self.holds is not None:
            return self.holds(meta, value)
        if isinstance(value, np.ndarray):
            return bool(np.isin(value, self.values).all())
        return not value if isinstance(value, str | list) else value in self.values


def _as_key_length(meta: Metadata, value: Value) -> bool:
    return isinstance(value, int) and value == head_dim(meta)


def _as_rope_dimensions(meta: Metadata, value: Value) -> bool:
    key = "rope.dimension_count"
    return isinstance(value, int) and value == (meta.value(key) if meta.has(key) else head_dim(meta))


def _as_embedding(meta: Metadata, value: Value) -> bool:
    return isinstance(value, int) and value == meta.integer("embedding_length")


def _as_feed_forward(meta: Metadata, value: Value) -> bool:
    width = meta.value("feed_forward_length")
    return isinstance(value, int) and value in (0, width if isinstance(width, int) else 0)


def _as_root(meta: Metadata, value: Value) -> bool:
    return isinstance(value, float) and (value == 0 or math.isclose(value, head_dim(meta) ** -0.5, rel_tol=1e-5))


def _beyond_context(meta: Metadata, value: Value) -> bool:
    return isinstance(value, int) and (value == 0 or value >= meta.integer("context_length", high=2**31 - 1))


_EMBEDDING_MODEL = "this is an embedding model, and only models that generate text run here"
_MLA = "0: multi-head latent attention is not computed in this architecture"
_INDEXER = "0: an indexer that chooses rows is not computed in this architecture"
_EXPERTS = "0: this architecture has no experts here"
_GROUPS = "0: groups of experts are not computed in this architecture"
_CLASSIFIER = "none: this is a classifier, and only models that generate text run here"
_RWKV = "0: this is a key of RWKV models"
_AUDIO = "0: this is a key of audio decoders"
_GEMMA3N = "0: this is a key of Gemma 3n models"
_SSM = "0: this architecture has no recurrent layers of that kind"
_WINDOW = "0, or no less than the context: sliding windows are not computed in this architecture"

NEUTRAL: Mapping[str, Neutral] = MappingProxyType(
    {
        "attention.causal": Neutral(f"true: {_EMBEDDING_MODEL}", (1,)),
        "pooling_type": Neutral(f"0 or -1: {_EMBEDDING_MODEL}", (0, -1)),
        "embedding_length_out": Neutral(f"the embedding's width: {_EMBEDDING_MODEL}", holds=_as_embedding),
        **{f"dense_{layer}_feat_{end}": Neutral(f"0: {_EMBEDDING_MODEL}") for layer in (2, 3) for end in ("in", "out")},
        "classifier.output_labels": Neutral(_CLASSIFIER),
        "classifier.pooling_type": Neutral(_CLASSIFIER, (0, -1)),
        "features_length": Neutral(_AUDIO),
        **{
            f"{net}.{key}": Neutral(_AUDIO)
            for net in ("posnet", "convnext")
            for key in ("embedding_length", "block_count")
        },
        "attention.group_norm_epsilon": Neutral(_AUDIO),
        "attention.group_norm_groups": Neutral(_AUDIO),
        "decoder_block_count": Neutral("0: encoder-decoder models do not run here"),
        "attention.relative_buckets_count": Neutral("0: relative position buckets are not computed here"),
        "attention.max_alibi_bias": Neutral("0: ALiBi is not computed here"),
        "attention.clamp_kqv": Neutral("0: clamped queries, keys and values are not computed here"),
        "attention.scale": Neutral(
            "1 / sqrt(head dim): this architecture has no other scale of scores", holds=_as_root
        ),
        "attention.output_scale": Neutral("1: scaled outputs of attention are not computed here", (0, 1)),
        "attention.value_scale": Neutral("1: scaled values are not computed here", (0, 1)),
        "attention.temperature_length": Neutral("0: a temperature by position is not computed here"),
        "attention.temperature_scale": Neutral("0: a temperature by position is not computed here"),
        "attention.shared_kv_layers": Neutral("0: layers that share K and V are not computed here"),
        "attention.recurrent_layers": Neutral("false in all layers: this architecture's are told by another key"),
        "attention.rope_pattern": Neutral("true in all layers: RoPE is computed in every attention layer", (1,)),
        "attention.sliding_window": Neutral(_WINDOW, holds=_beyond_context),
        "attention.sliding_window_pattern": Neutral("0: sliding windows are not computed in this architecture"),
        "attention.key_length_swa": Neutral("the head dim: layers with another are not computed", holds=_as_key_length),
        "attention.value_length_swa": Neutral(
            "the head dim: layers with another are not computed", holds=_as_key_length
        ),
        "rope.dimension_count_swa": Neutral(
            "that of the other layers: no other is computed", holds=_as_rope_dimensions
        ),
        "rope.scaling.alpha": Neutral("0: NTK-aware scaling by alpha is not computed here"),
        **{
            f"attention.{key}": Neutral(_MLA)
            for key in (
                "q_lora_rank",
                "kv_lora_rank",
                "kv_lora_rank_swa",
                "key_length_mla",
                "key_length_mla_swa",
                "value_length_mla",
                "value_length_mla_swa",
                "output_lora_rank",
                "output_group_count",
            )
        },
        **{
            f"attention.indexer.{key}": Neutral(_INDEXER)
            for key in ("head_count", "key_length", "top_k", "block_size", "local_blocks", "types", "kpool")
        },
        **{f"attention.{key}_lora_rank": Neutral(_RWKV) for key in ("decay", "iclr", "value_residual_mix", "gate")},
        **dict.fromkeys(
            (
                "rescale_every_n_layers",
                "time_mix_extra_dim",
                "time_decay_extra_dim",
                "token_shift_count",
                "wkv.head_size",
            ),
            Neutral(_RWKV),
        ),
        "kda.head_dim": Neutral(_SSM),
        **{
            f"ssm.{key}": Neutral(_SSM)
            for key in ("conv_kernel", "inner_size", "state_size", "time_step_rank", "dt_b_c_rms")
        },
        "ssm.group_count": Neutral("1: this architecture has no groups of heads", (0, 1)),
        "ssm.v_head_reordered": Neutral(_SSM),
        "shortconv.l_cache": Neutral("0: this architecture has no short convolutions"),
        "use_parallel_residual": Neutral("false: attention and feed-forward follow each other in this architecture"),
        "swin_norm": Neutral("false: other norms are not computed here"),
        "logit_scale": Neutral("1: scaled logits are not computed in this architecture", (0, 1)),
        "residual_scale": Neutral("1: scaled residuals are not computed in this architecture", (0, 1)),
        "embedding_scale": Neutral("1: scaled embeddings are not computed in this architecture", (0, 1)),
        "attn_logit_softcapping": Neutral("0: capped scores are not computed in this architecture"),
        "router_logit_softcapping": Neutral("0: a router's capped logits are not computed here"),
        "final_logit_softcapping": Neutral("0: capped logits are not computed in this architecture"),
        "leading_dense_block_count": Neutral("0: all layers have experts, or none has, in this architecture"),
        "interleave_moe_layer_step": Neutral("1: all layers have experts, or none has, in this architecture", (0, 1)),
        "moe_every_n_layers": Neutral("1: all layers have experts, or none has, in this architecture", (0, 1)),
        "expert_count": Neutral(_EXPERTS),
        "expert_used_count": Neutral(_EXPERTS),
        "expert_feed_forward_length": Neutral("what `feed_forward_length` says, or 0", holds=_as_feed_forward),
        "expert_shared_feed_forward_length": Neutral("0: this architecture has no shared expert"),
        "expert_chunk_feed_forward_length": Neutral("0: experts in chunks are not computed here"),
        "expert_latent_length": Neutral("0: experts in a narrower space are not computed in this architecture"),
        "moe_latent_size": Neutral("0: experts in a narrower space are not computed in this architecture"),
        "expert_group_count": Neutral(_GROUPS, (0, 1)),
        "expert_group_used_count": Neutral(_GROUPS, (0, 1)),
        "expert_group_scale": Neutral(_GROUPS, (0, 1)),
        "experts_per_group": Neutral(_GROUPS),
        "swiglu_clamp_exp": Neutral("0: clamped activations are not computed here"),
        "swiglu_clamp_shexp": Neutral("0: clamped activations are not computed here"),
        "activation_sparsity_scale": Neutral(_GEMMA3N),
        "altup.active_idx": Neutral(_GEMMA3N),
        "altup.num_inputs": Neutral(_GEMMA3N),
        "embedding_length_per_layer_input": Neutral(_GEMMA3N),
    }
)
"""Keys that are not computed unless an architecture's own file reads them."""


def check_unread(meta: Metadata) -> None:
    """Refuse keys that nothing has read and that ask for something which is not computed.

    Raises
    ------
    ModelFileError
        For the first such key.
    """
    for name in meta.unread():
        rule = NEUTRAL.get(name)
        if rule is not None and not rule.suits(meta, meta.header.metadata[meta.key(name)]):
            meta.expected(name, rule.expected)


def unknown_keys(meta: Metadata) -> tuple[str, ...]:
    """Return a notice for each key of the architecture that is in no table, here or there.

    What it asks for is not known; llama.cpp passes over such keys too, without a word.
    """
    prefixes = tuple(HARMLESS_PREFIXES)
    names = [
        name for name in meta.unread() if name not in HARMLESS and name not in NEUTRAL and not name.startswith(prefixes)
    ]
    return tuple(
        f"metadata key {meta.key(name)!r} is not known and was passed over: {meta.shown(name)}" for name in names
    )
