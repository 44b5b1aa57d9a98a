"""What configs of native families say beyond their defaults, against Transformers in float64; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hybridkv import model as models
from hybridkv.cache import KVTypes
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import UsageError
from hybridkv.hf import EagerStep, ModelCache
from hybridkv.kernels import cpu_native
from hybridkv.model import graph_of, kv_facts, layer_facts
from hybridkv.native import NativeStep, source_of
from hybridkv.native.choice import rejects
from hybridkv.policy import Guard, Policy
from tests.families import BASE, FAMILIES, build
from tests.thin import every_other

pytestmark = [
    pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built"),
    pytest.mark.usefixtures("_inference"),
]

_MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_TWO_BLOCKS = {
    "num_hidden_layers": 7,
    "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid", "hybrid"],
    "num_mem_blocks": 2,
    "use_shared_attention_adapter": True,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron_h: dense feed-forwards": (
        "nemotron_h",
        {"layers_block_type": ["mlp", "mamba", "attention", "mlp", "mamba"], "n_groups": 2},
    ),
    "nemotron_h: groups of experts": ("nemotron_h", {**_MOE, "n_group": 4, "topk_group": 2}),
    "nemotron_h: weights that do not sum to one": ("nemotron_h", {**_MOE, "norm_topk_prob": False}),
    "nemotron_h: a latent width": ("nemotron_h", {**_MOE, "moe_latent_size": 24}),
    "nemotron_h: convolutions without biases": ("nemotron_h", {"use_conv_bias": False}),
    "granitemoehybrid: no experts": ("granitemoehybrid", {"num_local_experts": 0}),
    "granitemoehybrid: positions": ("granitemoehybrid", {"position_embedding_type": "rope", "mamba_n_groups": 4}),
    "granitemoehybrid: multipliers": (
        "granitemoehybrid",
        {
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 6.0,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "falcon_h1: a norm after the gate": (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2},
    ),
    "falcon_h1: multipliers": (
        "falcon_h1",
        {
            "embedding_multiplier": 5.0,
            "lm_head_multiplier": 0.05,
            "attention_in_multiplier": 0.9,
            "attention_out_multiplier": 0.8,
            "key_multiplier": 0.7,
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.3,
            "ssm_multipliers": [0.4, 0.5, 0.6, 0.7, 0.8],
            "mlp_multipliers": [0.9, 0.35],
        },
    ),
    "lfm2: a width as it is": ("lfm2", {"block_auto_adjust_ff_dim": False}),
    "lfm2_moe: weights that do not sum to one": (
        "lfm2_moe",
        {"norm_topk_prob": False, "routed_scaling_factor": 1.5, "use_expert_bias": False},
    ),
    "granitemoehybrid: Mamba alone": ("granitemoehybrid", {"layer_types": ["mamba"] * 4}),
    "granitemoehybrid: attention alone": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 4, "position_embedding_type": "rope"},
    ),
    "qwen3_moe: weights that do not sum to one": ("qwen3_moe", {"norm_topk_prob": False}),
    "jamba: no experts": ("jamba", {"num_experts": 1}),
    "jamba: an odd state": ("jamba", {"mamba_d_state": 11, "mamba_dt_rank": 5}),
    "granitemoehybrid: an odd state": (
        "granitemoehybrid",
        {"mamba_d_state": 19, "mamba_n_heads": 2, "mamba_d_head": 64},
    ),
    "llama: biases everywhere": ("llama", {"mlp_bias": True}),
    "llama: scaled positions": ("llama", {"rope_parameters": _LLAMA3}),
    "olmo_hybrid: no positions": ("olmo_hybrid", {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}),
    "olmo_hybrid: updates below one": ("olmo_hybrid", {"linear_allow_neg_eigval": False}),
    "zamba2: two blocks with adapters": ("zamba2", _TWO_BLOCKS),
    "zamba2: no positions, groups": ("zamba2", {"use_mem_rope": False, "mamba_ngroups": 2, "num_key_value_heads": 2}),
    "zamba2: Mamba alone": ("zamba2", {"layers_block_type": ["mamba"] * 5}),
    "gemma3_text: windows alone": ("gemma3_text", {"layer_types": ["sliding_attention"] * 3}),
}


@pytest.fixture
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("variant", "isa"), every_other(VARIANTS, ("best", "portable")), indirect=["isa"])
def test_variants(variant: str, isa: str) -> None:
    """Biases and experts' corrections are random here: Transformers begins with zeros, which would hide them."""
    family, changes = VARIANTS[variant]
    model = build(family, attention="hybridkv", **changes)
    noise = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1 and ("bias" in name or name.endswith((".D", "norm.weight"))):
            tensor += 0.3 * torch.randn(tensor.shape, generator=noise)
    specs = Policy(KVTypes("f32", "f32")).resolve(kv_facts(layer_facts(model.config)))
    cache, prompt, got = ModelCache(model.config, specs, guard=Guard()), tokens(2, 50), []
    step = NativeStep(model)
    for begin, end in ((0, 30), (30, 31), (31, 49), (49, 50)):
        got.append(step.forward(prompt[:, begin:end], cache, begin))
    model.config._attn_implementation = "eager"
    model = model.double()
    model.set_experts_implementation("eager")
    exact = model(input_ids=prompt, use_cache=False).logits[:, [29, 30, 48, 49]]
    difference = (torch.stack(got, dim=1).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert difference < (2e-4 if step.name.startswith("native-amx") else 4e-5)  # tiles of bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_declared_parts_are_those_of_the_graph(family: str) -> None:
    config = build(family).config
    text = config.get_text_config(decoder=True)
    if text.model_type in models.FAMILIES:
        assert {type(part) for part in graph_of(config).parts} <= {*models.FAMILIES[text.model_type].parts}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_named_once(family: str) -> None:
    """As a session's fingerprint asks, also where rows are permuted."""
    built = build(family)
    if rejects(built.config, "cpu") is None:
        names = [name for name, _ in source_of(built).shapes()]
        assert len(names) == len(set(names)) > 10


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "lfm2: biases": ("lfm2", {"conv_bias": True}, "projections with a bias \\(conv_bias\\)"),
    "granitemoehybrid: limits": (
        "granitemoehybrid",
        {"time_step_limit": (0.1, 1.0)},
        "time steps limited to 0.1 to 1.0",
    ),
    "granitemoehybrid: biases": ("granitemoehybrid", {"attention_bias": True}, "a bias \\(attention_bias\\)"),
    "nemotron_h: an activation": ("nemotron_h", {"mlp_hidden_act": "silu"}, "activation 'silu', not relu2"),
    "nemotron_h: dense layers and experts": (
        "nemotron_h",
        {"layers_block_type": ["mlp", "mamba", "attention", "moe"]},
        "both dense layers and layers with experts",
    ),
    "falcon_h1: the norm's place": (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_norm_before_gate": True},
        "a norm before the gate",
    ),
    "gemma3_text: softcaps": ("gemma3_text", {"attn_logit_softcapping": 30.0}, "softcapped"),
    "falcon_h1: tied": (
        "falcon_h1",
        {"tie_word_embeddings": True, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5},
        "one matrix with two multipliers",
    ),
    "falcon_h1: RoPE in part": (
        "falcon_h1",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "RoPE of a part of each head",
    ),
    "zamba2: an activation": ("zamba2", {"hidden_act": "silu"}, "activation 'silu', not gelu"),
    "zamba2: biases": ("zamba2", {"add_bias_linear": True}, "a bias \\(add_bias_linear\\)"),
    "zamba2: adapters of grouped heads": (
        "zamba2",
        {"use_shared_attention_adapter": True, "num_key_value_heads": 2},
        "adapters of 2 KV heads beside 4 query heads",
    ),
    "zamba2: a kind of layers": (
        "zamba2",
        {"layers_block_type": ["full_attention"] * 5},
        "layer 0 of kind 'full_attention'; it knows linear_attention, hybrid",
    ),
    "qwen3_5_text: a kind of layers": ("qwen3_5_text", {"layer_types": ["conv"] * 4}, "layer 0 of kind 'conv'"),
    "gemma3_text: a kind of layers": ("gemma3_text", {"layer_types": ["conv"] * 3}, "layer 0 of kind 'conv'"),
    "lfm2: a kind of layers": ("lfm2", {"layer_types": ["linear_attention"] * 4}, "of kind 'linear_attention'"),
    **{
        f"{family}: groups": (family, {field: 3}, "layer 0: 8 Mamba heads do not divide into 3 groups")
        for family, field in (
            ("granitemoehybrid", "mamba_n_groups"),
            ("nemotron_h", "n_groups"),
            ("bamba", "mamba_n_groups"),
            ("falcon_h1", "mamba_n_groups"),
            ("zamba2", "mamba_ngroups"),
        )
    },
    "zamba2: heads": ("zamba2", {"n_mamba_heads": 7}, "Mamba-2 heads of 16 values that do not fill 128"),
    "qwen3_next: heads": ("qwen3_next", {"linear_num_value_heads": 3}, "3 value heads do not divide into 2 key heads"),
    "olmo_hybrid: heads": (
        "olmo_hybrid",
        {"linear_num_value_heads": 6},
        "6 value heads do not divide into 4",
    ),
    "nemotron_h: experts in groups": ("nemotron_h", {"n_group": 3}, "layer 2: 4 experts in 3 groups"),
    "nemotron_h: groups used": ("nemotron_h", {"n_group": 2, "topk_group": 3}, "of which 3 are used"),
    "nemotron_h: experts of a group": (
        "nemotron_h",
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
        "3 experts a token, of 1 groups of 2",
    ),
    "jamba: no inputs": ("jamba", {"mamba_d_conv": 0}, "layer 0: Mamba1 with kernel 0"),
    "zamba2: no rank": ("zamba2", {"adapter_rank": 0}, "layer 1: Adapter with rank 0"),
    "granite: nothing to divide by": ("granite", {"logits_scaling": 0.0}, "logits divided by 0"),
    "jamba: biases": ("jamba", {"mamba_proj_bias": True}, "a bias \\(mamba_proj_bias\\)"),
    "qwen2: a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "a sliding window"),
    "llama: RoPE": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        "RoPE of type 'dynamic'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused(case: str) -> None:
    family, changes, reason = REFUSED[case]
    class_name, options = FAMILIES[family]
    config = getattr(transformers, class_name).config_class(**{**BASE, **options, **changes})
    with pytest.raises(UsageError, match=rf"{reason}.*\nhint: use --backend eager, or auto"):
        resolve_step(config, "cpu", "native")
    assert rejects(config, "cpu") is not None
    assert resolve_step(config, "cpu") is EagerStep
