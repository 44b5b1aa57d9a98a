"""Open a GGUF model whose weights stay where they are in the mapped file, without Transformers' classes.

Owns the checks of a file against its graph. Does not own the map (`tensors.py`) or what the header says
(`describe.py`). `load.py` is the other way, into a Transformers class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hybridkv.errors import ModelError
from hybridkv.gguf.architectures import get_architecture
from hybridkv.gguf.architectures.record import Architecture
from hybridkv.gguf.describe import FileConfig, check_tensors, file_config, name_of, notices, says_none
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.reader import Header
from hybridkv.gguf.split import metadata_of
from hybridkv.gguf.tensors import GgufSource, Memory, check_multiplied
from hybridkv.gguf.tokenizer import end_ids, read_tokenizer
from hybridkv.model import graph_of, rejects
from hybridkv.model.tensors import Named, graph_tensors
from hybridkv.text.tokenizer import TextTokenizer

HEADS = "mtp_num_hidden_layers"


@dataclass(frozen=True, slots=True)
class MappedModel:
    """A model whose weights lie in a mapped file.

    `tokenizer` is None where the file has none; `notices` says what of the file was left out, tensors and keys.
    """

    name: str
    config: FileConfig
    source: GgufSource
    tokenizer: TextTokenizer | None
    end_ids: tuple[int, ...]
    notices: tuple[str, ...]


def map_gguf(path: str | Path | Header, memory: Memory = "mapped") -> MappedModel:
    """Open a model.

    Parameters
    ----------
    path
        The .gguf file, of a split model any of its parts; or its header.
    memory
        `copied` reads the file once into this process's memory instead.

    Raises
    ------
    ModelFileError
        For whatever is wrong with the file, before its weights are touched.
    ModelError
        For a model that no graph can be written of.
    """
    meta = metadata_of(path)
    architecture = get_architecture(meta.header)
    config = file_config(meta, architecture)
    names = _check(meta, architecture, config)
    check_multiplied(meta.header, names)
    tokenizer = None if says_none(meta) else read_tokenizer(meta)
    messages = notices(meta, with_tokenizer=tokenizer is not None, n_heads=getattr(config, HEADS, 0))
    source = GgufSource(meta.header, memory)
    return MappedModel(name_of(meta), config, source, tokenizer, tuple(end_ids(meta, config.vocab_size)), messages)


def _check(meta: Metadata, architecture: Architecture, config: FileConfig) -> set[str]:
    """Check that the file has what the graph reads, no more, in the right shapes; the names of those tensors."""
    with _described(meta):
        reason = rejects(config)
    if reason is not None:
        raise ModelError(f"the native backend cannot run {meta.header.path}: {reason}", hint="use --backend eager")
    with _described(meta):
        tensors = list(graph_tensors(graph_of(config), meta.has_tensor))
    found = {tensor.name_in(meta.has_tensor): tensor for tensor in tensors}
    missing = {tensor.names[0] for tensor in tensors if tensor.name_in(meta.has_tensor) is None and not tensor.optional}
    found.pop(None, None)
    names = {name for name in found if name is not None}
    check_tensors(meta, architecture, names | missing, n_heads=getattr(config, HEADS, 0))
    for name, tensor in found.items():
        if name is not None:
            _check_shape(meta, name, tensor)
    return names


def _check_shape(meta: Metadata, name: str, tensor: Named) -> None:
    """Check a tensor's dimensions; those of size one say nothing, and files leave them out."""
    shape = meta.tensor(name).shape
    if [dim for dim in shape if dim > 1] != [dim for dim in tensor.shape if dim > 1]:
        meta.fail(f"tensor {name!r} has shape {list(shape)}; the metadata asks for {list(tensor.shape)}")


@contextmanager
def _described(meta: Metadata) -> Iterator[None]:
    """Say that the metadata describes no model, whatever a family stumbles over because of it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        meta.fail(f"the metadata is not a valid model config: {text}", hint="a number in the file is wrong")
