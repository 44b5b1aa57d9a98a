"""`hybridkv.load`: three lines from import to text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hybridkv
from hybridkv.errors import ContextError, ModelFileError, UsageError
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
