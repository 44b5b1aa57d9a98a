"""A model as data: records of what its layers compute, and where their weights come from.

Owns the records (`layers.py`, `graph.py`), one function a family that writes them from a config (`families/`), and the
protocol of a source of weights (`source.py`). Names and conventions are GGUF's. Knows no backend and no file format.
"""

from hybridkv.model.facts import is_hybrid, kv_facts, layer_facts, takes_chunks, vocab_size_of
from hybridkv.model.families import FAMILIES, graph_of, rejects
from hybridkv.model.graph import Block, Branch, ModelGraph, Prediction
from hybridkv.model.layers import (
    Adapter,
    Attention,
    Choice,
    DeltaNet,
    Experts,
    FeedForward,
    Gated,
    Mamba1,
    Mamba2,
    Mixer,
    Norm,
    Part,
    Plain,
    Rope,
    Shared,
    ShortConv,
)
from hybridkv.model.protocols import Config, LanguageModel
from hybridkv.model.source import Source

__all__ = [
    "FAMILIES",
    "Adapter",
    "Attention",
    "Block",
    "Branch",
    "Choice",
    "Config",
    "DeltaNet",
    "Experts",
    "FeedForward",
    "Gated",
    "LanguageModel",
    "Mamba1",
    "Mamba2",
    "Mixer",
    "ModelGraph",
    "Norm",
    "Part",
    "Plain",
    "Prediction",
    "Rope",
    "Shared",
    "ShortConv",
    "Source",
    "graph_of",
    "is_hybrid",
    "kv_facts",
    "layer_facts",
    "rejects",
    "takes_chunks",
    "vocab_size_of",
]
