"""Nemotron-H's head of multi-token prediction: attention and experts in one block of a file, against Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor
from transformers import PreTrainedModel

from hybridkv.cache import KVTypes
from hybridkv.engine.convert import convert
from hybridkv.engine.heads import HeadGuesser
from hybridkv.engine.pace import Pace
from hybridkv.engine.speculation import Speculation
from hybridkv.gguf.mapped import map_gguf
from hybridkv.kernels import cpu_native
from hybridkv.native import NativeModel, NativeStep, native_model
from hybridkv.policy import Guard
from tests.engine.serving import GREEDY
from tests.families import build
from tests.native.test_drafts import cache_of, differences
from tests.native.test_predict import Free, engine, guessed, prompt

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")

LATENT = {"plain": {}, "latent": {"moe_latent_size": 24}}
"""Experts at the model's width, and at a narrower one, as in Nemotron 3 Super."""

NEXTN = ("eh_proj", "enorm", "hnorm")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@cache
def model_of(how: str) -> PreTrainedModel:
    return build("nemotron_h", **LATENT[how])


@cache
def head_of(how: str) -> PreTrainedModel:
    """A head's two layers, and the norm behind them, as a model that reads embeddings."""
    config = deepcopy(model_of(how).config)
    config.layers_block_type = ["full_attention", "moe"]
    config.num_hidden_layers = 2
    torch.manual_seed(7)
    model = type(model_of(how))(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1 if "norm" in name else 0, 0.2)
    return model


def beside(width: int) -> dict[str, np.ndarray]:
    """What a head has beside its layers."""
    draw = np.random.default_rng(3)
    numbers = (draw.normal(0, 0.2, (width, 2 * width)), draw.normal(1, 0.1, width), draw.normal(1, 0.1, width))
    return dict(zip(NEXTN, (x.astype(np.float32) for x in numbers), strict=True))


def plain(model: PreTrainedModel, directory: Path) -> GGUFReader:
    """A model as a float32 file, read again."""
    model.save_pretrained(directory)
    return GGUFReader(convert(directory, directory / "x.gguf", weights="f32", tokenizer="omitted").path)


