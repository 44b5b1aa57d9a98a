"""Every architecture, both ways: a Transformers model is converted, loaded, and gives the same logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES, get_tensor_name_map
from transformers import PreTrainedModel

from hybridkv.cli.main import main
from hybridkv.engine.convert import convert
from hybridkv.gguf.architectures import ARCHITECTURES
from hybridkv.gguf.architectures.record import rotary_halves
from hybridkv.gguf.load import load_gguf
from hybridkv.gguf.pairing import pair
from hybridkv.gguf.reader import read_header
from tests.families import build

IDS = torch.randint(3, 90, (2, 21), generator=torch.Generator().manual_seed(0))

_ROPE: dict[str, Any] = {"rope_theta": 5000.0}
_LLAMA3 = {
    **_ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}

_UNLIMITED = {"time_step_min": 1e-30}
"""As llama.cpp and the original code have it; the class would keep time steps above 0.001."""

# Per architecture, variants of a family; multipliers are powers of two where they are folded into weights, so
# that folding is exact.
VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "qwen35": [
        ("qwen3_5_text", {}),
        ("qwen3_5_text", {"tie_word_embeddings": True, "linear_num_value_heads": 2}),
        ("qwen3_5_text", {"rope_parameters": _YARN | {"partial_rotary_factor": 0.5, "attention_factor": 1.7}}),
    ],
    "qwen35moe": [
        ("qwen3_5_moe_text", {}),
        ("qwen3_5_moe_text", {"layer_types": ["full_attention", "linear_attention"], "num_hidden_layers": 2}),
    ],
    "qwen3next": [("qwen3_next", {}), ("qwen3_next", {"linear_num_value_heads": 6, "linear_value_head_dim": 8})],
    "lfm2": [("lfm2", {}), ("lfm2", {"block_auto_adjust_ff_dim": False, "tie_word_embeddings": False})],
    "lfm2moe": [("lfm2_moe", {})],
    "granitehybrid": [
        ("granitemoehybrid", {"mamba_n_groups": 2, "residual_multiplier": 0.22, "logits_scaling": 3.0}),
        ("granitemoehybrid", {"num_local_experts": 0, "attention_multiplier": 0.3, "embedding_multiplier": 12.0}),
        ("granitemoehybrid", {"position_embedding_type": "rope", "num_experts_per_tok": 1}),
        ("granitemoehybrid", {"position_embedding_type": "rope", "rope_parameters": _YARN}),
    ],
    "granite": [
        (
            "granite",
            {"attention_multiplier": 0.3, "logits_scaling": 3.0, "rope_parameters": _ROPE | {"rope_type": "default"}},
        ),
        ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
    "nemotron_h": [
        ("nemotron_h", {"layers_block_type": ["mamba", "mlp", "attention", "mamba"], "n_groups": 2, **_UNLIMITED}),
        ("nemotron_h", {"layers_block_type": ["mamba", "attention"], "use_conv_bias": False, **_UNLIMITED}),
    ],
    "nemotron_h_moe": [
        ("nemotron_h", {"routed_scaling_factor": 2.5, **_UNLIMITED}),
        ("nemotron_h", {"moe_latent_size": 48, "n_group": 2, "topk_group": 1, **_UNLIMITED}),
    ],
    "jamba": [("jamba", {}), ("jamba", {"num_experts": 1, "mamba_conv_bias": False, "attn_layer_period": 4})],
    "falcon-h1": [
        ("falcon_h1", {}),
        (
            "falcon_h1",
            {
                "mamba_rms_norm": True,
                "mamba_norm_before_gate": False,
                "mamba_n_groups": 2,
                "lm_head_multiplier": 0.5,
                "embedding_multiplier": 4.0,
                "mlp_multipliers": [0.5, 2.0],
                "key_multiplier": 0.25,
                "attention_out_multiplier": 2.0,
                "attention_in_multiplier": 0.5,
                "ssm_multipliers": [0.5, 2.0, 0.25, 4.0, 1.0],
                "ssm_in_multiplier": 2.0,
                "ssm_out_multiplier": 0.5,
            },
        ),
    ],
    "llama": [
        ("llama", {"rope_parameters": _ROPE | {"rope_type": "default"}}),
        ("llama", {"attention_bias": False, "mlp_bias": True, "head_dim": 24, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 2.0}}),
    ],
    "qwen2": [("qwen2", {}), ("qwen2", {"rope_parameters": _YARN})],
    "qwen3": [("qwen3", {}), ("qwen3", {"rope_parameters": _YARN | {"beta_fast": 16.0, "attention_factor": 1.7}})],
    "qwen3moe": [("qwen3_moe", {})],
    "gemma3": [
        ("gemma3_text", {}),
        ("gemma3_text", {"query_pre_attn_scalar": 48, "final_logit_softcapping": 5.0, "tie_word_embeddings": False}),
    ],
}
CASES = [pytest.param(name, *each, id=f"{name}-{n}") for name, all_ in VARIANTS.items() for n, each in enumerate(all_)]


def stirred(family: str, **changes: Any) -> PreTrainedModel:
    """A model in which nothing is left at a neutral value: norms, biases and decays too."""
    model = build(family, **changes)
    with torch.no_grad():
        for _, value in sorted(model.state_dict(keep_vars=True).items()):
            if value.dim() < 2:
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def test_every_architecture_has_a_case() -> None:
    assert VARIANTS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize(("architecture", "family", "changes"), CASES)
def test_there_and_back(tmp_path: Path, architecture: str, family: str, changes: dict[str, Any]) -> None:
    model = stirred(family, **changes)
    done = convert(saved(model, tmp_path / "model"), tmp_path / "x.gguf", weights="f32")
    assert done.architecture == architecture == read_header(done.path).architecture
    loaded = load_gguf(done.path, attn_implementation="eager").model
    expected = model.state_dict()
    folded = family == "falcon_h1" and changes
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        # One rounding each way of the values that are converted; all others are equal to the bit.
        converted = name.endswith(("norm.weight", "A_log"))
        assert folded or torch.equal(value, expected[name]) or converted, name
        assert folded or torch.allclose(value, expected[name], rtol=1e-6, atol=3e-7), name
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", VARIANTS)
def test_half_precision_is_kept_to_the_bit(tmp_path: Path, architecture: str) -> None:
    family, changes = VARIANTS[architecture][0]
    model = stirred(family, **changes).to(torch.float16)
    done = convert(saved(model, tmp_path / "model"), tmp_path / "x.gguf", weights="f16")
    loaded = load_gguf(done.path, dtype=torch.float16).model.state_dict()
    for name, value in model.state_dict().items():
        if not name.endswith(("norm.weight", "A_log")):
            assert torch.equal(loaded[name], value.to(loaded[name].dtype)), name


@pytest.mark.parametrize("architecture", VARIANTS)
def test_run(tmp_path: Path, architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, changes = VARIANTS[architecture][0]
    model = stirred(family, **changes)
    path = tmp_path / "x.gguf"
    assert main(["convert", str(saved(model, tmp_path / "model")), "-o", str(path), "--type", "f32"]) == 0
    assert "--ids" in capsys.readouterr().err
    greedy = ["--temp", "0", "-n", "4", "--ignore-eos", "-ctk", "f32", "-ctv", "f32"]
    code = main(["run", "-m", str(path), "--ids", "5,7,11,13", *greedy])
    out = capsys.readouterr()
    assert code == 0, out.err
    expected = model.generate(torch.tensor([[5, 7, 11, 13]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [int(word) for word in out.out.replace(",", " ").split()] == expected[0, 4:].tolist()


# Rules whose names gguf-py does not list for the architecture, and why they stand there.
UNLISTED = {
    ("lfm2moe", "output.weight"): "llama.cpp reads it (src/models/lfm2moe.cpp)",
    **dict.fromkeys(
        [(name, "ffn_gate_up_exps.weight") for name in ("lfm2moe", "granitehybrid", "jamba", "qwen3moe")],
        "read where a converter fuses the two, as gguf-py lists for others",
    ),
    **dict.fromkeys([("nemotron_h_moe", f"ffn_latent_{end}.weight") for end in ("in", "out")], "ollama's"),
    **dict.fromkeys([("qwen2", f"attn_{head}_norm.weight") for head in "qk"], "of Qwen3, in a table that both share"),
}


@pytest.mark.parametrize("architecture", VARIANTS)
def test_every_rules_name_is_listed_by_gguf_py(architecture: str) -> None:
    kind = next(each for each, name in MODEL_ARCH_NAMES.items() if name == architecture)
    listed = {TENSOR_NAMES[tensor].removeprefix("blk.{bid}.") for tensor in MODEL_TENSORS[kind]}
    tables = ARCHITECTURES[architecture].tensors.values()
    unlisted = {
        (architecture, name)
        for rule in (rule for table in tables for rule in table)
        for name in rule.names
        if name.removesuffix(".weight").removesuffix(".bias") not in listed
    }
    assert unlisted == {each for each in UNLISTED if each[0] == architecture}


@pytest.mark.parametrize(("architecture", "family", "changes"), CASES)
def test_names_are_those_that_gguf_py_maps_to(architecture: str, family: str, changes: dict[str, Any]) -> None:
    """Suffix included: Falcon-H1's second norm has none, and llama.cpp looks for exactly that name."""
    model = build(family, **changes)
    kind = next(each for each, name in MODEL_ARCH_NAMES.items() if name == architecture)
    oracle = get_tensor_name_map(kind, model.config.num_hidden_layers)
    n_known = 0
    for pairing in pair(ARCHITECTURES[architecture], model.config, model, ()):
        # The converters rename these before they ask; Granite's shared feed-forward they name themselves.
        param = pairing.param.replace("dt_bias", "dt_proj.bias")
        params = (param, param.replace("model.", "backbone."))
        known = next(filter(None, (oracle.get_name(each, try_suffixes=(".weight", ".bias")) for each in params)), None)
        if known is not None and len(pairing.names) == 1 and "shared_mlp" not in param:
            n_known += 1
            (name,) = pairing.names
            # Stacks of experts and their biases have no suffix in Transformers.
            stacked = re.search(r"\.experts\.(gate_up|up|down)_proj$|expert_bias$", param)
            assert (re.sub(r"\.(weight|bias)$", "", name) if stacked else name) == known, param
    assert n_known > 0.4 * len(model.state_dict())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_frequency_factors_are_llama3s_scaling(tmp_path: Path, family: str) -> None:
    model = stirred(family, rope_parameters=_LLAMA3)
    plain = stirred(family, rope_parameters={**_ROPE, "rope_type": "default"})
    assert not torch.allclose(logits(model), logits(plain), rtol=1e-2, atol=1e-2)
    path = convert(saved(model, tmp_path / "model"), tmp_path / "x.gguf", weights="f32").path
    assert "rope_freqs.weight" in {info.name for info in read_header(path).tensors}
    torch.testing.assert_close(logits(load_gguf(path).model), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n_heads", "head_dim"), [(1, 2), (2, 4), (3, 10)])
def test_rotary_halves_interleave_each_head(n_heads: int, head_dim: int) -> None:
    order = rotary_halves(n_heads, head_dim)
    assert sorted(order) == list(range(n_heads * head_dim))
    # As llama.cpp's converter says it: two halves, swapped with the pairs.
    rows = np.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    assert np.array_equal(rows[order], np.arange(n_heads * head_dim))
