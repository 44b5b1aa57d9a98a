from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

from hybridkv.errors import ModelFileError, UsageError
from hybridkv.gguf.architectures.record import grouped
from hybridkv.gguf.load import load_gguf
from tests.gguf.reference import config_from_gguf
from tests.gguf.write_qwen35 import Draft, draft, tiny_model

IDS = torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(0))


def relative_error(model: PreTrainedModel, expected: PreTrainedModel) -> float:
    with torch.inference_mode():
        ours, theirs = model(IDS).logits, expected(IDS).logits
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("n_key", "n_value"), [(2, 2), (2, 4), (2, 6), (1, 3), (3, 3)])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_transformers_model(tmp_path: Path, n_key: int, n_value: int, tied: bool) -> None:
    model = tiny_model(n_key, n_value, tied=tied)
    loaded = load_gguf(draft(model).write(tmp_path / "x.gguf"))
    assert relative_error(loaded.model, model) <= 1e-5
    assert not loaded.model.training
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
    assert (loaded.name, loaded.notices) == ("tiny", ())


def test_the_head_order_matters() -> None:
    """A loader without the reordering would not pass: the tiled weights are another model's."""
    model, other = tiny_model(2, 4), tiny_model(2, 4)
    for layer in other.model.layers[:3]:
        weight = layer.linear_attn.in_proj_z.weight
        with torch.no_grad():
            weight.copy_(weight.reshape(2, 2, 32, -1).transpose(0, 1).reshape(weight.shape))
    assert relative_error(other, model) > 1e-2


@pytest.mark.parametrize(("n_groups", "n_heads"), [(1, 1), (2, 4), (2, 6), (3, 6), (4, 4)])
@pytest.mark.parametrize("start", [0, 5])
def test_grouped_sends_each_head_to_its_key_head(n_groups: int, n_heads: int, start: int) -> None:
    order = grouped(n_groups, n_heads, 3, start)
    assert sorted(order) == list(range(start + 3 * n_heads))
    assert list(order[:start]) == list(range(start))
    for head in range(n_heads):
        rows = order[start + 3 * head : start + 3 * head + 3] - start
        assert list(rows) == list(range(rows[0], rows[0] + 3))
        assert rows[0] // 3 % n_groups == head // (n_heads // n_groups)


QUANTIZABLE = (T.F16, T.BF16, T.Q8_0, T.Q5_1, T.Q5_0, T.Q4_1, T.Q4_0)


def mixed(name: str) -> T:
    """Give every matrix of the model a type, all types among them."""
    return QUANTIZABLE[sum(map(ord, name)) % len(QUANTIZABLE)]


