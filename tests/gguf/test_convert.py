"""`hybridkv convert` beyond the weights' round trip: tokenizers, types, other engines, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from hybridkv.cli.main import main
from hybridkv.engine.convert import convert
from hybridkv.errors import HybridKVError, ModelError
from hybridkv.gguf.load import load_gguf
from hybridkv.gguf.tokenizer_keys import tokenizer_keys
from tests.families import build
from tests.gguf.reference import REFERENCE, heldout_text, original_tokenizer_json
from tests.gguf.test_architectures import stirred
from tests.oracles import ik_llama

_DELTA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    # What ik_llama.cpp's kernels take.
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 64,
}
IN_IK = {
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "qwen3_next": _DELTA,
    "llama": {"attention_bias": False},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
}
IDS = [5, 7, 11, 13, 17, 19, 23, 29]


@pytest.mark.parametrize("family", IN_IK)
def test_the_file_runs_in_ik_llama(tmp_path: Path, family: str) -> None:
    model = stirred(family, **IN_IK[family])
    model.save_pretrained(tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path / "x.gguf", weights="f32").path
    with ik_llama.model(path, n_ctx=64) as engine:
        theirs = torch.from_numpy(engine.logits(IDS))
    with torch.inference_mode():
        ours = model(torch.tensor([IDS])).logits[0]
    assert (ours - theirs).norm() / theirs.norm() < 2e-3  # its cache is float16


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """The bundled model as a Hugging Face directory."""
    loaded = load_gguf(REFERENCE)
    directory = tmp_path / "reference"
    loaded.model.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_original(tmp_path))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


def _original(tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.json").write_text(original_tokenizer_json(), encoding="utf-8")
    return directory


def test_a_tokenizer_comes_along(tmp_path: Path, reference: Path) -> None:
    done = convert(reference, tmp_path / "x.gguf", weights="q8_0")
    assert done.notices == ()
    loaded, bundled = load_gguf(done.path), load_gguf(REFERENCE)
    assert loaded.tokenizer is not None
    assert bundled.tokenizer is not None
    text = heldout_text()
    assert loaded.tokenizer(text).input_ids == bundled.tokenizer(text).input_ids
    assert loaded.tokenizer.chat_template.startswith("{% for m in messages %}")
    assert loaded.model.generation_config.eos_token_id == bundled.model.generation_config.eos_token_id
    # q8_0 of numbers that were q8_0 changes them by a rounding of the scale at most.
    ids = bundled.tokenizer("Hello world", return_tensors="pt").input_ids
    with torch.inference_mode():
        ours, theirs = loaded.model(ids).logits, bundled.model(ids).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-2


def test_types(tmp_path: Path) -> None:
    build("lfm2_moe", hidden_size=64, moe_intermediate_size=48).save_pretrained(tmp_path / "model")
    for asked, others in (("f32", set()), ("f16", {"F16"}), ("q8_0", {"Q8_0", "F16"})):
        path = convert(tmp_path / "model", tmp_path / f"{asked}.gguf", weights=asked).path
        types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
        assert set(types.values()) == {"F32"} | others
        for name in ("output_norm", "attn_norm", "ffn_gate_inp", "shortconv.conv", "exp_probs_b"):
            assert all(type_ == "F32" for tensor, type_ in types.items() if name in tensor)
        # Rows of 48 values fill no blocks of 32.
        assert types["blk.2.ffn_down_exps.weight"] == {"f32": "F32", "f16": "F16", "q8_0": "F16"}[asked]


def test_the_same_directory_gives_the_same_file(tmp_path: Path) -> None:
    build("qwen3_next").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    one, two = (convert(tmp_path / "model", tmp_path / f"{n}.gguf").path.read_bytes() for n in range(2))
    assert one == two


def test_what_the_class_has_no_place_for_is_left_out_with_a_notice(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    rewritten(directory, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(4, 4)}))
    done = convert(directory, tmp_path / "x.gguf")
    assert "1 tensors were left out" in done.notices[-1]
    assert "mtp.fc.weight" in done.notices[-1]


def test_the_text_model_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """As Qwen3.5 is published: another prefix, a config within a config, and weights of an image encoder."""
    directory = saved(tmp_path)
    expected = load_gguf(convert(directory, tmp_path / "text.gguf", weights="f32").path).model.state_dict()
    text = json.loads((directory / "config.json").read_text("utf-8"))
    config = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def prefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)
        tensors["model.visual.patch_embed.proj.bias"] = torch.ones(8)

    rewritten(directory, prefix)
    done = convert(directory, tmp_path / "x.gguf", weights="f32")
    assert "model.visual.patch_embed.proj.bias" in done.notices[-1]
    loaded = load_gguf(done.path).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_a_hybrid_class_without_a_recurrent_layer(tmp_path: Path) -> None:
    """As Granite 4.0's dense models are published."""
    options = {"layer_types": ["attention"] * 4, "position_embedding_type": "rope", "num_local_experts": 0}
    model = stirred("granitemoehybrid", attention_multiplier=0.2, logits_scaling=3.0, **options)
    model.save_pretrained(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "x.gguf", weights="f32")
    loaded = load_gguf(done.path).model
    assert (done.architecture, loaded.config.model_type) == ("granite", "granite")
    with torch.inference_mode():
        ours, expected = loaded(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("granitemoehybrid", {"layer_types": ["attention"] * 4}, "granite: some of its layers are recurrent, or have"),
        ("granitemoehybrid", {"time_step_limit": (0.001, 0.1)}, "granitehybrid: its mixers' time steps are limited"),
        ("falcon_h1", {"time_step_limit": (0.0, 0.1)}, "falcon-h1: its mixers' time steps are limited"),
    ],
)
def test_configs_that_the_format_has_no_place_for(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    build(family, **changes).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "model", tmp_path / "x.gguf")


