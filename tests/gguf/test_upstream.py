"""Files that llama.cpp's own converter writes, and what llama.cpp computes from them and from `convert`'s."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hybridkv.engine.convert import convert
from hybridkv.errors import ModelFileError
from hybridkv.gguf.describe import describe_gguf
from hybridkv.gguf.load import load_gguf
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.reader import read_header
from hybridkv.gguf.tokenizer import load_tokenizer
from tests.gguf.reference import heldout_text
from tests.gguf.test_architectures import _LLAMA3, VARIANTS, stirred
from tests.gguf.test_tokenizer import greedy_keys
from tests.gguf.texts import ODD, RUNS
from tests.gguf.write_qwen35 import Draft
from tests.oracles import llama_cpp, upstream

pytestmark = pytest.mark.long

IDS = [5, 7, 11, 13, 17, 19, 23, 29, 5, 90]

# Variants that llama.cpp does not compute: it needs a convolution's bias, one size of key and value heads in
# Qwen3-Next's recurrent layers, and Gemma 3's own scale of scores; it passes over YaRN's betas.
BEYOND_LLAMA_CPP = {("qwen3next", 1), ("nemotron_h", 1), ("jamba", 1), ("gemma3", 1), ("qwen3", 1)}
TOLERANCES = {"gemma3": 2e-3}  # its GELU is a table of float16 numbers in ggml


def agree(ours: torch.Tensor, path: Path, architecture: str, ids: Sequence[int] = IDS) -> None:
    theirs = torch.from_numpy(llama_cpp.logits(path, ids))
    assert theirs.std() > 0.1
    assert float((ours - theirs).abs().max()) < TOLERANCES.get(architecture, 1e-4)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [(name, n) for name, all_ in VARIANTS.items() for n in range(len(all_)) if (name, n) not in BEYOND_LLAMA_CPP],
)
def test_what_convert_writes_runs_in_llama_cpp(tmp_path: Path, architecture: str, variant: int) -> None:
    family, changes = VARIANTS[architecture][variant]
    model = stirred(family, **changes)
    model.save_pretrained(tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path / "x.gguf", weights="f32").path
    agree(logits(model), path, architecture)


def test_granite_4_without_a_recurrent_layer_is_written_as_granite(tmp_path: Path) -> None:
    model = stirred("granitemoehybrid", **DENSE_GRANITE)
    model.save_pretrained(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "x.gguf", weights="f32")
    assert done.architecture == "granite"
    agree(logits(model), done.path, "granite")


DENSE_GRANITE: dict[str, Any] = {
    "layer_types": ["attention"] * 4,
    "position_embedding_type": "rope",
    "num_local_experts": 0,
    "intermediate_size": 32,  # equal to `shared_intermediate_size`, as published
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 6.0,
    "logits_scaling": 3.0,
}

# Families that the converter knows, and the architecture that it writes; changes are to the family's config.
WRITTEN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3next", "qwen3_next", {}),
    "qwen3_5_text": ("qwen35", "qwen3_5_text", {}),
    "qwen3_5_text, tied": ("qwen35", "qwen3_5_text", {"tie_word_embeddings": True}),
    "qwen3_5_moe_text": ("qwen35moe", "qwen3_5_moe_text", {}),
    "jamba": ("jamba", "jamba", {}),
    "falcon_h1": ("falcon-h1", "falcon_h1", {}),
    "falcon_h1, multipliers": ("falcon-h1", "falcon_h1", VARIANTS["falcon-h1"][1][1]),
    "granitemoehybrid": ("granitehybrid", "granitemoehybrid", {}),
    "granitemoehybrid, no experts": (
        "granitehybrid",
        "granitemoehybrid",
        {"num_local_experts": 0, "intermediate_size": 32},
    ),
    "granitemoehybrid, all attention": ("granite", "granitemoehybrid", DENSE_GRANITE),
    "granite": ("granite", "granite", {}),
    "granite, biases": ("granite", "granite", {"attention_bias": True, "mlp_bias": True}),
    "nemotron_h": ("nemotron_h", *VARIANTS["nemotron_h"][0]),
    "nemotron_h, experts": ("nemotron_h_moe", *VARIANTS["nemotron_h_moe"][0]),
    "nemotron_h, latent experts": ("nemotron_h_moe", *VARIANTS["nemotron_h_moe"][1]),
    "lfm2": ("lfm2", "lfm2", {}),
    "lfm2_moe": ("lfm2moe", "lfm2_moe", {}),
    "llama": ("llama", "llama", {}),
    "llama, tied": ("llama", "llama_unbiased", {"tie_word_embeddings": True}),
    "llama, frequency factors": ("llama", "llama_unbiased", {"rope_parameters": _LLAMA3}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {}),
    "qwen3_moe": ("qwen3moe", "qwen3_moe", {}),
    "gemma3_text": ("gemma3", "gemma3_text", {"num_hidden_layers": 6, "layer_types": None, "vocab_size": 291}),
}


def published(directory: Path, family: str, changes: dict[str, Any], n_vocab: int = 320) -> PreTrainedModel:
    """Write a model as its makers publish such: the config in their words, and a tokenizer."""
    model = stirred(family, **{"vocab_size": n_vocab, **changes})
    model.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    if family.startswith("qwen3_") and family != "qwen3_moe":
        config["full_attention_interval"] = config["layer_types"].index("full_attention") + 1
    if family == "qwen3_moe":
        del config["shared_expert_intermediate_size"]  # which it has not
    if family == "granitemoehybrid":
        words = {"full_attention": "attention", "linear_attention": "mamba"}
        config["layer_types"] = [words[kind] for kind in config["layer_types"]]
        if not config["num_local_experts"]:
            config["num_experts_per_tok"] = 0
    if family == "nemotron_h":
        letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
        config["hybrid_override_pattern"] = "".join(letters[kind] for kind in model.config.layers_block_type)
        config["num_hidden_layers"] = len(model.config.layers_block_type)
        if "E" not in config["hybrid_override_pattern"]:
            for key in ("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group"):
                del config[key]
    path.write_text(json.dumps(config), encoding="utf-8")
    _write_tokenizer(directory)
    return model


def _write_tokenizer(directory: Path) -> None:
    alphabet, special = list(bytes_to_unicode().values()), ["<|begin|>", "<|end|>", "<|pad|>"]
    merges = [(left, right) for left in "etaoin" for right in "etaoin"][:29]
    tokens = [*special, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(directory)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_the_converter_writes_loads(tmp_path: Path, name: str) -> None:
    architecture, family, changes = WRITTEN[name]
    model = published(tmp_path / "model", family, changes)
    options = ["--no-nextn"] if family.startswith("qwen3_") and family != "qwen3_moe" else []
    path = upstream.convert(tmp_path / "model", tmp_path / "x.gguf", *options)
    assert read_header(path).architecture == architecture
    loaded = load_gguf(path)
    assert loaded.notices == ()
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer("seaside").input_ids, skip_special_tokens=True) == "seaside"
    agree(logits(loaded.model), path, architecture)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)


def with_prediction_block(directory: Path, **changes: Any) -> PreTrainedModel:
    """Add a block of multi-token prediction to a published Qwen3.5 model: its attention layer, and what joins it."""
    model = published(directory, "qwen3_5_text", changes)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        tensors[name.replace("model.layers.1.", "mtp.layers.0.")] = tensors[name].clone()
    width = model.config.hidden_size
    tensors["mtp.fc.weight"] = torch.ones(width, 2 * width)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = torch.ones(width)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"mtp_num_hidden_layers": 1}
    path.write_text(json.dumps(config), encoding="utf-8")
    return model


def test_a_prediction_block_of_the_converter_is_skipped(tmp_path: Path) -> None:
    model = with_prediction_block(tmp_path / "model")
    path = upstream.convert(tmp_path / "model", tmp_path / "x.gguf")
    loaded = load_gguf(path)
    assert loaded.notices == ("15 tensors of multi-token prediction blocks were skipped",)
    agree(logits(loaded.model), path, "qwen35")
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("read", [load_gguf, describe_gguf])
def test_the_prediction_block_alone_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with_prediction_block(tmp_path / "model")
    upstream.convert(tmp_path / "model", tmp_path / "x.gguf", "--mtp")
    (path,) = tmp_path.glob("*.gguf")
    with pytest.raises(ModelFileError, match="is a draft head"):
        read(path)


def test_bamba_is_refused(tmp_path: Path) -> None:
    """The converter interleaves whole heads, of which Bamba rotates a half: llama.cpp computes another model."""
    model = published(tmp_path / "model", "bamba", {})
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"attn_rotary_emb": 8}), encoding="utf-8")
    path = upstream.convert(tmp_path / "model", tmp_path / "x.gguf")
    assert abs(llama_cpp.logits(path, IDS) - logits(model).numpy()).max() > 0.5
    with pytest.raises(ModelFileError, match=r"rope.dimension_count' is 8; expected 16, all dimensions of a head"):
        load_gguf(path)


def test_the_default_pre_tokenizer_is_llama_cpps(tmp_path: Path) -> None:
    texts = [*ODD, *RUNS, heldout_text()]
    for name, keys in (("default", greedy_keys("default")), ("missing", greedy_keys("default"))):
        if name == "missing":
            del keys["tokenizer.ggml.pre"]
        path = Draft(keys=keys).write(tmp_path / "x.gguf")
        tokenizer = load_tokenizer(Metadata(read_header(path)))
        assert tokenizer is not None
        theirs = llama_cpp.tokenize(path, texts)
        for text, ids in zip(texts, theirs, strict=True):
            assert tokenizer(text).input_ids == ids, text
