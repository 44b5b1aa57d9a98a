"""Long contexts by options: the same model as a file or a config that says so itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridkv.engine.describe import describe
from hybridkv.engine.load import load
from hybridkv.errors import UsageError
from hybridkv.model.changes import ModelChanges, RopeChanges, change_rope
from tests.cli.conftest import Cli
from tests.cli.models import ModelStore
from tests.gguf.write_qwen35 import draft, tiny_model

YARN = ["--rope-scaling", "yarn", "--rope-scale", "4", "--yarn-orig-ctx", "128"]
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "yarn": (
        YARN,
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128},
    ),
    "yarn with all": (
        [
            *YARN,
            "--yarn-attn-factor",
            "1.5",
            "--yarn-beta-fast",
            "16",
            "--yarn-beta-slow",
            "2",
            "--yarn-ext-factor",
            "1",
        ],
        {
            "scaling.type": "yarn",
            "scaling.factor": 4.0,
            "scaling.original_context_length": 128,
            "scaling.attn_factor": 1.5,
            "scaling.yarn_beta_fast": 16.0,
            "scaling.yarn_beta_slow": 2.0,
        },
    ),
    "linear by default": (["--rope-scale", "2"], {"scaling.type": "linear", "scaling.factor": 2.0}),
    "the other way round": (["--rope-freq-scale", "0.5"], {"scaling.type": "linear", "scaling.factor": 2.0}),
    "theta": (["--rope-freq-base", "5000"], {"freq_base": 5000.0}),
    "unset values": (["--rope-freq-base", "0", "--yarn-orig-ctx", "0", "--yarn-ext-factor", "-1"], {}),
    "metadata": (["--override-kv", "qwen35.rope.freq_base=float:5000"], {"freq_base": 5000.0}),
}


def write(directory: Path, keys: dict[str, Any]) -> Path:
    file = draft(tiny_model())
    for key, value in keys.items():
        file.keys[f"qwen35.rope.{key}"] = value
    return file.write(directory / "model.gguf")


def answer(cli: Cli, model: Path, *argv: str) -> list[int]:
    done = cli("run", "-m", model, "--ids", "3,4,5,6,7,8,9", "-n", 12, "--temp", 0, "--json", "--ignore-eos", *argv)
    assert done.code == 0, done.err
    return list(json.loads(done.out)["sequences"][0]["ids"])


@pytest.mark.parametrize("name", CASES)
def test_options_are_the_files_keys(cli: Cli, gguf: Path, tmp_path: Path, name: str) -> None:
    options, keys = CASES[name]
    assert answer(cli, gguf, *options) == answer(cli, write(tmp_path, keys))


def logits(model: Path, changes: ModelChanges, backend: str) -> torch.Tensor:
    from hybridkv.engine.steps import parse_backend, resolve_step
    from hybridkv.hf import ModelCache
    from hybridkv.model import kv_facts
    from hybridkv.policy import Guard, Policy

    description = describe(model, changes=changes)
    kind = parse_backend(backend)
    weights = "auto" if backend == "native" else "plain"
    loaded = load(description, dtype=torch.float32, device="cpu", weights=weights, backend=kind)
    specs = Policy().resolve(kv_facts(description.facts))
    cache = ModelCache(loaded.model.config, specs, device="cpu", n_ctx=256, guard=Guard(mode="off"), notify=print)
    step = resolve_step(description.config, "cpu", kind)(loaded.model)
    with torch.inference_mode():
        n_vocab = description.config.get_text_config(decoder=True).vocab_size
        return step.forward(torch.arange(3, 163).unsqueeze(0) % n_vocab, cache, 0)


def test_both_backends_compute_yarn(gguf: Path) -> None:
    yarn = ModelChanges(RopeChanges(scaling="yarn", factor=4.0, orig_ctx=32, attn_factor=1.2))
    native, eager = logits(gguf, yarn, "native"), logits(gguf, yarn, "eager")
    plain = logits(gguf, ModelChanges(), "native")
    spread = (native - plain).abs().max()
    assert spread > 1e-3
    assert (native - eager).abs().max() < 1e-2 * spread


def test_a_directory_is_scaled_as_its_config_would_say(hybrid: Path, tmp_path: Path) -> None:
    yarn = RopeChanges(scaling="yarn", factor=4.0, orig_ctx=32, beta_fast=16.0)
    changed = logits(hybrid, ModelChanges(yarn), "eager")
    assert (changed - logits(hybrid, ModelChanges(), "eager")).abs().max() > 1e-4
    config = json.loads((hybrid / "config.json").read_text())
    text = config.get("text_config", config)
    new = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
    text["rope_parameters"] |= new
    for file in hybrid.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(changed, logits(tmp_path, ModelChanges(), "eager"))
    assert (logits(hybrid, ModelChanges(yarn), "native") - changed).abs().max() < 1e-3


def test_layers_of_a_window_keep_their_rope() -> None:
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(hidden_size=64, num_hidden_layers=6)
    before = dict(config.rope_parameters["sliding_attention"])
    change_rope(config, RopeChanges(factor=8.0))
    assert config.rope_parameters["sliding_attention"] == before
    assert config.rope_parameters["full_attention"]["rope_type"] == "linear"
    assert config.rope_parameters["full_attention"]["factor"] == 8.0


def test_what_cannot_be_scaled(models: ModelStore) -> None:
    from transformers import Qwen3Config

    config = Qwen3Config()
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    with pytest.raises(UsageError, match="--rope-scale 2 of a model whose RoPE is 'llama3'"):
        change_rope(config, RopeChanges(factor=2.0))
    with pytest.raises(UsageError, match=r"--yarn-ext-factor 0.5; allowed: 1"):
        change_rope(config, RopeChanges(scaling="yarn", ext_factor=0.5))
    config.rope_parameters = None
    with pytest.raises(UsageError, match="this model has no RoPE to scale"):
        change_rope(config, RopeChanges(factor=2.0))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rope-scaling", "ntk"], "--rope-scaling 'ntk'; allowed: none, linear, yarn"),
        (["--rope-scale", "0"], "--rope-scale 0; allowed: more than 0"),
        (["--rope-scale", "nan"], "--rope-scale nan; allowed: more than 0"),
        (["--rope-scale", "2", "--rope-freq-scale", "0.5"], "--rope-scale and --rope-freq-scale were given together"),
        (["--override-kv", "a=b"], "--override-kv 'a=b'; allowed: KEY=TYPE:VALUE"),
        (["--override-kv", "a=int:x"], "--override-kv 'a=int:x': 'x' is not of type int"),
        (["--override-kv", "a=bool:1"], "--override-kv 'a=bool:1'; allowed: true, false"),
        (["--context-shift"], "--context-shift: this model's recurrent state has seen every token and cannot lose one"),
        (
            ["--yarn-ext-factor", "0.5", *YARN],
            "metadata key 'qwen35.rope.scaling.yarn_ext_factor' is 0.5; expected 1.0",
        ),
    ],
)
def test_what_is_wrong(cli: Cli, gguf: Path, argv: list[str], message: str) -> None:
    done = cli("run", "-m", gguf, "--ids", "3", "-n", 1, *argv)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_beyond_the_trained_length_is_said_once(cli: Cli, gguf: Path) -> None:
    said = "is more than the 512 tokens that the model was trained for"
    assert cli("run", "-m", gguf, "--ids", "3", "-n", 1, "-c", 2048).err.count(said) == 1
    scaled = ("--rope-scaling", "yarn", "--rope-scale", "4")
    assert said not in cli("run", "-m", gguf, "--ids", "3", "-n", 1, "-c", 2048, *scaled).err
    far = cli("run", "-m", gguf, "--ids", "3", "-n", 1, "-c", 4096, *scaled).err
    assert far.count(f"note: -c 4096 {said} and RoPE is scaled for (2048)") == 1


def test_shifting_that_is_off_is_as_it_is(cli: Cli, gguf: Path) -> None:
    plain = answer(cli, gguf)
    assert answer(cli, gguf, "--no-context-shift") == plain
    assert answer(cli, gguf, "--context-shift", "off") == plain
