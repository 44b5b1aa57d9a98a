"""The bundled reference model, its original tokenizer and config, and text it was not trained on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

import hybridkv.gguf.reader
from hybridkv.gguf.load import class_config
from hybridkv.gguf.split import metadata_of

REFERENCE = Path(hybridkv.gguf.reader.__file__).parents[1] / "data" / "reference-hybrid-q8_0.gguf"

_DATA = Path(__file__).parent / "data"


def heldout_text() -> str:
    return (Path(__file__).parents[1] / "data" / "heldout_excerpt.txt").read_text(encoding="utf-8")


def original_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((_DATA / "reference_config.json").read_text(encoding="utf-8"))
    return config


def original_tokenizer_json() -> str:
    return gzip.decompress((_DATA / "reference_tokenizer.json.gz").read_bytes()).decode()


def config_from_gguf(path: str | Path) -> PreTrainedConfig:
    """A file's config as Transformers' class, from the header alone."""
    return class_config(metadata_of(path))
