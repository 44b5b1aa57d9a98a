"""Layouts that are read and not written: what older or newer converters do instead."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from hybridkv.engine.convert import convert
from hybridkv.errors import ModelFileError
from hybridkv.gguf.load import load_gguf
from tests.families import build
from tests.gguf.test_architectures import VARIANTS
from tests.gguf.test_bad_metadata import copied
from tests.gguf.write_qwen35 import Draft


def read_draft(path: Path) -> Draft:
    read = GGUFReader(path)
    keys = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
    return Draft(keys.pop("general.architecture"), keys, {tensor.name: tensor.data.copy() for tensor in read.tensors})


def equal(tmp_path: Path, one: Draft, two: Draft) -> bool:
    ours, theirs = (
        load_gguf(file.write(tmp_path / f"{name}.gguf")).model.state_dict()
        for name, file in (("one", one), ("two", two))
    )
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("architecture", ["qwen35moe", "qwen3next", "qwen3moe", "jamba", "lfm2moe", "granitehybrid"])
def test_gate_and_up_of_experts_in_one_tensor(tmp_path: Path, architecture: str) -> None:
    fused = copied(architecture)
    for name in [name for name in fused.tensors if "ffn_gate_exps" in name]:
        gate, up = fused.tensors.pop(name), fused.tensors.pop(name.replace("gate", "up"))
        fused.tensors[name.replace("gate", "gate_up")] = np.concatenate([gate, up], axis=1)
    assert any("ffn_gate_up_exps" in name for name in fused.tensors)
    assert equal(tmp_path, fused, copied(architecture))


def test_qwen3next_projections_in_one_tensor(tmp_path: Path) -> None:
    """Older files hold q, k, v and z of one key head after the other, as Transformers does."""
    fused, keys = copied("qwen3next"), copied("qwen3next").keys
    n_key, n_value, d_key = (
        int(keys[f"qwen3next.ssm.{key}"]) for key in ("group_count", "time_step_rank", "state_size")
    )  # type: ignore[arg-type]
    d_value = int(keys["qwen3next.ssm.inner_size"]) // n_value  # type: ignore[arg-type]
    for name in [name for name in fused.tensors if "attn_qkv" in name]:
        qkv, z = fused.tensors.pop(name), fused.tensors.pop(name.replace("qkv", "gate"))
        q, k, v = np.split(qkv, [n_key * d_key, 2 * n_key * d_key])
        heads = [part.reshape(n_key, -1, qkv.shape[1]) for part in (q, k, v, z)]
        assert heads[2].shape[1] == n_value // n_key * d_value
        fused.tensors[name.replace("attn_qkv", "ssm_in")] = np.concatenate(heads, axis=1).reshape(-1, qkv.shape[1])
    assert equal(tmp_path, fused, copied("qwen3next"))


def test_qwen3next_attends_every_fourth_layer_if_the_file_does_not_say(tmp_path: Path) -> None:
    file = copied("qwen3next")
    del file.keys["qwen3next.full_attention_interval"]
    # The file has two attention layers of four.
    with pytest.raises(ModelFileError, match=r"missing tensor.s. .*blk.1.attn_gate.weight"):
        load_gguf(file.write(tmp_path / "x.gguf"))


def test_gemma3_without_the_keys_of_newer_files(tmp_path: Path) -> None:
    file = copied("gemma3")
    for key in ("attention.sliding_window_pattern", "attention.scale", "rope.freq_base_swa", "rope.freq_base"):
        del file.keys[f"gemma3.{key}"]
    config = load_gguf(file.write(tmp_path / "x.gguf")).model.config
    assert config.layer_types == ["sliding_attention"] * 3
    assert config.query_pre_attn_scalar == config.head_dim
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    file.keys["gemma3.attention.sliding_window_pattern"] = 3
    config = load_gguf(file.write(tmp_path / "x.gguf")).model.config
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_granitehybrid_has_rope_unless_it_says_otherwise(tmp_path: Path) -> None:
    file = copied("granitehybrid")
    assert load_gguf(file.write(tmp_path / "x.gguf")).model.config.position_embedding_type is None
    del file.keys["granitehybrid.rope.scaling.finetuned"]
    assert load_gguf(file.write(tmp_path / "x.gguf")).model.config.position_embedding_type == "rope"


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_scaling_that_is_not_supported(tmp_path: Path, kind: str) -> None:
    file = copied("qwen3")
    file.keys |= {"qwen3.rope.scaling.type": kind, "qwen3.rope.scaling.factor": 2.0}
    with pytest.raises(ModelFileError, match=rf"'qwen3.rope.scaling.type' is '{kind}'; expected 'none', 'linear' or"):
        load_gguf(file.write(tmp_path / "x.gguf"))


SPELLINGS = {
    "falcon-h1": {"ffn_norm": "ffn_norm.weight", "ssm_dt.bias": "ssm_dt"},
    "qwen35": {"ssm_dt.bias": "ssm_dt"},
    "qwen35moe": {"ssm_dt.bias": "ssm_dt"},
    "qwen3next": {"ssm_dt.bias": "ssm_dt"},
    "granitehybrid": {"ssm_dt.bias": "ssm_dt"},
    "nemotron_h": {"ssm_dt.bias": "ssm_dt"},
}


@pytest.mark.parametrize(("architecture", "written"), [(a, w) for a, names in SPELLINGS.items() for w in names])
def test_both_spellings_of_a_name(tmp_path: Path, architecture: str, written: str) -> None:
    other = copied(architecture)
    names = [name for name in other.tensors if re.fullmatch(rf"blk\.\d+\.{re.escape(written)}", name)]
    assert names
    for name in names:
        other.tensors[name.replace(written, SPELLINGS[architecture][written])] = other.tensors.pop(name)
    assert equal(tmp_path, other, copied(architecture))


def test_both_spellings_at_once_are_too_many(tmp_path: Path) -> None:
    file = copied("falcon-h1")
    file.tensors["blk.0.ffn_norm.weight"] = file.tensors["blk.0.ffn_norm"]
    with pytest.raises(ModelFileError, match=r"1 unknown tensor.s. .*: blk.0.ffn_norm.weight"):
        load_gguf(file.write(tmp_path / "x.gguf"))


@pytest.mark.parametrize("architecture", ["nemotron_h", "nemotron_h_moe"])
@pytest.mark.parametrize("missing", ["layer_norm_epsilon", "layer_norm_rms_epsilon"])
def test_either_key_of_the_epsilon(tmp_path: Path, architecture: str, missing: str) -> None:
    file = copied(architecture)
    keys = [f"{architecture}.attention.{key}" for key in ("layer_norm_epsilon", "layer_norm_rms_epsilon")]
    file.keys |= dict.fromkeys(keys, 0.125)
    assert load_gguf(file.write(tmp_path / "x.gguf")).model.config.layer_norm_epsilon == 0.125
    del file.keys[f"{architecture}.attention.{missing}"]
    assert load_gguf(file.write(tmp_path / "x.gguf")).model.config.layer_norm_epsilon == 0.125
    for key in keys:
        file.keys.pop(key, None)
    with pytest.raises(ModelFileError, match="layer_norm_rms_epsilon' is missing; expected a number above zero"):
        load_gguf(file.write(tmp_path / "x.gguf"))


def test_rmsnorms_epsilon_comes_first(tmp_path: Path) -> None:
    file = copied("nemotron_h")
    file.keys |= {"nemotron_h.attention.layer_norm_epsilon": 0.5, "nemotron_h.attention.layer_norm_rms_epsilon": 0.25}
    assert load_gguf(file.write(tmp_path / "x.gguf")).model.config.layer_norm_epsilon == 0.25


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "falcon-h1", "granite"])
def test_kv_heads_per_layer_where_all_have_the_same(tmp_path: Path, architecture: str) -> None:
    """As Granite 4.0's dense models say it, being written by the hybrids' converter."""
    file = copied(architecture)
    key, n_layers = f"{architecture}.attention.head_count_kv", file.keys[f"{architecture}.block_count"]
    assert isinstance(n_layers, int)
    n_kv_heads = file.keys[key]
    file.keys[key] = [n_kv_heads] * n_layers  # type: ignore[assignment]
    assert load_gguf(file.write(tmp_path / "x.gguf")).model.config.num_key_value_heads == n_kv_heads
    file.keys[key] = [n_kv_heads] * (n_layers - 1) + [0]  # type: ignore[assignment]
    with pytest.raises(ModelFileError, match="expected KV heads in all layers"):
        load_gguf(file.write(tmp_path / "x.gguf"))


def test_granite_without_multipliers(tmp_path: Path) -> None:
    file = copied("granite")
    for key in ("attention.scale", "embedding_scale", "residual_scale", "logit_scale"):
        del file.keys[f"granite.{key}"]
    config = load_gguf(file.write(tmp_path / "x.gguf")).model.config
    assert config.attention_multiplier == 16**-0.5
    assert (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling) == (1, 1, 1)
    file.keys["granite.attention.scale"] = 0.0
    assert load_gguf(file.write(tmp_path / "x.gguf")).model.config.attention_multiplier == 16**-0.5
    file.keys["granite.rope.scaling.finetuned"] = False
    with pytest.raises(ModelFileError, match=r"rope.scaling.finetuned' is False; expected true: a dense Granite model"):
        load_gguf(file.write(tmp_path / "x.gguf"))


@pytest.mark.parametrize("architecture", ["qwen35", "qwen3next"])
def test_layers_that_recur_by_flags(tmp_path: Path, architecture: str) -> None:
    file = copied(architecture)
    expected = load_gguf(file.write(tmp_path / "x.gguf")).model.config.layer_types
    del file.keys[f"{architecture}.full_attention_interval"]
    key = f"{architecture}.attention.recurrent_layers"
    file.keys[key] = [kind == "linear_attention" for kind in expected]
    assert load_gguf(file.write(tmp_path / "x.gguf")).model.config.layer_types == expected
    file.keys[f"{architecture}.attention.head_count_kv"] = [2, 0, 2, 0]
    with pytest.raises(ModelFileError, match=r"recurrent_layers' is .*; expected the layers without KV heads"):
        load_gguf(file.write(tmp_path / "x.gguf"))


def test_ollamas_names_of_nemotrons_latent_projections(tmp_path: Path) -> None:
    options = {"moe_latent_size": 48}
    build("nemotron_h", **options).save_pretrained(tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path / "written.gguf", weights="f32").path
    file = read_draft(path)
    file.tensors = {
        name.replace("latent_down", "latent_in").replace("latent_up", "latent_out"): values
        for name, values in file.tensors.items()
    }
    assert any("latent_in" in name for name in file.tensors)
    ollama = file.write(tmp_path / "ollama.gguf")
    ours, theirs = load_gguf(path).model.state_dict(), load_gguf(ollama).model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("architecture", ["granite", "granitehybrid"])
def test_granite_without_experts_says_the_width_of_its_feed_forward_twice(tmp_path: Path, architecture: str) -> None:
    """As llama.cpp's converter writes Granite 4.0's dense models and its hybrids without experts."""
    family, changes = VARIANTS[architecture][architecture == "granitehybrid"]
    build(family, **changes).save_pretrained(tmp_path / "model")
    file = read_draft(convert(tmp_path / "model", tmp_path / "x.gguf", weights="f32").path)
    file.keys[f"{architecture}.expert_shared_feed_forward_length"] = file.keys[f"{architecture}.feed_forward_length"]
    if architecture == "granite":
        file.keys |= {"granite.ssm.conv_kernel": 4, "granite.ssm.inner_size": 128}
    assert load_gguf(file.write(tmp_path / "y.gguf")).notices == ()
