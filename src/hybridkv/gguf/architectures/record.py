"""The record of an architecture: how metadata and a config, tensors and parameters stand for each other.

Owns the record types and the conversions that several architectures share. Does not own any
architecture's tables, nor files or memory. Used by `architectures/*.py`, by `load.py`, which reads the
tables from left to right, and by `convert.py`, which reads them from right to left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridkv.gguf.decode import Floats, Order
from hybridkv.gguf.metadata import Metadata

Fields = dict[str, Any]
"""Arguments of a config class."""

Config = Any
"""A Transformers config; which attributes it has, its architecture's file knows."""

Key = int | float | bool | str | list[bool] | list[int] | list[float] | list[str]
Keys = dict[str, Key]
"""Metadata of a file; the names are the architecture's unless they start with a shared prefix."""


@dataclass(frozen=True, slots=True)
class Values:
    """An elementwise conversion of float32 values and its inverse.

    Parameters
    ----------
    read
        From the file's values to Transformers'.
    write
        The inverse, exact up to one float32 rounding.
    """

    read: Callable[[Floats], Floats]
    write: Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One parameter and the tensors of the file that hold it.

    Where several rules of a table fill one parameter, files come in several layouts: the first whose
    tensors a file has is read, the first of all is written. Rules whose parameter a model does not have
    (a bias, tied embeddings) do not apply to it.

    Parameters
    ----------
    gguf
        Name in the file, within its block for a layer's tensor: `attn_q.weight`. Several names are
        tensors whose rows, below each other, are those of the parameter; of a stack of experts, the rows
        of each expert.
    param
        Name in the Transformers model, within its layer: `self_attn.q_proj.weight`.
    values
        Elementwise conversion.
    rows, cols
        Where each row (column) of the parameter lies in the file, as a function of the config; the
        elements of a vector count as columns. The inverse permutation is used for writing.
    parts
        Rows of each of several tensors; equal parts if None.
    shape
        Shape in the file, where it differs from the parameter's in more than dimensions of one.
    scale
        What writing multiplies the parameter by, a number or one per row: multipliers of the config that
        this format has no key for. It has no inverse: what is read back has multipliers of one.
    """

    gguf: str | tuple[str, ...]
    param: str
    values: Values | None = None
    rows: Callable[[Config], Order] | None = None
    cols: Callable[[Config], Order] | None = None
    parts: Callable[[Config], tuple[int, ...]] | None = None
    shape: Callable[[Config], tuple[int, ...]] | None = None
    scale: Callable[[Config], float | Floats] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""
        return (self.gguf,) if isinstance(self.gguf, str) else self.gguf


def _one_kind(config: Config) -> Sequence[tuple[str, ...]]:
    return [("layer",)] * config.num_hidden_layers


def _with_silu(fields: Fields) -> Fields:
    del fields
    return {"hidden_act": "silu"}


@dataclass(frozen=True, slots=True)
class Tables:
    """Names of a model's tensors, and nothing of its metadata: for models that no file holds.

    The attributes mean what they mean in `Architecture`.
    """

    config_class: str
    tensors: Mapping[str, tuple[TensorRule, ...]]
    layers: Callable[[Config], Sequence[tuple[str, ...]]] = _one_kind
    prefix: str = "model.layers."
    more: Callable[[Config], Mapping[str, tuple[TensorRule, ...]]] = lambda _: {}
    """Parts whose rules a config decides."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One GGUF architecture.

    Block count, context length, vocabulary size, special token ids and tied embeddings are read and
    written for all architectures alike.

    Parameters
    ----------
    name
        The value of `general.architecture`.
    config_class, model_class
        Names of the configuration and model class in Transformers.
    model_type
        What Transformers calls models of that class.
    sizes, reals
        Config fields and the metadata keys that hold them: whole numbers from one, and numbers above zero.
    fields
        Reads what `sizes` and `reals` cannot say; may replace what they said.
    keys
        The inverse: metadata of a config, beyond `sizes` and `reals`.
    tensors
        Rules by the part of a model they belong to; `model` holds those outside the layers.
    layers
        The parts that each layer consists of, such as `("mamba", "experts")`.
    prefix
        What the parameters of layer 3 start with, up to the 3.
    suits
        Says what of a config cannot be written as this architecture, or None; all can if not given.
    settings
        Names of tensors that hold no weights but what `fields` reads, such as RoPE's frequency factors, and what writes
        them from a config; None for a config that has no such setting.
    prediction
        What a head of multi-token prediction has beside its block, by names within the block and within `mtp`; nothing
        where no such checkpoint is known.
    derived
        What Transformers' class adds to its arguments, as far as a graph or the cache asks for it.
    source
        Where names and conventions come from.
    """

    name: str
    config_class: str
    model_class: str
    model_type: str
    sizes: Mapping[str, str]
    reals: Mapping[str, str]
    fields: Callable[[Metadata], Fields]
    keys: Callable[[Config], Keys]
    tensors: Mapping[str, tuple[TensorRule, ...]]
    source: str
    layers: Callable[[Config], Sequence[tuple[str, ...]]] = _one_kind
    prefix: str = "model.layers."
    suits: Callable[[Config], str | None] | None = None
    settings: tuple[tuple[str, Callable[[Config], Floats | None]], ...] = ()
    prediction: tuple[TensorRule, ...] = ()
    derived: Callable[[Fields], Fields] = _with_silu


ZERO_CENTRED = Values(read=lambda weight: weight - 1, write=lambda weight: weight + 1)
"""RMSNorm weights that Transformers applies as `1 + weight`, and GGUF as they are."""

LOG_DECAY = Values(read=lambda decay: np.log(-decay), write=lambda a_log: -np.exp(a_log))
"""`A_log` in Transformers, `-exp(A_log)` in GGUF."""


def embeddings(prefix: str = "model.", embed: str = "embed_tokens", norm: str = "norm") -> tuple[TensorRule, ...]:
    """List what nearly all models have outside their layers; the norm is written as it is."""
    return (
        TensorRule("token_embd.weight", f"{prefix}{embed}.weight"),
        TensorRule("output_norm.weight", f"{prefix}{norm}.weight"),
        TensorRule("output.weight", "lm_head.weight"),
    )


def grouped(n_groups: int, n_heads: int, width: int, start: int = 0) -> Order:
    """Map heads that are grouped in Transformers to a file that tiles them.

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


def rotary_halves(n_heads: int, head_dim: int) -> Order:
    """Map rows whose halves RoPE rotates together (NeoX) to a file where neighbours are rotated.

    Row `j` of a head's first half and row `j` of its second are rows `2 j` and `2 j + 1` in the file.
    """
    within = np.arange(head_dim).reshape(-1, 2).T.reshape(-1)
    return (np.arange(n_heads).reshape(-1, 1) * head_dim + within).reshape(-1)