def saved(tmp_path: Path, family: str = "qwen3_5_text") -> Path:
    build(family).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configured(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def _integers(directory: Path) -> None:
    rewritten(directory, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))


def _huge(directory: Path) -> None:
    rewritten(directory, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(1e6))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown model_type": (
        lambda d: configured(d, model_type="gpt2"),
        "unknown model_type 'gpt2'; known: .*jamba.*qwen3_5_text",
    ),
    "no such model_type": (lambda d: configured(d, model_type="mystery"), "config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "not safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 64), "cannot be read"),
    "integers": (_integers, "'model.norm.weight' .* has dtype I8; allowed: F64, F32, F16, BF16"),
    "a tensor missing": (
        lambda d: rewritten(d, lambda t: t.pop("model.norm.weight")),
        "1 tensors are missing .*: model.norm.weight",
    ),
    "another shape": (
        lambda d: rewritten(d, lambda t: t.update({"model.norm.weight": torch.ones(63)})),
        r"model.norm.weight has shape \[63\] .* asks for \[64\]",
    ),
    "scaled RoPE": (
        lambda d: configured(d, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "cannot be written as GGUF: qwen35: its RoPE is of type 'dynamic'",
    ),
    "more than float16 holds": (_huge, "'blk.0.ffn_up.weight' holds 1e.06, more than F16 can"),
    "an index that is none": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "is no index"),
    "an index of a missing file": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-2.safetensors"}}'),
        "part-2.safetensors is missing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path)
    spoil, message = BAD[name]
    spoil(directory)
    with pytest.raises(HybridKVError, match=message):
        convert(directory, tmp_path / "x.gguf")
    assert main(["convert", str(directory), "-o", str(tmp_path / "x.gguf")]) == 2
    assert "error: " in capsys.readouterr().err
    # Neither the file nor a piece of it stays.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, path = saved(tmp_path), tmp_path / "x.gguf"
    path.write_bytes(b"mine")
    assert main(["convert", str(directory), "-o", str(path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert path.read_bytes() == b"mine"
    assert main(["convert", str(directory), "-o", str(path), "--force"]) == 0
    assert "qwen35" in capsys.readouterr().out
    assert load_gguf(path).model.config.model_type == "qwen3_5_text"


@pytest.mark.parametrize("output", ["nowhere/x.gguf", "model"])
def test_no_place_for_the_file(tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(saved(tmp_path)), "-o", str(tmp_path / output)]) == 2
    assert "no place for a file" in capsys.readouterr().err


def test_a_tokenizer_that_gguf_has_no_name_for(tmp_path: Path, reference: Path) -> None:
    path = reference / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(ModelError, match=r"splits text in a way that no GGUF name is known for: .'<Whitespace>'"):
        tokenizer_keys(content, 10**6)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="--no-tokenizer"):
        convert(reference, tmp_path / "x.gguf")
    assert main(["convert", str(reference), "-o", str(tmp_path / "x.gguf"), "--no-tokenizer"]) == 0
    assert load_gguf(tmp_path / "x.gguf").tokenizer is None


def test_other_kinds_of_tokenizer() -> None:
    with pytest.raises(ModelError, match="of type 'Unigram'; allowed: byte-level BPE"):
        tokenizer_keys({"model": {"type": "Unigram"}}, 10)
    with pytest.raises(ModelError, match="has a token 12; the model has 10"):
        tokenizer_keys({"model": {"type": "BPE", "vocab": {"a": 12}, "merges": []}}, 10)
