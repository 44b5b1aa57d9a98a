"""Small models on disk, written once per run of the tests, and copies of them that a test may spoil."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import families
from tests.gguf.write_qwen35 import draft, tiny_model


class ModelStore:
    """Model directories and files by name, built when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def family(self, name: str, **changes: Any) -> Path:
        """A family of `tests.families`, with other options if given."""
        path = self.root / "-".join([name, *(f"{key}={value}" for key, value in sorted(changes.items()))])
        if not path.exists():
            class_name, options = families.FAMILIES[name]
            with mock.patch.dict(families.FAMILIES, {name: (class_name, options | changes)}):
                families.build(name).save_pretrained(path)
        return path

    def mamba2(self) -> Path:
        """A model of recurrent layers alone."""
        path = self.root / "mamba2"
        if not path.exists():
            config = transformers.Mamba2Config(
                vocab_size=97,
                hidden_size=64,
                num_hidden_layers=2,
                num_heads=8,
                head_dim=16,
                state_size=16,
                n_groups=1,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
            torch.manual_seed(7)
            transformers.Mamba2ForCausalLM(config).save_pretrained(path)
        return path

    def gguf(self) -> Path:
        """A tiny Qwen3.5 GGUF with a tokenizer."""
        path = self.root / "tiny.gguf"
        return path if path.exists() else draft(tiny_model()).write(path)


def with_config(model: Path, to: Path, **changes: Any) -> Path:
    """A copy of a model directory with other config entries; None removes one."""
    shutil.copytree(model, to)
    config = json.loads((to / "config.json").read_text())
    kept = {key: value for key, value in (config | changes).items() if value is not None}
    (to / "config.json").write_text(json.dumps(kept))
    return to


def with_weights(model: Path, to: Path, spoil: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model directory whose weights `spoil` has changed in place."""
    shutil.copytree(model, to)
    weights = load_file(to / "model.safetensors")
    spoil(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to
