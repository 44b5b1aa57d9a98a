"""Files that are sound GGUF and no sound model: each gives one error that names what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from hybridkv.errors import ModelFileError
from hybridkv.gguf.load import load_gguf
from hybridkv.hf import Holder
from hybridkv.kernels.weights import Weight
from tests.gguf import raw
from tests.gguf.reference import config_from_gguf
from tests.gguf.write_qwen35 import Draft, Key, add_key, draft, tiny_model

MODEL = tiny_model()
FLOAT = "a number above zero"
WHOLE = "a whole number from 1 to"


def without_key(name: str) -> Callable[[Draft], None]:
    def spoil(file: Draft) -> None:
        del file.keys[f"qwen35.{name}"]

    return spoil


def with_key(name: str, value: Key) -> Callable[[Draft], None]:
    return lambda file: file.keys.update({f"qwen35.{name}": value})


def without_tensors(part: str) -> Callable[[Draft], None]:
    def spoil(file: Draft) -> None:
        file.tensors = {name: values for name, values in file.tensors.items() if part not in name}

    return spoil


# What spoils the metadata is found from the header alone, by `config_from_gguf` and `load_gguf` alike.
REQUIRED = {
    "block_count": WHOLE,
    "context_length": WHOLE,
    "embedding_length": WHOLE,
    "feed_forward_length": WHOLE,
    "attention.head_count": WHOLE,
    "attention.head_count_kv": WHOLE,
    "attention.key_length": WHOLE,
    "attention.layer_norm_rms_epsilon": FLOAT,
    "rope.freq_base": FLOAT,
    "rope.dimension_count": "a whole number from 2 to",
    "rope.dimension_sections": "4 whole numbers",
    "ssm.conv_kernel": WHOLE,
    "ssm.state_size": WHOLE,
    "ssm.group_count": WHOLE,
    "ssm.time_step_rank": WHOLE,
    "ssm.inner_size": WHOLE,
}
BAD_KEYS: dict[str, tuple[Callable[[Draft], None], str]] = {
    **{
        f"no {key}": (without_key(key), f"'qwen35.{key}' is missing; expected {what}") for key, what in REQUIRED.items()
    },
    "no layer types": (
        without_key("full_attention_interval"),
        "nothing says which of the 4 layers are attention layers",
    ),
    "no layers": (with_key("block_count", 0), "'qwen35.block_count' is 0"),
    "billions of layers": (with_key("block_count", 2**32 - 1), "'qwen35.block_count' is 4294967295"),
    "interval zero": (with_key("full_attention_interval", 0), "full_attention_interval' is 0"),
    "huge width": (with_key("embedding_length", 2**31), "embedding_length' is 2147483648"),
    "huge head": (with_key("attention.key_length", 2**30), "key_length' is 1073741824"),
    "text for a number": (with_key("embedding_length", "64"), "embedding_length' is '64'"),
    "flag for a number": (with_key("embedding_length", True), "embedding_length' is True"),
    "number for a float": (with_key("rope.freq_base", 10000), "freq_base' is 10000; expected"),
    "epsilon NaN": (with_key("attention.layer_norm_rms_epsilon", float("nan")), "epsilon' is nan"),
    "epsilon zero": (with_key("attention.layer_norm_rms_epsilon", 0.0), "epsilon' is 0.0"),
    "K and V of two sizes": (with_key("attention.value_length", 16), "value_length' is 16; expected"),
    "heads that do not group": (with_key("attention.head_count", 3), "3 query heads .* multiple of 2"),
    "value heads that do not group": (with_key("ssm.time_step_rank", 3), "3 value heads: a multiple of 2"),
    "rotates more than the head": (with_key("rope.dimension_count", 34), "dimension_count' is 34"),
    "rotates an odd part": (with_key("rope.dimension_count", 7), "dimension_count' is 7; expected an even"),
    "two sections": (with_key("rope.dimension_sections", [2, 1]), "expected 4 whole numbers"),
    "three sections, one negative": (with_key("rope.dimension_sections", [2, 1, -1]), "expected 3 whole numbers"),
    "negative section": (with_key("rope.dimension_sections", [-2, 1, 1, 0]), "expected 4 whole numbers"),
    "a fourth section": (with_key("rope.dimension_sections", [2, 1, 0, 1]), "expected 0 dimensions in a fourth"),
    "scaled RoPE": (with_key("rope.scaling.type", "longrope"), "scaling.type' is 'longrope'; expected 'none'"),
    "KV heads of too few layers": (with_key("attention.head_count_kv", [0, 2]), "expected 4 whole numbers"),
    "KV heads that differ": (with_key("attention.head_count_kv", [1, 0, 0, 2]), "one number of KV heads"),
    "KV heads in no layer": (with_key("attention.head_count_kv", [0] * 4), "one number of KV heads"),
    "only prediction blocks": (with_key("nextn_predict_layers", 4), "nextn_predict_layers' is 4"),
    "split": (
        lambda file: file.keys.update({"split.count": 3}),
        "one of 3 parts, and not named like one",
    ),
    "bos beyond the vocabulary": (
        lambda file: file.keys.update({"tokenizer.ggml.bos_token_id": 288}),
        "bos_token_id' is 288",
    ),
    "more tokens than rows": (
        lambda file: file.keys.update({"tokenizer.ggml.tokens": ["x"] * 289}),
        "more tokens than the 288 rows of 'token_embd.weight'",
    ),
    "no embedding": (without_tensors("token_embd"), "'token_embd.weight' is missing"),
}


def replaced(name: str, shape: tuple[int, ...]) -> Callable[[Draft], None]:
    return lambda file: file.tensors.update({name: np.ones(shape, np.float32)})


BAD_TENSORS: dict[str, tuple[Callable[[Draft], None], str]] = {
    "missing": (
        without_tensors("blk.1.ssm_a"),
        r"2 missing tensor.s. for architecture 'qwen35': blk.1.ssm_a, blk.1.ssm_alpha.weight\n",
    ),
    "many missing": (
        without_tensors(".ffn_"),
        r"12 missing tensor.s. .*: blk.0.ffn_down.weight, .*, \.\.\.",
    ),
    "unknown": (replaced("blk.0.attn_q.bias", (4,)), r"1 unknown tensor.s. .*: blk.0.attn_q.bias\n"),
    "block beyond the last": (replaced("blk.4.attn_norm.weight", (64,)), "unknown .* blk.4.attn_norm.weight"),
    "layers of another type": (
        with_key("full_attention_interval", 2),
        "missing tensor.s. .*: blk.1.attn_k.weight",
    ),
    "shape": (
        replaced("blk.0.ffn_up.weight", (96, 32)),
        r"'blk.0.ffn_up.weight' has shape \[96, 32\]; the metadata asks for \[96, 64\] .*mlp.up_proj",
    ),
    "transposed": (
        replaced("blk.0.ffn_up.weight", (64, 96)),
        r"\[64, 96\]; the metadata asks for \[96, 64\]",
    ),
    "vector": (replaced("blk.0.ssm_a", (5,)), r"'blk.0.ssm_a' has shape \[5\]"),
    "flat embedding": (replaced("token_embd.weight", (288,)), r"'token_embd.weight' has shape \[288\]"),
    "another width": (with_key("embedding_length", 32), r"asks for \[.*32\]"),
}


def spoiled(tmp_path: Path, spoil: Callable[[Draft], None]) -> Path:
    file = draft(MODEL)
    spoil(file)
    return file.write(tmp_path / "bad.gguf")


@pytest.mark.parametrize("name", BAD_KEYS)
def test_metadata(tmp_path: Path, name: str) -> None:
    spoil, message = BAD_KEYS[name]
    path = spoiled(tmp_path, spoil)
    for read in (config_from_gguf, load_gguf):
        with pytest.raises(ModelFileError, match=message) as caught:
            read(path)
        assert str(path) in caught.value.message


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors(tmp_path: Path, name: str) -> None:
    spoil, message = BAD_TENSORS[name]
    path = spoiled(tmp_path, spoil)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_gguf(path)
    assert str(path) in caught.value.message


def test_the_file_before_it_is_spoiled_loads(tmp_path: Path) -> None:
    assert load_gguf(spoiled(tmp_path, lambda file: None)).model.num_parameters() == MODEL.num_parameters()


@pytest.mark.parametrize("read", [config_from_gguf, load_gguf])
def test_an_unknown_architecture_lists_the_known(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = Draft("mystery", tensors={"token_embd.weight": np.ones((2, 2), np.float32)}).write(tmp_path / "x.gguf")
    with pytest.raises(ModelFileError, match="unknown architecture 'mystery'; known: qwen35"):
        read(path)


@pytest.mark.parametrize("left", [0, 30_000])
def test_a_file_that_shrinks_while_it_is_loaded(tmp_path: Path, left: int) -> None:
    """A mapped file would end the process with a bus error."""
    path = draft(MODEL).write(tmp_path / "x.gguf")
    size = path.stat().st_size

    class Shrinking(Holder):
        def of_file(self, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
            os.truncate(path, left)
            return super().of_file(weight, dtype)

        def of_values(self, parameter: torch.Tensor) -> torch.Tensor:
            os.truncate(path, left)
            return super().of_values(parameter)

    with pytest.raises(ModelFileError, match=f"changed from {size} to {left} bytes while it was being read"):
        load_gguf(path, hold=Shrinking("plain"))


OTHER_KINDS: dict[str, tuple[Draft, str]] = {
    "mmproj": (
        Draft("clip", {"general.type": "mmproj"}, {"v.blk.0.attn_q.weight": np.ones((2, 2), np.float32)}),
        r"is a multimodal projector \(mmproj\).*\nhint: give the language model's own file",
    ),
    "mmproj of before general.type": (
        Draft("clip", {"clip.has_vision_encoder": True}, {"mm.0.weight": np.ones((2, 2), np.float32)}),
        "is a multimodal projector",
    ),
    "LoRA adapter": (
        Draft(
            "qwen35",
            {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 16.0},
            {"blk.0.attn_q.weight.lora_a": np.ones((4, 64), np.float32)},
        ),
        r"is an adapter \(LoRA\).*\nhint: merge it into its base model",
    ),
    "LoRA adapter without general.type": (
        Draft("qwen35", {"adapter.type": "lora"}, {"blk.0.attn_q.weight.lora_a": np.ones((4, 64), np.float32)}),
        "is an adapter",
    ),
    "control vector": (
        Draft("controlvector", {}, {"direction.1": np.ones(64, np.float32)}),
        "is a control vector",
    ),
    "a kind of tomorrow": (
        Draft("qwen35", {"general.type": "sparse-delta"}, {"x": np.ones(2, np.float32)}),
        "is of general.type 'sparse-delta'; allowed: a language model",
    ),
    "draft head": (
        Draft(
            "qwen35",
            draft(MODEL).keys | {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1},
            {
                "token_embd.weight": draft(MODEL).tensors["token_embd.weight"],
                "output_norm.weight": draft(MODEL).tensors["output_norm.weight"],
                "blk.4.attn_norm.weight": np.ones(64, np.float32),
                "blk.4.nextn.eh_proj.weight": np.ones((64, 128), np.float32),
            },
        ),
        "is a draft head: it holds blocks of multi-token prediction.*\nhint: give the file of the model itself",
    ),
    "draft head in other words": (
        Draft(
            "qwen35",
            {},
            {"token_embd.weight": np.ones((4, 4), np.float32), "mtp.fc.weight": np.ones((4, 8), np.float32)},
        ),
        "is a draft head",
    ),
    "draft head counted from 0": (
        Draft(
            "qwen35moe",
            {"qwen35moe.block_count": 1, "qwen35moe.nextn_predict_layers": 1},
            {"blk.0.nextn.eh_proj.weight": np.ones((64, 128), np.float32)},
        ),
        "is a draft head",
    ),
}


@pytest.mark.parametrize("read", [config_from_gguf, load_gguf])
@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_file_that_is_no_language_model_is_named(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    file, message = OTHER_KINDS[name]
    path = file.write(tmp_path / "x.gguf")
    with pytest.raises(ModelFileError, match=message):
        read(path)


def test_an_importance_matrix_is_named_though_it_has_no_architecture(tmp_path: Path) -> None:
    kind = raw.key("general.type", raw.STRING, raw.text("imatrix"))
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(
        raw.gguf([kind], [raw.tensor("blk.0.attn_q.weight.in_sum2", [8])], data=bytes(32), architecture=b"")
    )
    with pytest.raises(ModelFileError, match=r"is an importance matrix.*\nhint: give the file of the model itself"):
        config_from_gguf(path)


def test_a_model_beside_its_prediction_block_is_no_draft_head(tmp_path: Path) -> None:
    file = draft(MODEL)
    file.keys |= {"general.type": "model", "qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    file.tensors["blk.4.nextn.eh_proj.weight"] = np.ones((64, 128), np.float32)
    assert load_gguf(file.write(tmp_path / "x.gguf")).notices == (
        "1 tensors of multi-token prediction blocks were skipped",
    )


@pytest.mark.parametrize("read", [config_from_gguf, load_gguf])
def test_an_architecture_that_is_refused_says_what_is_missing(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = Draft("qwen4exp", tensors={"token_embd.weight": np.ones((2, 2), np.float32)}).write(tmp_path / "x.gguf")
    with pytest.raises(ModelFileError, match="'qwen4exp' is not supported: it needs hyper-connections") as caught:
        read(path)
    assert "directory" not in str(caught.value)


def test_a_tensor_type_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    file = draft(MODEL)
    writer = GGUFWriter(tmp_path / "x.gguf", "qwen35")
    for key, value in file.keys.items():
        add_key(writer, key, value)
    for name, values in file.tensors.items():
        if name == "blk.3.attn_k.weight":
            writer.add_tensor(name, values.astype(np.float64), raw_dtype=GGMLQuantizationType.F64)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=r"'blk.3.attn_k.weight' has type F64, .* allowed: F32, F16, Q4_0"):
        load_gguf(tmp_path / "x.gguf")
