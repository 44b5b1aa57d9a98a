"""Load a GGUF model into the Transformers class of its architecture.

Owns the order of things: header, config, names and shapes, tokenizer, and only then memory for weights.
Does not own the file format (`reader.py`), an architecture's tables (`architectures/`), decoding
(`decode.py`) or the tokenizer (`tokenizer.py`). Called by the command line and by library users.

Memory: the final weights plus one chunk (`decode.CHUNK_VALUES`), as bytes and decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from hybridkv.errors import UsageError
from hybridkv.gguf.architectures import get_architecture
from hybridkv.gguf.architectures.layers import n_blocks
from hybridkv.gguf.architectures.record import Architecture, Fields
from hybridkv.gguf.bpe import assumption
from hybridkv.gguf.decode import decodable_types, decode_into, is_decodable
from hybridkv.gguf.keys import check_unread, unknown_keys
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.pairing import Pairing, build_skeleton, pair, same_shape, state
from hybridkv.gguf.rows import OpenModel, open_model
from hybridkv.gguf.split import read_model
from hybridkv.gguf.tensors import GgufSource, Memory, check_multiplied
from hybridkv.gguf.tokenizer import end_ids, load_tokenizer
from hybridkv.kernels.weights import Weight

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"

# Tensors beside the text model's in files that hold a whole multimodal model, as ollama writes them.
_ENCODERS = ("v.", "a.", "mm.")
_PREDICTION = "mtp."


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    `tokenizer` is None where the file has none; `notices` says what of the file was left out, tensors and keys.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MappedModel:
    """A model whose weights lie in a mapped file; see `LoadedModel`."""

    name: str
    config: PreTrainedConfig
    source: GgufSource
    tokenizer: PreTrainedTokenizerFast | None
    end_ids: tuple[int, ...]
    notices: tuple[str, ...]


class Hold(Protocol):
    """Gives the parameters of a Transformers model that stand for matrices."""

    def of_file(self, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
        """For a matrix that lies in the file as the model has it."""
        ...

    def of_values(self, parameter: torch.Tensor) -> torch.Tensor:
        """For a decoded parameter, which is then free."""
        ...


def describe_gguf(path: str | Path) -> tuple[str, PreTrainedConfig]:
    """Return a model's name and Transformers config, from the header alone.

    Raises
    ------
    ModelFileError
        For a damaged file, an unknown architecture, or metadata that is missing or out of range.
    """
    meta = Metadata(read_model(path))
    return _name(meta), _config(meta, get_architecture(meta.header))


def config_from_gguf(path: str | Path) -> PreTrainedConfig:
    """Return a file's Transformers config alone; see `describe_gguf`."""
    return describe_gguf(path)[1]


def load_gguf(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
    hold: Hold | None = None,
) -> LoadedModel:
    """Load a model with its tokenizer.

    Parameters
    ----------
    path
        The .gguf file; of a split model, any of its parts.
    dtype
        Of the weights in memory; float32 if None.
    device
        Where the weights go.
    attn_implementation
        Any name that Transformers knows, registered ones included.
    hold
        Gives the parameters that stand for matrices; those that lie in the file as the model has them stay there.

    Raises
    ------
    ModelFileError
        For whatever is wrong with the file, before memory is taken for its weights.
    """
    import torch

    dtype = torch.float32 if dtype is None else dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"weights cannot be {dtype}; allowed: float32, bfloat16, float16")
    opened = _open(path, dtype, attn_implementation)
    model = opened.model
    tokenizer, notices = opened.tokenizer()
    _fill(opened, torch.device(device), hold)
    model.eval()
    if ends := opened.end_ids():
        model.generation_config.eos_token_id = ends
    return LoadedModel(_name(opened.meta), model, tokenizer, notices)


