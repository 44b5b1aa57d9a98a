"""Running the command line in this process, and the small models that it is given."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hybridkv.cli.main import main
from tests.cli.models import ModelStore

Cli = Callable[..., "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What the user sees of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run `hybridkv ...`; `run` takes one thread, which is the fastest on a busy machine."""

    def call(*argv: object) -> Outcome:
        words = [str(word) for word in argv]
        if words[0] == "run" and "-t" not in words:
            words += ["-t", "1"]
        capfd.readouterr()
        code = main(words)
        seen = capfd.readouterr()
        return Outcome(code, seen.out, seen.err)

    return call


@pytest.fixture(autouse=True)
def _nothing_is_piped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    return ModelStore(tmp_path_factory.mktemp("models"))


@pytest.fixture
def hybrid(models: ModelStore) -> Path:
    """A Qwen3.5 directory: layers 1 and 3 have a KV cache, 0 and 2 a state; head dim 64; no tokenizer."""
    return models.family("qwen3_5_text")


@pytest.fixture
def gguf(models: ModelStore) -> Path:
    """A Qwen3.5 GGUF with a tokenizer of bytes, trained for 512 tokens; layer 3 alone has a KV cache."""
    return models.gguf()
