"""A model as the native backend holds it: a config and the source of its weights, without any Transformers module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from hybridkv.gguf.mapped import map_gguf
from hybridkv.gguf.tensors import Memory
from hybridkv.held import WeightKind
from hybridkv.model import graph_of
from hybridkv.model.protocols import Config
from hybridkv.native.sources import EncodedSource, Typed

if TYPE_CHECKING:
    from hybridkv.native.parameters import ParameterSource


class NativeModel:
    """A model as the engine needs it: a config, a device, end tokens, and its weights.

    Parameters
    ----------
    config
        A Transformers config.
    source
        Holds the weights.
    end_ids
        Tokens that end a text; the config's own if empty.
    device
        Where it is to run.
    hosted
        Names of tensors that stay in main memory while a card runs the rest.
    """

    def __init__(
        self,
        config: Config,
        source: Typed,
        end_ids: Sequence[int] = (),
        device: str = "cpu",
        hosted: frozenset[str] = frozenset(),
    ) -> None:
        self.config = config
        self.source = source
        self.device = torch.device(device)
        self.hosted = hosted
        self.dtype = torch.float32
        self.generation_config = SimpleNamespace(eos_token_id=list(end_ids) or None)


def native_model(
    config: Config,
    source: Typed,
    weights: WeightKind,
    end_ids: Sequence[int] = (),
    device: str = "cpu",
    hosted: frozenset[str] = frozenset(),
) -> NativeModel:
    """Build a model with its matrices held as asked."""
    if weights != "auto":
        graph = graph_of(config)
        source = EncodedSource(source, weights, (graph.embed, graph.head))
    return NativeModel(config, source, end_ids, device, hosted)


def directory_source(directory: Path, config: Config) -> ParameterSource:
    """Open the safetensors of a Hugging Face directory as a source of weights, read one parameter at a time."""
    from hybridkv.gguf.checkpoint import Checkpoint
    from hybridkv.gguf.pairing import build_skeleton
    from hybridkv.native.parameters import ParameterSource

    text = config.get_text_config(decoder=True)
    skeleton = build_skeleton(text, torch.float32)
    return ParameterSource(skeleton, Checkpoint(directory, skeleton, "loaded").parameter)


__all__ = ["Memory", "NativeModel", "directory_source", "map_gguf", "native_model"]
