"""`convert` writes the head of multi-token prediction of a Hugging Face directory as the block of a file."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hybridkv.cache import KVTypes
from hybridkv.engine.convert import Converted, convert
from hybridkv.gguf.mapped import map_gguf
from hybridkv.kernels import cpu_native
from hybridkv.native import NativeStep, native_model
from tests.families import build
from tests.gguf.test_architectures import stirred
from tests.native.test_drafts import cache_of

FAMILIES = {"qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe", "qwen3_next": "qwen3next"}
BESIDE = {
    "nextn.eh_proj": MODEL_TENSOR.NEXTN_EH_PROJ,
    "nextn.enorm": MODEL_TENSOR.NEXTN_ENORM,
    "nextn.hnorm": MODEL_TENSOR.NEXTN_HNORM,
    "nextn.shared_head_norm": MODEL_TENSOR.NEXTN_SHARED_HEAD_NORM,
}
"""What a head has beside its layer, and gguf-py's names for it."""


def head_of(family: str, model: PreTrainedModel) -> PreTrainedModel:
    """A head's layer and final norm, as a model of one layer."""
    config = deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    torch.manual_seed(9)
    head = type(model)(config).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.2)
    return head


def with_head(directory: Path, model: PreTrainedModel, head: PreTrainedModel) -> dict[str, Tensor]:
    """Save a model, and its head as released checkpoints name it; what the head has beside its layer."""
    model.save_pretrained(directory)
    head.save_pretrained(directory / "head")
    width, draw = model.config.hidden_size, torch.Generator().manual_seed(3)
    beside = {
        "mtp.fc.weight": 0.2 * torch.randn(width, 2 * width, generator=draw),
        "mtp.pre_fc_norm_embedding.weight": 0.1 * torch.randn(width, generator=draw),
        "mtp.pre_fc_norm_hidden.weight": 0.1 * torch.randn(width, generator=draw),
    }
    tensors = load_file(directory / "model.safetensors") | beside
    for name, tensor in load_file(directory / "head/model.safetensors").items():
        if ".layers.0." in name:
            tensors[f"mtp.layers.0.{name.split('.layers.0.')[1]}"] = tensor
    tensors["mtp.norm.weight"] = head.model.norm.weight.detach().clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return beside


def converted(tmp_path: Path, family: str) -> tuple[Converted, PreTrainedModel, PreTrainedModel, dict[str, Tensor]]:
    model = stirred(family)
    head = head_of(family, model)
    beside = with_head(tmp_path / "model", model, head)
    return convert(tmp_path / "model", tmp_path / "x.gguf", weights="f32"), model, head, beside


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_has_gguf_py_s_names(tmp_path: Path, family: str) -> None:
    """Those of the model's attention layers, and `nextn`; nothing of the directory is left out."""
    done, model, _, _ = converted(tmp_path, family)
    n_layers, reader = model.config.num_hidden_layers, GGUFReader(done.path)
    assert done.notices == ("the file has no tokenizer: run it with --ids",)
    assert done.architecture == FAMILIES[family]
    assert reader.fields[f"{done.architecture}.block_count"].contents() == n_layers + 1
    assert reader.fields[f"{done.architecture}.nextn_predict_layers"].contents() == 1
    names = [tensor.name for tensor in reader.tensors]
    attends = model.config.layer_types.index("full_attention")
    own = {name.split(".", 2)[2] for name in names if name.startswith(f"blk.{attends}.")}
    found = {name.split(".", 2)[2] for name in names if name.startswith(f"blk.{n_layers}.")}
    assert found == own | {f"{name}.weight" for name in BESIDE}
    for name, tensor in BESIDE.items():
        assert TENSOR_NAMES[tensor].format(bid=n_layers) == f"blk.{n_layers}.{name}"
    assert map_gguf(done.path).notices == ()


def expected(
    model: PreTrainedModel, head: PreTrainedModel, beside: dict[str, Tensor], text: list[int], guess: int
) -> Tensor:
    """Logits after a text and after a guess behind it, by Transformers in float64: `[2, V]`."""
    model, head = deepcopy(model).double(), deepcopy(head).double()
    for each in (model, head):
        each.set_experts_implementation("eager")  # torch's grouped products have no float64
    own = {name.removeprefix("mtp."): x.double() for name, x in beside.items()}
    embed = model.get_input_embeddings().weight

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps) * (1 + weight)

    def joined(token: int, hidden: Tensor) -> Tensor:
        parts = norm(embed[token], own["pre_fc_norm_embedding.weight"]), norm(hidden, own["pre_fc_norm_hidden.weight"])
        return own["fc.weight"] @ torch.cat(parts)

    hidden = model.model(input_ids=torch.tensor([text])).last_hidden_state[0]
    rows, logits = [joined(token, hidden[i]) for i, token in enumerate(text[1:])], []
    for _ in range(2):
        last = head.model(inputs_embeds=torch.stack(rows)[None]).last_hidden_state[0, -1]
        logits.append(model.get_output_embeddings().weight @ last)
        rows.append(joined(guess, last))
    return torch.stack(logits)


@pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_head_guesses_as_transformers_layer_does(tmp_path: Path, family: str) -> None:
    done, model, head, beside = converted(tmp_path, family)
    mapped = map_gguf(done.path)
    native = native_model(mapped.config, mapped.source, "auto", mapped.end_ids)
    step = NativeStep(native)
    predictor = step.predictor
    assert predictor is not None
    text = torch.randint(3, 97, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    cache, rows = cache_of(native.config, KVTypes("f32", "f32")), predictor.new_rows()
    step.forward(torch.tensor([text[:-1]]), cache, 0)
    hidden = step.take_hidden(cache)
    assert hidden is not None
    predictor.read(rows, text[1:], hidden, 0)
    found = [predictor._one.buffer("logits")[0].clone()]
    guess, _ = predictor.guess()
    predictor.add(rows, guess, len(text) - 1)
    found.append(predictor._one.buffer("logits")[0].clone())
    wanted = expected(model, head, beside, text, guess)
    assert float((torch.stack(found) - wanted).norm() / wanted.norm()) < 2e-3


@pytest.mark.parametrize("lost", ["mtp.norm.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.fc.weight"])
def test_a_head_that_lacks_a_tensor_is_left_out_with_a_notice(tmp_path: Path, lost: str) -> None:
    model = build("qwen3_5_text")
    with_head(tmp_path / "model", model, head_of("qwen3_5_text", model))
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    done = convert(tmp_path / "model", tmp_path / "x.gguf")
    assert "tensors were left out" in done.notices[-1]
    assert "mtp." in done.notices[-1]
    assert "qwen35.nextn_predict_layers" not in GGUFReader(done.path).fields


def test_layers_that_are_listed_are_listed_by_block(tmp_path: Path) -> None:
    """Where attention comes at no interval, the file says of each block whether it attends."""
    kinds: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
    model = build("qwen3_5_text", num_hidden_layers=3, **kinds)
    with_head(tmp_path / "model", model, head_of("qwen3_5_text", model))
    mapped = map_gguf(convert(tmp_path / "model", tmp_path / "x.gguf").path)
    assert mapped.notices == ()
    assert mapped.config.layer_types == kinds["layer_types"]
    assert mapped.config.mtp_num_hidden_layers == 1
