"""`hybridkv.load`: three lines from import to text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hybridkv
from hybridkv.cli.main import main
from hybridkv.engine.describe import bundled_model, describe
from hybridkv.engine.engine import Engine
from hybridkv.engine.load import load as load_described
from hybridkv.engine.sampling import SamplingParams
from hybridkv.errors import ContextError, ModelFileError, UsageError
from hybridkv.text.breakers import breaker_ids
from tests.gguf.write_qwen35 import draft, tiny_model

THREE_LINES = """
import hybridkv
model = hybridkv.load(type_k="q8_0", type_v="q8_0")
print(model.generate("Hello world", n_predict=8, temp=0))
"""


def test_importing_stays_light() -> None:
    code = "import sys, hybridkv; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    exec(THREE_LINES, {})
    assert len(capsys.readouterr().out.split()) > 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = draft(tiny_model())
    file.keys["tokenizer.chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tail }}"
    return file.write(tmp_path_factory.mktemp("api") / "chat.gguf")


def test_text_streams_and_chats(model: Path) -> None:
    m = hybridkv.load(model, n_ctx=64)
    text = m.generate("the", n_predict=8, temp=0)
    assert "".join(m.stream("the", n_predict=8, temp=0)) == text
    assert m.generate("the", n_predict=8, seed=1, temp=2.0) == m.generate("the", n_predict=8, seed=1, temp=2.0)
    one = m.chat("the", n_predict=4, temp=0)
    assert one == m.chat([{"role": "user", "content": "the"}], n_predict=4, temp=0)
    assert one == m.generate("<user>the", n_predict=4, temp=0)
    assert m.chat("the", variables={"tail": "!"}, n_predict=4, temp=0) == m.generate("<user>the!", n_predict=4, temp=0)


def test_dry_has_llama_cpps_breakers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m, seen = hybridkv.load(model, n_ctx=64), []
    generate = Engine.generate

    def noting(self: Engine, ids: Any, params: SamplingParams, **options: Any) -> Any:
        seen.append(params.dry_breakers)
        return generate(self, ids, params, **options)

    monkeypatch.setattr(Engine, "generate", noting)
    m.generate("the", n_predict=2, dry_multiplier=0.8)
    m.generate("the", n_predict=2, dry_multiplier=0.8, dry_breakers=frozenset({3}))
    m.generate("the", n_predict=2)
    assert seen == [breaker_ids(m.tokenizer), frozenset({3}), frozenset()]
    assert seen[0]


class Chosen(Exception):  # noqa: N818 - an end, not an error
    """What a loader was asked for."""


def chosen(monkeypatch: pytest.MonkeyPatch, where: str, load: Any) -> Any:
    """How the weights are to be held, where loading begins."""

    def refuse(description: Any, *, dtype: Any, device: str, weights: str, engine: str = "auto", **_: Any) -> Any:
        raise Chosen(dtype, device, weights, engine)

    monkeypatch.setattr(where, refuse)
    with pytest.raises(Chosen) as found:
        load()
    return found.value.args


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("directory", [False, True])
def test_weights_are_those_of_run(
    device: str, directory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA too, where the weights of a GGUF file stay packed."""
    path: Path | None = None
    if directory:
        loaded = load_described(describe(bundled_model()), dtype=torch.float32, device="cpu")
        loaded.model.config.save_pretrained(path := tmp_path / "model")
    monkeypatch.setattr("hybridkv.cli.model_options._device", lambda name: name)
    options = ["run", "--device", device, "-p", "x", *([] if path is None else ["-m", str(path)])]
    theirs = chosen(monkeypatch, "hybridkv.engine.load.load", lambda: main(options))
    ours = chosen(monkeypatch, "hybridkv.engine.api.load_described", lambda: hybridkv.load(path, device=device))
    assert ours == theirs
    packed = device == "cpu" or not directory
    assert ours[2] == ("auto" if packed else "plain")
    assert ours[0] == (torch.float32 if packed else torch.bfloat16)


def test_a_blob_without_a_suffix_opens(model: Path, tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0123456789abcdef"
    blob.write_bytes(model.read_bytes())
    assert hybridkv.load(blob).generate("the", n_predict=4, temp=0)


def test_what_is_wrong(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFileError, match="no model at"):
        hybridkv.load("/nowhere.gguf")
    with pytest.raises(UsageError, match="unknown KV cache type"):
        hybridkv.load(model, type_k="q9")
    with pytest.raises(ContextError, match="the context holds 8"):
        hybridkv.load(model, n_ctx=8).generate("the first question of all")
    with pytest.raises(ModelFileError, match="no network is to be used"):
        hybridkv.load("owner/name:Q8_0")