@pytest.mark.parametrize("type_", [*QUANTIZABLE, None], ids=lambda type_: type_.name if type_ else "mixed")
def test_quantized_weights_are_what_gguf_py_decodes(tmp_path: Path, type_: T | None) -> None:
    """The file with quantized matrices loads as the file with the same matrices decoded."""
    stored = draft(tiny_model(2, 6))
    type_of = mixed if type_ is None else lambda name: type_
    decoded = Draft(keys=stored.keys)
    for name, values in stored.tensors.items():
        plain = values.ndim == 1 or "conv1d" in name
        kind = T.F32 if plain else type_of(name)
        decoded.tensors[name] = dequantize(quantize(values, kind), kind).reshape(values.shape)
    ours = load_gguf(stored.write(tmp_path / "quantized.gguf", type_of)).model.state_dict()
    expected = load_gguf(decoded.write(tmp_path / "decoded.gguf")).model.state_dict()
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_buffers(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model()
    loaded = load_gguf(draft(model).write(tmp_path / "x.gguf"), dtype=dtype, attn_implementation="eager").model
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.dtype == dtype
    for name, value in model.state_dict().items():
        ours = loaded.state_dict()[name]
        assert ours.dtype == dtype
        assert ours.device.type == "cpu"
        # Conversions round in float32: one rounding to the target remains.
        assert torch.allclose(ours.float(), value.to(dtype).float(), rtol=1e-2 * (dtype != torch.float32), atol=2e-6)
    expected = dict(model.named_buffers())
    assert {name: value.dtype for name, value in loaded.named_buffers()} == dict.fromkeys(expected, torch.float32)
    for name, value in loaded.named_buffers():
        assert torch.equal(value, expected[name])


def test_no_weight_keeps_a_gradient(tmp_path: Path) -> None:
    model = load_gguf(draft(tiny_model()).write(tmp_path / "x.gguf")).model
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_only_float_dtypes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights cannot be torch"):
        load_gguf(tmp_path / "x.gguf", dtype=torch.int8)


def test_config_from_the_header_alone(tmp_path: Path) -> None:
    model = tiny_model(2, 6)
    path = draft(model).write(tmp_path / "x.gguf")
    config = config_from_gguf(path)
    expected = model.config.to_dict()
    ignored = {"dtype", "architectures", "transformers_version", "_name_or_path"}
    assert {key: value for key, value in config.to_dict().items() if key not in ignored} == {
        key: value for key, value in expected.items() if key not in ignored
    }
    assert config.architectures == ["Qwen3_5ForCausalLM"]


def test_layer_types_from_kv_heads_per_layer(tmp_path: Path) -> None:
    model = tiny_model()
    file = draft(model)
    del file.keys["qwen35.full_attention_interval"]
    file.keys["qwen35.attention.head_count_kv"] = [0, 0, 0, 2]
    loaded = load_gguf(file.write(tmp_path / "x.gguf"))
    assert loaded.model.config.layer_types == model.config.layer_types
    assert relative_error(loaded.model, model) <= 1e-5


def test_multi_token_prediction_blocks_are_skipped_with_a_notice(tmp_path: Path) -> None:
    model = tiny_model()
    file = draft(model)
    file.keys["qwen35.block_count"] = 5
    file.keys["qwen35.nextn_predict_layers"] = 1
    file.tensors["blk.4.nextn.eh_proj.weight"] = np.ones((64, 128), np.float32)
    file.tensors["blk.4.attn_norm.weight"] = np.ones(64, np.float32)
    loaded = load_gguf(file.write(tmp_path / "x.gguf"))
    assert loaded.notices == ("2 tensors of multi-token prediction blocks were skipped",)
    assert loaded.model.config.num_hidden_layers == 4
    assert relative_error(loaded.model, model) <= 1e-5


def as_ollama_writes(model: PreTrainedModel) -> Draft:
    """Three sections, another name of a bias, KV heads per layer, and the rest of the multimodal model."""
    file = draft(model)
    del file.keys["qwen35.full_attention_interval"]
    file.keys |= {"qwen35.attention.head_count_kv": [0, 0, 0, 2], "qwen35.rope.dimension_sections": [2, 1, 1]}
    for layer in range(3):
        file.tensors[f"blk.{layer}.ssm_dt"] = file.tensors.pop(f"blk.{layer}.ssm_dt.bias")
    for name in ("v.blk.0.attn_q.weight", "v.patch_embed.weight", "mm.0.weight", "mtp.fc.weight", "mtp.norm.weight"):
        file.tensors[name] = np.ones((4, 4), np.float32)
    return file


def test_a_file_of_ollama(tmp_path: Path) -> None:
    model = tiny_model()
    file = as_ollama_writes(model)
    loaded = load_gguf(file.write(tmp_path / "x.gguf"))
    assert loaded.notices == (
        "2 tensors of multi-token prediction blocks were skipped",
        "3 tensors of image and audio encoders were skipped",
    )
    assert loaded.model.config.to_dict() | {"architectures": None} == load_gguf(
        draft(model).write(tmp_path / "y.gguf")
    ).model.config.to_dict() | {"architectures": None}
    assert relative_error(loaded.model, model) <= 1e-5
    # What is unknown inside of the text model is not passed over.
    for name in ("blk.0.mm.weight", "vision.weight", "output_scale.weight"):
        file = as_ollama_writes(model)
        file.tensors[name] = np.ones((4, 4), np.float32)
        with pytest.raises(ModelFileError, match=rf"1 unknown tensor.s. .*: {name}"):
            load_gguf(file.write(tmp_path / "x.gguf"))


def test_a_prediction_block_that_the_file_leaves_out(tmp_path: Path) -> None:
    model = tiny_model()
    file = draft(model)
    file.keys |= {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    loaded = load_gguf(file.write(tmp_path / "x.gguf"))
    assert loaded.notices == ()
    assert relative_error(loaded.model, model) <= 1e-5


@pytest.mark.parametrize(("pre", "said"), [("default", "is 'default'"), (None, "is missing"), ("", "is missing")])
def test_a_pre_tokenizer_that_is_assumed(tmp_path: Path, pre: str | None, said: str) -> None:
    file = draft(tiny_model())
    del file.keys["tokenizer.ggml.pre"]
    if pre is not None:
        file.keys["tokenizer.ggml.pre"] = pre
    loaded = load_gguf(file.write(tmp_path / "x.gguf"))
    (notice,) = loaded.notices
    assert f"'tokenizer.ggml.pre' {said}" in notice
    assert "llama.cpp's default is assumed" in notice
    assert loaded.tokenizer is not None
    # Digits come in threes; punctuation stays together.
    tokens = [token for token, _ in loaded.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 1234+=(b")]
    assert tokens == ["a", "Ġ", "123", "4", "+=(", "b"]


def test_generation_ends_where_the_file_says(tmp_path: Path) -> None:
    file = draft(tiny_model())
    file.keys["tokenizer.ggml.eot_token_id"] = 3
    file.keys["tokenizer.ggml.eom_token_id"] = 257
    generation = load_gguf(file.write(tmp_path / "x.gguf")).model.generation_config
    assert generation.eos_token_id == [257, 3]
    assert (generation.bos_token_id, generation.pad_token_id) == (256, 256)


def test_a_file_without_tokenizer_or_name(tmp_path: Path) -> None:
    file = draft(tiny_model())
    file.keys = {key: value for key, value in file.keys.items() if key.startswith("qwen35.")}
    loaded = load_gguf(file.write(tmp_path / "stem.gguf"))
    assert loaded.tokenizer is None
    assert loaded.name == "stem"
    assert loaded.model.config.eos_token_id is None


PEAK = """
import re, resource, sys, torch
from pathlib import Path
from hybridkv.gguf.load import load_gguf
tiny, big, slack, weight_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
load_gguf(tiny, dtype=torch.bfloat16)  # whatever is imported, started and cached, is now
used = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + weight_bytes - slack, -1))
try:
    load_gguf(big, dtype=torch.bfloat16)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_DATA, (used + weight_bytes + slack, -1))
model = load_gguf(big, dtype=torch.bfloat16).model
print(sum(weight.nbytes for weight in model.parameters()) == weight_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux only")
def test_loading_needs_the_final_weights_and_a_chunk(tmp_path: Path) -> None:
    """Private memory is limited to the weights in bfloat16 plus 24 MiB; 24 MiB less shows that the limit bites.

    The embedding alone is 48 MiB in bfloat16 and 96 MiB in the float32 that it is decoded to.
    """
    model = tiny_model()
    small = draft(model).write(tmp_path / "small.gguf", lambda name: T.F16)
    model.resize_token_embeddings(3 << 17, mean_resizing=False)
    big = draft(model).write(tmp_path / "big.gguf", lambda name: T.Q8_0)
    weight_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    arguments = [str(small), str(big), str(24 << 20), str(weight_bytes)]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=False)
    assert "can't allocate memory" in done.stdout
    assert done.stdout.endswith("True\n"), done.stderr
