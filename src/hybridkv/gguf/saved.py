"""The tensors of a GGUF file's weights, from its header alone: for counting bytes before any is read.

Does not own what a run makes of them (`hybridkv.held`).
"""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

from hybridkv.formats.weights import WEIGHTS
from hybridkv.gguf.architectures import get_architecture
from hybridkv.gguf.architectures.record import Architecture
from hybridkv.gguf.describe import skipped
from hybridkv.gguf.reader import Header, TensorInfo
from hybridkv.gguf.split import metadata_of
from hybridkv.gguf.tensors import check_multiplied
from hybridkv.held import Expanded, Place, Runner, SavedTensor, Shape

_SMALL = ("ssm_conv1d.weight", "shortconv.conv.weight", "ssm_a")  # convolutions, and decays of each state
_PLACES: dict[str, Place] = {"token_embd.weight": "embedding", "output.weight": "head"}


def saved_tensors(path: str | Path | Header, runner: Runner = "eager") -> tuple[SavedTensor, ...]:
    """Return the tensors that become weights, and how each is saved.

    Raises
    ------
    ModelFileError
        For a damaged file, or one that has types which the runner does not multiply.
    """
    header, kept = _kept(path)
    if runner == "native":
        check_multiplied(header, {info.name for info in kept})
    plain = _plain_names(get_architecture(header))
    return tuple(_saved(info, plain) for info in kept)


def named_tensors(path: str | Path | Header) -> tuple[tuple[str, SavedTensor, int], ...]:
    """Return the tensors that become weights, with their names and their bytes in the file.

    Raises
    ------
    ModelFileError
        For a damaged file.
    """
    header, kept = _kept(path)
    plain = _plain_names(get_architecture(header))
    return tuple((info.name, _saved(info, plain), info.nbytes) for info in kept)


def saved_types(path: str | Path | Header) -> dict[str, str]:
    """Return the types of the tensors that become weights, in ggml's spelling.

    Raises
    ------
    ModelFileError
        For a damaged file.
    """
    return {info.name: _spelled(info) for info in _kept(path)[1]}


def expanded_tensors(path: str | Path | Header, reason: str, itemsize: int) -> Expanded | None:
    """Count the quantized tensors that become values of `itemsize` bytes; None if no tensor is quantized.

    Raises
    ------
    ModelFileError
        For a damaged file.
    """
    found = [info for info in _kept(path)[1] if info.type.name.lower() not in ("f32", "f16", "bf16", "f64")]
    if not found:
        return None
    counts = Counter(map(_spelled, found))
    held = sum(prod(info.shape) for info in found) * itemsize
    return Expanded(reason, dict(counts.most_common()), sum(info.nbytes for info in found), held)


def _kept(path: str | Path | Header) -> tuple[Header, list[TensorInfo]]:
    """Return a file's header, and those of its tensors that become weights."""
    meta = metadata_of(path)
    left_out = {name for names in skipped(meta).values() for name in names}
    return meta.header, [info for info in meta.header.tensors if info.name not in left_out]


_SPELLED = {name.lower(): name for name in WEIGHTS}


def _spelled(info: TensorInfo) -> str:
    """Return a tensor's type in ggml's spelling."""
    kind: str = info.type.name.lower()
    return _SPELLED.get(kind, kind)


def _plain_names(architecture: Architecture) -> frozenset[str]:
    """Collect names, within a block, of the matrices that a file has row by row as the Transformers model does."""
    rules = [rule for part in architecture.tensors.values() for rule in part]
    lie = {r.gguf for r in rules if isinstance(r.gguf, str) and r.rows is None and r.cols is None and r.values is None}
    return frozenset(lie - {r.gguf for r in rules if r.rows is not None or r.cols is not None or r.values is not None})


def _saved(info: TensorInfo, plain: frozenset[str]) -> SavedTensor:
    dims = [dim for dim in info.shape if dim > 1] or [1]
    shape: Shape = (
        "vector" if len(dims) == 1 or info.name.endswith(_SMALL) else "matrix" if len(dims) == 2 else "experts"
    )
    n_in = dims[-1]
    n_out = dims[-2] if shape != "vector" else prod(dims[:-1])
    n_stack = prod(dims[:-2]) if shape == "experts" else 1
    own = info.name.split(".", 2)[-1] if info.name.startswith("blk.") else info.name
    place = _PLACES.get(info.name, "layer")
    return SavedTensor(info.type.name.lower(), n_stack, n_out, n_in, shape, place, lies=own in plain)
