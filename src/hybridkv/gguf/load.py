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
from hybridkv.gguf.architectures.record import Architecture
from hybridkv.gguf.decode import decodable_types, decode_into, is_decodable
from hybridkv.gguf.describe import check_tensors, fields_of, name_of, notices, says_none
from hybridkv.gguf.keys import check_unread
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.pairing import Pairing, build_skeleton, pair, same_shape, state
from hybridkv.gguf.reader import Header
from hybridkv.gguf.rows import OpenModel, open_model
from hybridkv.gguf.split import metadata_of
from hybridkv.gguf.tensors import GgufSource
from hybridkv.gguf.tokenizer import end_ids, load_tokenizer
from hybridkv.kernels.weights import Weight

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    `tokenizer` is None where the file has none; `notices` says what of the file was left out, tensors and keys.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    notices: tuple[str, ...]


class Hold(Protocol):
    """Gives the parameters of a Transformers model that stand for matrices."""

    def of_file(self, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
        """Hold a matrix that lies in the file as the model has it."""
        ...

    def of_values(self, parameter: torch.Tensor) -> torch.Tensor:
        """Hold a decoded parameter, which is then free."""
        ...


def load_gguf(
    path: str | Path | Header,
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
    tokenizer, messages = opened.tokenizer()
    _fill(opened, torch.device(device), hold)
    model.eval()
    if ends := end_ids(opened.meta, opened.config.vocab_size):
        model.generation_config.eos_token_id = ends
    return LoadedModel(name_of(opened.meta), model, tokenizer, messages)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file whose header was checked against its architecture; `model` is without memory."""

    meta: Metadata
    config: PreTrainedConfig
    model: PreTrainedModel
    pairings: Sequence[Pairing]

    def tokenizer(self) -> tuple[PreTrainedTokenizerFast | None, tuple[str, ...]]:
        """Read the tokenizer, and what is worth knowing of the file."""
        tokenizer = None if says_none(self.meta) else load_tokenizer(self.meta)
        return tokenizer, notices(self.meta, with_tokenizer=tokenizer is not None)


def _open(path: str | Path | Header, dtype: torch.dtype, attn_implementation: str) -> _Opened:
    """Read and check all that comes before weights."""
    meta = metadata_of(path)
    architecture = get_architecture(meta.header)
    config = class_config(meta)
    model = _skeleton(meta, config, dtype, attn_implementation)
    pairings = pair(architecture, config, model, {info.name for info in meta.header.tensors})
    _check(meta, architecture, pairings)
    return _Opened(meta, config, model, pairings)


def class_config(meta: Metadata) -> PreTrainedConfig:
    """Build a file's config as Transformers' class.

    Raises
    ------
    ModelFileError
        For metadata that describes no model.
    """
    import transformers

    architecture = get_architecture(meta.header)
    config_class = getattr(transformers, architecture.config_class)
    fields = fields_of(meta, architecture)
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
    meta.fail(f"the metadata is not a valid model config: {text}", hint="a number in the file is wrong")


def _skeleton(
    meta: Metadata, config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """Build the model without memory: all its tensors are on the meta device."""
    with _described(meta):
        return build_skeleton(config, dtype, attn_implementation)


def _check(meta: Metadata, architecture: Architecture, pairings: Sequence[Pairing]) -> None:
    """Check that the file has what the model needs, no more, in types and shapes that can be read."""
    needed = {name for pairing in pairings for name in pairing.names}
    check_tensors(meta, architecture, needed)
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
