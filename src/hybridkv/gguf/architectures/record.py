"""What an architecture is: how its metadata becomes a config and its tensors become parameters.

Owns the record types and the conversions that several architectures share. Does not own any
architecture's tables, nor files or memory. Used by `architectures/*.py` and `load.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridkv.gguf.decode import Floats, Order
from hybridkv.gguf.metadata import Metadata

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One tensor of the file and the parameter it fills.

    Parameters
    ----------
    gguf
        Name in the file, within its block for a layer's tensor: `attn_q.weight`.
    param
        Name in the Transformers model, within its layer likewise: `self_attn.q_proj.weight`.
    values
        Elementwise conversion of the float32 numbers.
    rows, cols
        Where each row (column) of the parameter lies in the file, as a function of the config fields;
        the elements of a vector count as columns.
    """

    gguf: str
    param: str
    values: Callable[[Floats], Floats] | None = None
    rows: Callable[[Fields], Order] | None = None
    cols: Callable[[Fields], Order] | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """One GGUF architecture.

    Parameters
    ----------
    name
        The value of `general.architecture`.
    config_class
        Name of the configuration class in Transformers.
    model_class
        Name of the model class in Transformers, for the config's `architectures`.
    fields
        Reads the metadata into the config class's arguments; `layer_types` must be among them.
        Vocabulary size, special token ids and tied embeddings are read for all architectures alike.
    model_tensors
        Tensors outside the layers.
    layer_tensors
        Per layer type, the tensors of such a layer.
    skipped_blocks
        Blocks of the file that the model class has no place for; skipped with a notice.
    source
        Where names and conventions come from.
    """

    name: str
    config_class: str
    model_class: str
    fields: Callable[[Metadata], Fields]
    model_tensors: tuple[TensorRule, ...]
    layer_tensors: Mapping[str, tuple[TensorRule, ...]]
    skipped_blocks: Callable[[Metadata], range]
    source: str


def zero_centred(weight: Floats) -> Floats:
    """Undo the +1 that GGUF adds to RMSNorm weights which Transformers applies as `1 + weight`."""
    return weight - 1


def log_decay(decay: Floats) -> Floats:
    """Turn `-exp(A_log)`, which GGUF stores, into `A_log`."""
    return np.log(-decay)


def grouped(n_groups: int, n_heads: int, width: int, start: int = 0) -> Order:
    """Where heads that are grouped in Transformers lie in a file that tiles them.

    Head `h` uses group `h % n_groups` in the file and group `h // (n_heads / n_groups)` in Transformers.

    Parameters
    ----------
    n_groups, n_heads
        Key heads, and the value heads that share them.
    width
        Rows (columns) per head.
    start
        Rows before the first head, which stay where they are.
    """
    heads = np.arange(n_heads).reshape(n_heads // n_groups, n_groups).T.reshape(-1, 1)
    moved = heads * width + np.arange(width)
    return np.concatenate([np.arange(start), start + moved.reshape(-1)])
