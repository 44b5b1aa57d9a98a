"""A model as data: records of what its layers compute, and where their weights come from.

Owns the records (`layers.py`), one function a family that writes them from a config (`families.py`), and the protocol
of whoever holds the weights (`source.py`). Names and conventions are GGUF's. Knows no backend and no file format.
"""

from hybridkv.model.families import FAMILIES, graph_of, rejects
from hybridkv.model.layers import (
    Attention,
    Block,
    DeltaNet,
    Experts,
    FeedForward,
    Gated,
    Mixer,
    ModelGraph,
    Norm,
    Rope,
)
from hybridkv.model.source import Source

__all__ = [
    "FAMILIES",
    "Attention",
    "Block",
    "DeltaNet",
    "Experts",
    "FeedForward",
    "Gated",
    "Mixer",
    "ModelGraph",
    "Norm",
    "Rope",
    "Source",
    "graph_of",
    "rejects",
]