def write(path: Path, how: str, *, without: str = "") -> Path:
    """Write a model and its head as llama.cpp's converter does: one block, counted per layer as both kinds."""
    trunk, head = plain(model_of(how), path / "trunk"), plain(head_of(how), path / "head")
    name, more = "nemotron_h_moe", {"attention.head_count_kv": 2, "feed_forward_length": 32}
    n_blocks = int(trunk.fields[f"{name}.block_count"].contents())
    writer = GGUFWriter(path / "x.gguf", name)
    for field in trunk.fields.values():
        key = field.name.removeprefix(f"{name}.")
        if field.name.startswith("GGUF.") or key in ("general.architecture", "block_count"):
            continue
        if key in more:
            counts = field.contents()
            writer.add_array(field.name, [*counts, max(counts)])
            continue
        sub = {"sub_type": field.types[-1]} if field.types[0] == GGUFValueType.ARRAY else {}
        writer.add_key_value(field.name, field.contents(), field.types[0], **sub)
    writer.add_block_count(n_blocks + 1)
    writer.add_uint32(f"{name}.nextn_predict_layers", 1)
    tensors = {t.name: t.data for t in trunk.tensors}
    for tensor in head.tensors:
        own = tensor.name.replace("blk.0.", "blk.").replace("blk.1.attn_norm", "blk.post_attention_norm")
        own = own.replace("blk.1.", "blk.").replace("output_norm", "blk.nextn.shared_head_norm")
        if own.startswith("blk."):
            tensors[own.replace("blk.", f"blk.{n_blocks}.", 1)] = tensor.data
    width = model_of(how).config.hidden_size
    tensors |= {f"blk.{n_blocks}.nextn.{part}.weight": values for part, values in beside(width).items()}
    for each, values in tensors.items():
        if each != f"blk.{n_blocks}.{without}":
            writer.add_tensor(each, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / "x.gguf"


@pytest.fixture(scope="module", params=LATENT)
def file(request: pytest.FixtureRequest) -> Iterator[tuple[str, NativeModel]]:
    directory = Path(mkdtemp(prefix="hybridkv-nemotron-"))
    mapped = map_gguf(write(directory, request.param))
    assert mapped.notices == ()
    yield request.param, native_model(mapped.config, mapped.source, "auto", mapped.end_ids)
    rmtree(directory)


def expected(how: str, text: list[int], guesses: list[int]) -> Tensor:
    """Logits after a text, and behind each guess, by Transformers' layers in float64: `[1 + guesses, V]`."""
    model, head = deepcopy(model_of(how)).double(), deepcopy(head_of(how)).double()
    for each in (model, head):
        each.set_experts_implementation("eager")  # torch's grouped products have no float64
    own = {name: torch.from_numpy(x).double() for name, x in beside(model.config.hidden_size).items()}
    embed = model.get_input_embeddings().weight

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.config.layer_norm_epsilon) * weight

    def joined(token: int, hidden: Tensor) -> Tensor:
        return own["eh_proj"] @ torch.cat([norm(embed[token], own["enorm"]), norm(hidden, own["hnorm"])])

    hidden = model.model(input_ids=torch.tensor([text])).last_hidden_state[0]
    rows = [joined(token, hidden[i]) for i, token in enumerate(text[1:])]
    logits = []
    for guess in (*guesses, None):
        last = head.model(inputs_embeds=torch.stack(rows)[None]).last_hidden_state[0, -1]
        logits.append(model.get_output_embeddings().weight @ last)
        if guess is not None:
            rows.append(joined(guess, last))
    return torch.stack(logits)


@pytest.mark.parametrize("n_read", [[19], [5, 1, 13]], ids=str)
def test_guesses_are_those_of_transformers_layers(file: tuple[str, NativeModel], n_read: list[int]) -> None:
    """The model's last norm comes before the head's own, and the head's normed result goes on."""
    how, model = file
    step, text = NativeStep(model), prompt(20)
    guesses, found = guessed(step, cache_of(model.config, KVTypes("f32", "f32")), text, n_read, 2)
    wanted = expected(how, text, guesses)
    assert [int(row.argmax()) for row in wanted[:2]] == guesses
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def test_the_text_and_the_cache_are_those_without_guesses(
    file: tuple[str, NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token, and to the byte: a random head's guesses are run and undone."""
    monkeypatch.setattr(Pace, "pauses_beyond", lambda self, n_tokens: False)
    monkeypatch.setattr(Pace, "goes_on", lambda self, kinds, n_others, seconds_each: True)
    monkeypatch.setattr(Pace, "choose", lambda self, kinds, n_others, seconds_each=0.0: len(kinds))
    _, model = file
    runs = []
    for guesses in (False, True):
        step, how = NativeStep(model), None
        if guesses:
            predictor = step.predictor
            assert predictor is not None
            how = Speculation(lambda p=predictor: HeadGuesser(p), n_max=4, costs=Free())  # type: ignore[misc]
        run = engine(model, how, step, Guard())
        runs.append(([t for (t,) in run.generate(prompt(30), GREEDY, n_predict=50)], run))
    (without, one), (text, other) = runs
    assert text == without
    assert differences(other.cache.stored(), one.cache.stored()) == []
    assert other.timings.n_guessed >= 50


def test_a_head_that_lacks_a_tensor_is_skipped(tmp_path: Path) -> None:
    mapped = map_gguf(write(tmp_path, "plain", without="post_attention_norm.weight"))
    assert any("of multi-token prediction blocks were skipped" in notice for notice in mapped.notices)
    assert NativeStep(native_model(mapped.config, mapped.source, "auto")).predictor is None
