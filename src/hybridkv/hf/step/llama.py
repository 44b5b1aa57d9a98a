"""`llama` and `qwen3`: attention and a SwiGLU in every layer, and nothing else; qwen3 normalises queries and keys.

Written down from Transformers' `LlamaForCausalLM` and `Qwen3ForCausalLM`. Dense models are the controls of what is
measured on hybrids, and so they run as fast.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybridkv.hf.step.record import Builder, Family

_ROPES = ("default", "linear", "llama3")  # whose angles do not depend on the length of the sequence


def _rejects(config: Any) -> str | None:
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r}, not silu"
    if config.rope_parameters["rope_type"] not in _ROPES:
        return f"RoPE of type {config.rope_parameters['rope_type']!r}; it knows {', '.join(_ROPES)}"
    if config.attention_bias or getattr(config, "mlp_bias", False):
        return "projections with a bias"
    if getattr(config, "use_sliding_window", False):
        return "layers with a sliding window"
    return None


def _build(model: Any, b: Builder) -> None:
    config = model.config.get_text_config(decoder=True)
    x, normed = b.buffer("x", config.hidden_size), b.buffer("normed", config.hidden_size)
    for index, layer in enumerate(model.model.layers):
        _norm(b, x, normed, layer.input_layernorm)
        _attention(b, index, config, layer.self_attn, normed, x)
        _norm(b, x, normed, layer.post_attention_layernorm)
        b.swiglu(layer.mlp, normed, x, config.intermediate_size)


def _build_head(model: Any, b: Builder) -> None:
    config = model.config.get_text_config(decoder=True)
    x = b.buffer("x", config.hidden_size)
    _norm(b, x, x, model.model.norm)
    b.linear(x, (model.lm_head, b.buffer("logits", config.vocab_size)))


def _norm(b: Builder, x: Tensor, dst: Tensor, norm: Any) -> None:
    b.rms_norm(x, dst, norm.weight.float(), norm.variance_epsilon)


def _attention(b: Builder, index: int, config: Any, attention: Any, normed: Tensor, x: Tensor) -> None:
    n_heads, n_kv, d = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    widths = {"q": n_heads, "k": n_kv, "v": n_kv, "out": n_heads}
    q, k, v, out = (b.buffer(f"attention_{name}", n * d) for name, n in widths.items())
    b.linear(normed, (attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v))
    heads = {name: b.heads(buffer, widths[name]) for name, buffer in zip(widths, (q, k, v, out), strict=True)}
    for name in ("q", "k"):
        if (norm := getattr(attention, f"{name}_norm", None)) is not None:
            _norm(b, heads[name], heads[name], norm)
        b.program.rope(heads[name], d)
    b.attend(index, heads["q"], heads["k"], heads["v"], heads["out"], attention.scaling)
    b.linear(out, (attention.o_proj, x), add=True)


LLAMA = Family(model_type="llama", rejects=_rejects, build=_build, build_head=_build_head)
QWEN3 = Family(model_type="qwen3", rejects=_rejects, build=_build, build_head=_build_head)
