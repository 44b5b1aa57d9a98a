"""Layouts that are read and not written: what older or newer converters do instead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hybridkv.errors import ModelFileError
from hybridkv.gguf.load import load_gguf
from tests.gguf.test_bad_metadata import copied
from tests.gguf.write_qwen35 import Draft


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
