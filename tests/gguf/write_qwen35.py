"""Writes GGUF files for the tests: Transformers models of the Qwen3.5 family, by way of gguf-py.

A `Draft` is a file before it is written: metadata and float32 tensors that a test may spoil. The
conversions are spelled as the public converters spell them (reshape and transpose), not as the loader
does (index arrays), so that the two check each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType
from gguf.quants import quantize
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

Key = int | float | bool | str | list[int] | list[str]

LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.norm.weight": "ssm_norm.weight",
}
MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass
class Draft:
    """A GGUF file before it is written."""

    architecture: str = "qwen35"
    keys: dict[str, Key] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def write(
        self,
        path: Path,
        type_of: Callable[[str], GGMLQuantizationType] = lambda name: GGMLQuantizationType.F32,
    ) -> Path:
        """Write the file; vectors and the convolution stay float32, as converters leave them."""
        writer = GGUFWriter(path, self.architecture)
        for key, value in self.keys.items():
            add_key(writer, key, value)
        for name, values in self.tensors.items():
            plain = values.ndim == 1 or "conv1d" in name
            type_ = GGMLQuantizationType.F32 if plain else type_of(name)
            writer.add_tensor(name, quantize(values, type_), raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def add_key(writer: GGUFWriter, key: str, value: Key) -> None:
    if isinstance(value, list):
        writer.add_key_value(key, value, GGUFValueType.ARRAY)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def tiny_model(n_key: int = 2, n_value: int = 4, *, tied: bool = True, seed: int = 0) -> Qwen3_5ForCausalLM:
    """Return a random model with one period of layers; nothing in it is left at a neutral value."""
    config = Qwen3_5TextConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=n_key,
        linear_num_value_heads=n_value,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        tie_word_embeddings=tied,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=256,
    )
    torch.manual_seed(seed)
    model = Qwen3_5ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def draft(model: Qwen3_5ForCausalLM) -> Draft:
    """Return the GGUF file of a model."""
    config = model.config
    rope = config.rope_parameters
    numbers: dict[str, Key] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(config.head_dim * rope["partial_rotary_factor"]),
        "rope.dimension_sections": [*rope["mrope_section"], 0],
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
    }
    keys: dict[str, Key] = {
        "general.name": "tiny",
        **{f"qwen35.{key}": value for key, value in numbers.items()},
    }
    tensors = {}
    for name, value in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            tensors[gguf_name(name)] = to_gguf(name, value.float(), config).numpy()
    return Draft("qwen35", keys | tokenizer_keys(), tensors)


def gguf_name(name: str) -> str:
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}"


def to_gguf(name: str, value: torch.Tensor, config: Qwen3_5TextConfig) -> torch.Tensor:
    n_key, n_value = config.linear_num_key_heads, config.linear_num_value_heads
    width = config.linear_value_head_dim

    def tiled(heads: torch.Tensor, width: int) -> torch.Tensor:
        split = heads.reshape(n_key, n_value // n_key, width, -1)
        return split.transpose(0, 1).reshape(heads.shape)

    if name.endswith("conv1d.weight"):
        value = value.squeeze(1)
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        qk, v = value.split([2 * n_key * config.linear_key_head_dim, n_value * width])
        return torch.cat([qk, tiled(v, width)])
    if name.endswith("in_proj_z.weight"):
        return tiled(value, width)
    if name.endswith(("in_proj_a.weight", "in_proj_b.weight", "dt_bias")):
        return tiled(value, 1)
    if name.endswith("A_log"):
        return tiled(-value.exp(), 1)
    if name.endswith("out_proj.weight"):
        return tiled(value.T, width).T.contiguous()
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return value + 1
    return value


def tokenizer_keys(pre: str = "gpt-2") -> dict[str, Key]:
    """Return a byte-level vocabulary of 288 tokens: bytes, three special, merges, and unused ones."""
    alphabet = list(bytes_to_unicode().values())
    special = ["<|begin|>", "<|end|>", "<think>"]
    merges = ["Ġ t", "h e", "Ġt he", "i n", "1 2", "12 3", "l l", "' ll", "Ġ Ġ"]
    tokens = [*alphabet, *special, *(merge.replace(" ", "") for merge in merges)]
    types = [
        *(TokenType.NORMAL for _ in alphabet),
        *(TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED),
        *(TokenType.NORMAL for _ in merges),
    ]
    unused = 288 - len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{index}]" for index in range(unused))],
        "tokenizer.ggml.token_type": [int(type_) for type_ in [*types, *[TokenType.UNUSED] * unused]],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.padding_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
    }