def map_gguf(path: str | Path, memory: Memory = "mapped") -> MappedModel:
    """Open a model whose weights stay where they are in the mapped file, checked as `load_gguf` checks them.

    Parameters
    ----------
    memory
        `copied` reads the file once into this process's memory instead.

    Raises
    ------
    ModelFileError
        For whatever is wrong with the file.
    """
    import torch

    opened = _open(path, torch.float32, "sdpa")
    check_multiplied(opened.meta.header, {name for pairing in opened.pairings for name in pairing.names})
    tokenizer, notices = opened.tokenizer()
    source = GgufSource(opened.meta.header, memory)
    return MappedModel(_name(opened.meta), opened.config, source, tokenizer, tuple(opened.end_ids() or ()), notices)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file whose header was checked against its architecture; `model` is without memory."""

    meta: Metadata
    config: PreTrainedConfig
    model: PreTrainedModel
    pairings: Sequence[Pairing]
    skipped: tuple[str, ...]

    def tokenizer(self) -> tuple[PreTrainedTokenizerFast | None, tuple[str, ...]]:
        """The tokenizer, and what is worth knowing of the file."""
        tokenizer = None if _says_none(self.meta) else load_tokenizer(self.meta)
        assumed = None if tokenizer is None else assumption(self.meta)
        return tokenizer, (*self.skipped, *([assumed] if assumed else []), *unknown_keys(self.meta))

    def end_ids(self) -> list[int]:
        return end_ids(self.meta, self.config.vocab_size)


def _open(path: str | Path, dtype: torch.dtype, attn_implementation: str) -> _Opened:
    """Read and check all that comes before weights."""
    meta = Metadata(read_model(path))
    architecture = get_architecture(meta.header)
    config = _config(meta, architecture)
    skipped = _skipped(meta)
    model = _skeleton(meta, config, dtype, attn_implementation)
    pairings = pair(architecture, config, model, {info.name for info in meta.header.tensors})
    _check(meta, architecture, pairings, {name for names in skipped.values() for name in names})
    notices = [f"{len(names)} tensors of {what} were skipped" for what, names in skipped.items() if names]
    return _Opened(meta, config, model, pairings, tuple(notices))


def _says_none(meta: Metadata) -> bool:
    """Whether a file says that it has no tokenizer, in the two words that llama.cpp knows for it."""
    key = "tokenizer.ggml.model"
    return meta.has(key) and meta.text(key) in ("none", "no_vocab")


def _name(meta: Metadata) -> str:
    return meta.text("general.name") if meta.has("general.name") else meta.header.path.stem


def _fields(meta: Metadata, architecture: Architecture) -> Fields:
    """Return the config class's arguments: the architecture's own, and those that all files share."""
    embedding = meta.tensor(_EMBEDDING)
    vocab_size = embedding.shape[0]
    if meta.has("tokenizer.ggml.tokens") and len(meta.texts("tokenizer.ggml.tokens")) > vocab_size:
        meta.fail(f"there are more tokens than the {vocab_size} rows of {_EMBEDDING!r}")
    return {
        "num_hidden_layers": n_blocks(meta)[1],
        "max_position_embeddings": meta.integer("context_length", high=2**31 - 1),
        **{field: meta.integer(key) for field, key in architecture.sizes.items()},
        **{field: meta.real(key) for field, key in architecture.reals.items()},
        "vocab_size": vocab_size,
        "tie_word_embeddings": not meta.has_tensor(_OUTPUT),
        "bos_token_id": meta.token_id("bos", vocab_size),
        "eos_token_id": meta.token_id("eos", vocab_size),
        "pad_token_id": meta.token_id("padding", vocab_size),
        **architecture.fields(meta),
    }


def _config(meta: Metadata, architecture: Architecture) -> PreTrainedConfig:
    import transformers

    config_class = getattr(transformers, architecture.config_class)
    fields = _fields(meta, architecture)
    check_unread(meta)
    with _described(meta):
        config: PreTrainedConfig = config_class(**fields, architectures=[architecture.model_class])
    return config


@contextmanager
def _described(meta: Metadata) -> Iterator[None]:
    """Say that the metadata describes no model, whatever Transformers stumbles over because of it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        _no_model(meta, error)
    except StrictDataclassError as error:
        _no_model(meta, error)


def _no_model(meta: Metadata, error: BaseException) -> NoReturn:
    text = " ".join(str(error).split())[:300]
    meta.fail(f"the metadata describes no model: {text}", hint="a number in the file is wrong")


