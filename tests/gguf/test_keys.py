"""Metadata keys that change a model: computed, or refused by name; none is passed over in silence."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hybridkv.cli.main import main
from hybridkv.engine.convert import convert
from hybridkv.errors import ModelError, ModelFileError
from hybridkv.gguf.architectures import ARCHITECTURES
from hybridkv.gguf.convert import find_architecture
from hybridkv.gguf.keys import NEUTRAL
from hybridkv.gguf.load import load_gguf
from hybridkv.gguf.mapped import map_gguf
from hybridkv.gguf.reader import read_header
from tests.families import build
from tests.gguf.key_cases import draft, names, written
from tests.gguf.reference import REFERENCE, config_from_gguf
from tests.gguf.write_qwen35 import Key
from tests.models import gemma3, smollm2
from tests.thin import every_other

ROTATING = [name for name in ARCHITECTURES if name not in ("nemotron_h", "nemotron_h_moe", "jamba")]
WITH_EXPERTS = [
    name for name in ARCHITECTURES if name.endswith("moe") or name in ("qwen3next", "jamba", "granitehybrid")
]

# Scalings, and what llama.cpp makes of them: type, factor, original length (None: the context), magnitude on top.
YARN: dict[str, Key] = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
YARN_FIELDS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LENGTH = "rope.scaling.original_context_length"
SCALINGS: dict[str, tuple[dict[str, Key], tuple[str, float, int | None, float]]] = {
    "old key": ({"rope.scale_linear": 4.0}, ("linear", 4.0, None, 1.0)),
    "no type": ({"rope.scaling.factor": 4.0}, ("linear", 4.0, None, 1.0)),
    "new key before old": ({"rope.scaling.factor": 2.0, "rope.scale_linear": 8.0}, ("linear", 2.0, None, 1.0)),
    "factor zero": ({"rope.scaling.factor": 0.0, "rope.scale_linear": 8.0}, ("linear", 1.0, None, 1.0)),
    "type alone": ({"rope.scaling.type": "linear"}, ("linear", 1.0, None, 1.0)),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, ("linear", 1.0, None, 1.0)),
    "magnitude": ({"rope.scaling.attn_factor": 1.5}, ("linear", 1.0, None, 1.5)),
    "none with magnitude": (
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.5},
        ("linear", 1.0, None, 1.5),
    ),
    "linear with magnitude": (
        {"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.5},
        ("linear", 4.0, None, 1.5),
    ),
    "yarn": (YARN | {LENGTH: 1024}, ("yarn", 4.0, 1024, 1.0)),
    "yarn without length": (YARN, ("yarn", 4.0, None, 1.0)),
    "yarn without factor": ({"rope.scaling.type": "yarn"}, ("yarn", 1.0, None, 1.0)),
    "yarn with magnitude": (YARN | {LENGTH: 1024, "rope.scaling.attn_factor": 1.5}, ("yarn", 4.0, 1024, 1.5)),
    "yarn with its own magnitude": (
        YARN | {LENGTH: 1024, "rope.scaling.yarn_attn_factor": 1.7},
        ("yarn", 4.0, 1024, 1.7 / (1 + 0.1 * math.log(4))),
    ),
}


def ggml_rope(
    n_rotated: int, theta: float, scaling: tuple[str, float, int | None, float], n_context: int
) -> tuple[npt.NDArray[np.float64], float]:
    """Frequencies and magnitude, written down from ggml's `rope_yarn` and `ggml_rope_yarn_corr_dims`."""
    kind, factor, length, magnitude = scaling
    pairs = np.arange(n_rotated // 2, dtype=np.float64)
    frequencies = theta ** (-2 * pairs / n_rotated)
    if kind == "linear":
        return frequencies / factor, magnitude

    def dims(beta: float) -> float:
        return n_rotated * math.log((length or n_context) / (beta * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(0, math.floor(dims(32.0))), min(n_rotated - 1, math.ceil(dims(1.0)))
    mix = 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)
    return frequencies / factor * (1 - mix) + frequencies * mix, magnitude * (1 + 0.1 * math.log(factor))


def rotary(model: Any, kind: str = "") -> tuple[npt.NDArray[np.float64], float]:
    embedding = model.model.pos_emb if hasattr(model.model, "pos_emb") else model.model.rotary_emb
    frequencies = getattr(embedding, f"{kind}inv_freq")
    return frequencies.double().numpy(), float(getattr(embedding, f"{kind}attention_scaling"))


@pytest.mark.parametrize(("architecture", "scaling"), every_other(ROTATING, SCALINGS, 4))
@pytest.mark.filterwarnings("ignore")
def test_scaled_rope_is_what_llama_cpp_computes(tmp_path: Path, architecture: str, scaling: str) -> None:
    keys, expected = SCALINGS[scaling]
    model = load_gguf(written(architecture, keys, tmp_path / "x.gguf")).model
    base = draft(architecture).keys
    n_rotated, theta, n_context = base["rope.dimension_count"], base["rope.freq_base"], base["context_length"]
    assert isinstance(n_rotated, int)
    assert isinstance(theta, float)
    assert isinstance(n_context, int)
    found = rotary(model, "full_attention_" if architecture == "gemma3" else "")
    wanted = ggml_rope(n_rotated, theta, expected, n_context)
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-6)
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)
    if architecture == "gemma3":
        # Layers with a window are not scaled; a magnitude that is not YaRN's concerns them as well.
        of_files = keys.get("rope.scaling.attn_factor", 1.0)
        assert rotary(model, "sliding_attention_")[1] == pytest.approx(of_files)
        np.testing.assert_allclose(rotary(model, "sliding_attention_")[0][:2], [1, 1e4 ** (-2 / n_rotated)], rtol=1e-6)


def test_yarns_betas_are_honoured(tmp_path: Path) -> None:
    keys: dict[str, Key] = {"rope.scaling.yarn_beta_fast": 64.0, "rope.scaling.yarn_beta_slow": 4.0, **YARN}
    rope = config_from_gguf(written("qwen35", keys, tmp_path / "x.gguf")).rope_parameters
    assert (rope["beta_fast"], rope["beta_slow"]) == (64.0, 4.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (YARN | {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor' is 0.5; expected 1.0"),
        (YARN | {"rope.scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier' is 0.1\d*; expected 0.0"),
        ({"rope.scaling.alpha": 1000.0}, "alpha' is 1000.0; expected 0"),
        ({"rope.scaling.factor": -4.0}, "factor' is -4.0; expected a number above zero"),
        ({"rope.scaling.factor": [4.0, 4.0]}, r"factor' is \[4.0, 4.0\]; expected a number above zero"),
        ({"rope.scaling.attn_factor": 0.0}, "attn_factor' is 0.0; expected a number above zero"),
    ],
)
@pytest.mark.parametrize("architecture", ["qwen3", "qwen35", "granitehybrid", "gemma3"])
def test_scaling_that_is_refused(tmp_path: Path, architecture: str, keys: dict[str, Key], message: str) -> None:
    with pytest.raises(ModelFileError, match=f"'{architecture}.rope.scaling.{message}"):
        config_from_gguf(written(architecture, keys, tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    "architecture", [name for name in ROTATING if name not in ("qwen35", "qwen35moe", "qwen3next")]
)
def test_a_rotated_part_that_the_class_passes_over_is_refused(tmp_path: Path, architecture: str) -> None:
    path = written(architecture, {"rope.dimension_count": 8}, tmp_path / "x.gguf")
    with pytest.raises(ModelFileError, match=r"rope.dimension_count' is 8; expected .*all dimensions of a head"):
        config_from_gguf(path)


def test_qwen3next_rotates_whole_heads_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    """Transformers' own default is a quarter of them."""
    path = written("qwen3next", {"rope.dimension_count": None}, tmp_path / "x.gguf")
    assert config_from_gguf(path).rope_parameters["partial_rotary_factor"] == 1.0


@pytest.mark.parametrize(
    ("architecture", "key"), every_other(ARCHITECTURES, ["attention.causal", "pooling_type", "dense_2_feat_in"], 3)
)
def test_embedding_models_are_named(tmp_path: Path, architecture: str, key: str) -> None:
    value = {"attention.causal": False, "pooling_type": 3, "dense_2_feat_in": 64}[key]
    path = written(architecture, {key: value}, tmp_path / "x.gguf")
    with pytest.raises(ModelFileError, match=f"'{architecture}.{key}' is .*: this is an embedding model"):
        load_gguf(path)


def test_commands_name_embedding_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written("qwen35", {"pooling_type": 3}, tmp_path / "x.gguf")
    for command in (["run", "-m", str(path), "--ids", "5"], ["plan", "-m", str(path)]):
        assert main(command) == 2
        assert "this is an embedding model" in " ".join(capsys.readouterr().err.split())


def test_granitehybrid_divides_scores_by_the_root_of_the_head_dim(tmp_path: Path) -> None:
    removed: dict[str, Key | None] = {"attention.scale": None, "embedding_scale": None, "logit_scale": None}
    for change in (removed, dict.fromkeys(removed, 0.0)):
        config = config_from_gguf(written("granitehybrid", change, tmp_path / "x.gguf"))
        assert config.attention_multiplier == 16**-0.5
        assert config.embedding_multiplier == config.logits_scaling == 1.0
    config = config_from_gguf(written("granitehybrid", {"attention.scale": 0.5}, tmp_path / "x.gguf"))
    assert config.attention_multiplier == 0.5


def test_gemma3_has_a_whole_number_below_the_root(tmp_path: Path) -> None:
    path = written("gemma3", {"attention.scale": 0.3}, tmp_path / "x.gguf")
    with pytest.raises(ModelFileError, match=r"attention.scale' is 0.3\d*; expected one over the root of a whole"):
        config_from_gguf(path)


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_no_more_experts_are_used_than_there_are(
    tmp_path: Path, architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(architecture, {"expert_used_count": 5}, tmp_path / "x.gguf")
    with pytest.raises(ModelFileError, match="expert_used_count' is 5; expected a whole number from 1 to 4"):
        load_gguf(path)
    assert main(["run", "-m", str(path), "--ids", "5"]) == 2
    err = capsys.readouterr().err
    assert "error: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("architecture", ["qwen35moe", "qwen3next", "qwen3moe"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 0}, "expert_count' is 0; expected a whole number from 1"),
        ({"expert_used_count": 0}, "expert_used_count' is 0; expected a whole number from 1"),
        ({"expert_count": 3}, "has shape "),
    ],
)
def test_numbers_of_experts_that_no_model_has(
    tmp_path: Path, architecture: str, keys: dict[str, Any], message: str
) -> None:
    path = written(architecture, keys, tmp_path / "x.gguf")
    with pytest.raises(ModelFileError, match=message):
        load_gguf(path)
    with pytest.raises(ModelFileError, match=message):
        map_gguf(path)


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("nemotron_h_moe", {"expert_group_count": 3}, "expert_group_count' is 3; expected a divisor of 4 experts"),
        ("nemotron_h_moe", {"expert_group_count": 4}, "expert_group_count' is 4; expected a divisor of 4 experts"),
        (
            "nemotron_h_moe",
            {"expert_group_count": 2, "expert_group_used_count": 3},
            "expert_group_used_count' is 3; expected a whole number from 1 to 2",
        ),
        (
            "nemotron_h_moe",
            {"expert_group_count": 2, "expert_group_used_count": 1, "expert_used_count": 3},
            "3 experts are used, and 1 of 2 groups have fewer",
        ),
        ("lfm2moe", {"leading_dense_block_count": 5}, "leading_dense_block_count' is 5; expected .* from 0 to 4"),
        ("qwen3moe", {"expert_group_count": 2}, "expert_group_count' is 2; expected 1: groups of experts"),
        ("qwen3moe", {"expert_gating_func": 2}, r"expert_gating_func' is 2; expected 1 \(softmax\)"),
        ("qwen3moe", {"expert_weights_norm": False}, "expert_weights_norm' is False; expected true"),
        ("jamba", {"expert_weights_norm": True}, "expert_weights_norm' is True; expected false"),
        ("lfm2moe", {"expert_weights_scale": 2.5}, "expert_weights_scale' is 2.5; expected 1.0"),
        ("lfm2", {"attention.sliding_window": 6}, "attention.sliding_window' is 6; expected 0, or no less than the"),
        ("qwen2", {"attention.key_length": 8, "attention.value_length": 8}, "key_length' is 8; expected 16"),
        ("jamba", {"attention.key_length": 8, "attention.value_length": 8}, "key_length' is 8; expected 16"),
        ("qwen3", {"attention.head_count": 128, "attention.key_length": None, "attention.value_length": None}, "heads"),
    ],
)
def test_counts_and_ways_of_choosing(tmp_path: Path, architecture: str, keys: dict[str, Key], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        load_gguf(written(architecture, keys, tmp_path / "x.gguf"))


def test_nemotrons_weights_are_not_normalised_unless_the_file_says_so(tmp_path: Path) -> None:
    path = written("nemotron_h_moe", {"expert_weights_norm": None}, tmp_path / "x.gguf")
    assert config_from_gguf(path).norm_topk_prob is False


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_key_is_in_a_table(tmp_path: Path, architecture: str) -> None:
    """A file with every key there is, at a value that means nothing, is the same model and gives no notice."""
    base = draft(architecture).keys
    # Keys that some architecture reads, or that depend on other keys.
    neutral: dict[str, Key] = {
        "nextn_predict_layers": 0,
        "rope.scaling.type": "linear",
        **dict.fromkeys(("rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor"), 1.0),
        "expert_gating_func": 0,
        "expert_weights_norm": architecture not in ("jamba", "nemotron_h_moe"),
        "norm_top_k_prob": architecture != "jamba",
        "expert_weights_scale": 1.0,
        "attention.scale": 0.0,
        "final_logit_softcapping": 0.0,
        "ssm.v_head_reordered": architecture.startswith("qwen35"),
        "embedding_length_out": base["embedding_length"],
        "attention.key_length_swa": base["attention.key_length"],
        "attention.value_length_swa": base["attention.key_length"],
        "rope.dimension_count_swa": base.get("rope.dimension_count", base["attention.key_length"]),
    }
    # What these say depends on the layers.
    layered = {"full_attention_interval", "attention.recurrent_layers", "moe_latent_size"}
    added = {
        name: neutral[name] if name in neutral else NEUTRAL[name].values[0] if name in NEUTRAL else 1
        for name in names()
        if name not in base and name not in layered
    }
    assert len(added) > 80
    plain = config_from_gguf(written(architecture, {}, tmp_path / "x.gguf"))
    loaded = load_gguf(written(architecture, added, tmp_path / "y.gguf"))
    assert loaded.notices == ()
    assert {**loaded.model.config.to_dict(), "dtype": None} == {**plain.to_dict(), "dtype": None}


@pytest.mark.parametrize(
    ("architecture", "value"), every_other(["gemma3", "nemotron_h_moe"], [[7, 8, 9], "x", float("nan"), True])
)
@pytest.mark.filterwarnings("ignore")
def test_a_value_of_another_kind_is_refused_or_harmless(tmp_path: Path, architecture: str, value: Key) -> None:
    for name in names():
        path = written(architecture, {name: value}, tmp_path / "x.gguf")
        with contextlib.suppress(ModelFileError):
            config_from_gguf(path)


def test_an_unknown_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written("qwen3", {"mystery.factor": 0.5, "vision.block_count": 3}, tmp_path / "x.gguf")
    notice = "metadata key 'qwen3.mystery.factor' is not known and was passed over: 0.5"
    assert load_gguf(path).notices == (notice,)
    assert main(["run", "-m", str(path), "--ids", "5", "-n", "2"]) == 0
    assert notice in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(lambda: REFERENCE, id="bundled"),
        pytest.param(smollm2, id="smollm2", marks=pytest.mark.slow),
        pytest.param(gemma3, id="gemma3", marks=pytest.mark.slow),
    ],
)
def test_real_files_load_without_a_notice(path: Any) -> None:
    assert load_gguf(path()).notices == ()