def _skeleton(
    meta: Metadata, config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """Build the model without memory: all its tensors are on the meta device."""
    with _described(meta):
        return build_skeleton(config, dtype, attn_implementation)


def _skipped(meta: Metadata) -> dict[str, set[str]]:
    """Return the tensors for which the model classes have no place, by what they are of."""
    blocks, layers = n_blocks(meta)
    prefixes = {
        "multi-token prediction blocks": (_PREDICTION, *(f"blk.{block}." for block in range(layers, blocks))),
        "image and audio encoders": _ENCODERS,
    }
    names = [info.name for info in meta.header.tensors]
    return {what: {name for name in names if name.startswith(starts)} for what, starts in prefixes.items()}


def _check(meta: Metadata, architecture: Architecture, pairings: Sequence[Pairing], skipped: set[str]) -> None:
    """Check that the file has what the model needs, no more, in types and shapes that can be read."""
    needed = {name for pairing in pairings for name in pairing.names}
    present = {info.name for info in meta.header.tensors} - skipped - {name for name, _ in architecture.settings}
    for problem, names in (("missing", needed - present), ("unknown", present - needed)):
        if names:
            shown = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
            meta.fail(
                f"{len(names)} {problem} tensor(s) for architecture {architecture.name!r}: {shown}",
                hint="the file is incomplete, or its converter writes another variant of this architecture",
            )
    for info in map(meta.tensor, needed):
        if not is_decodable(info.type):
            meta.fail(
                f"tensor {info.name!r} has type {info.type.name}, which gguf-py cannot decode; "
                f"allowed: {', '.join(decodable_types())}",
                hint="requantize the model to one of these types",
            )
    for pairing in pairings:
        for name, shape in zip(pairing.names, pairing.shapes, strict=True):
            info = meta.tensor(name)
            if not same_shape(info.shape, shape):
                asked = list(pairing.shown(shape))
                meta.fail(
                    f"tensor {name!r} has shape {list(info.shape)}; the metadata asks for {asked} ({pairing.param})"
                )


def _fill(opened: _Opened, device: torch.device, hold: Hold | None) -> None:
    """Replace every meta tensor of the model: what the file holds, then the buffers that it does not."""
    import torch

    meta, model = opened.meta, opened.model
    source = None if hold is None else GgufSource(meta.header)
    tensors = state(model)
    with open_model(meta.header) as files:
        for pairing in opened.pairings:
            tensor = tensors[pairing.param]
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            loaded: Any
            if hold is not None and source is not None and is_parameter and pairing.is_plain:
                loaded = hold.of_file(source.weight(pairing.names[0]), tensor.dtype)
            else:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                _decode(value.view(pairing.matrix), pairing, meta, files)
                loaded = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
                loaded = hold.of_values(loaded) if hold is not None and is_parameter else loaded
            loaded._is_hf_initialized = True
            _assign(model, pairing.param, loaded)
    for name, buffer in list(model.named_non_persistent_buffers()):
        _assign(model, name, torch.empty_like(buffer, device=device))
    # As in `from_pretrained`: what is loaded is marked as done, so that this computes the other buffers
    # alone (rotary frequencies, in float32 whatever the model's dtype).
    model.tie_weights()
    model.initialize_weights()


def _decode(target: torch.Tensor, pairing: Pairing, meta: Metadata, files: OpenModel) -> None:
    """Decode a parameter's tensors into `target` `[stack, rows, cols]`."""
    stack, _, n_cols = pairing.matrix
    start = 0
    for name in pairing.names:
        info = meta.tensor(name)
        n_rows = math.prod(info.shape) // (stack * n_cols)
        for matrix, rows in zip(target, files.rows(info, stack * n_rows).stack(stack), strict=True):
            decode_into(
                matrix[start : start + n_rows] if pairing.rows is None else matrix,
                rows,
                info.type,
                rows=None if pairing.rows is None else pairing.rows[start : start + n_rows],
                cols=pairing.cols,
                values=None if pairing.rule.values is None else pairing.rule.values.read,
            )
        start += n_rows


def _assign(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)