@pytest.mark.parametrize(
    ("family", "rope", "message"),
    [
        ("falcon_h1", {"rope_type": "default", "partial_rotary_factor": 0.5}, "concerns a part of each head"),
        ("llama", {"rope_type": "default", "partial_rotary_factor": 0.5}, "concerns a part of each head"),
        ("qwen3_5_text", YARN_FIELDS | {"truncate": False}, "YaRN is not rounded"),
        ("qwen3", YARN_FIELDS | {"mscale": 0.7, "mscale_all_dim": 1.3}, "a magnitude of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_rope_that_a_file_cannot_say_is_not_written(family: str, rope: dict[str, Any], message: str) -> None:
    config = build(family).config
    config.rope_parameters = {"rope_theta": 1e4, **rope}
    with pytest.raises(ModelError, match=message):
        find_architecture(config)


def test_yarns_magnitude_is_written_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e4, **YARN_FIELDS, "attention_factor": 1.7}
    build("qwen3", rope_parameters=rope).save_pretrained(tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path / "x.gguf", weights="f32").path
    keys = read_header(path).metadata
    assert keys["qwen3.rope.scaling.attn_factor"] == pytest.approx(1.7 / (1 + 0.1 * math.log(4)))
    assert config_from_gguf(path).rope_parameters["attention_factor"] == pytest.approx(1.7)


def test_jamba_without_experts_has_no_count_of_them(tmp_path: Path) -> None:
    """llama.cpp ends the process over a file that uses more experts than it has."""
    build("jamba", num_experts=1).save_pretrained(tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path / "x.gguf", weights="f32").path
    assert not [key for key in read_header(path).metadata if "expert_" in key]
    assert load_gguf(path).model.config.num_experts == 1
