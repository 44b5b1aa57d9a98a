"""Load a GGUF model into the Transformers class of its architecture.

Owns the order of things: header, config, names and shapes, tokenizer, and only then memory for weights.
Does not own the file format (`reader.py`), an architecture's tables (`architectures/`), decoding
(`decode.py`) or the tokenizer (`tokenizer.py`). Called by the command line and by library users.

Memory: the final weights plus one decoded chunk (`decode.CHUNK_VALUES`); the file itself is mapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv.errors import UsageError
from hybridkv.gguf.architectures import get_architecture
from hybridkv.gguf.architectures.record import Architecture, Fields, TensorRule
from hybridkv.gguf.decode import decodable_types, decode_into, is_decodable
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.reader import TensorInfo, map_file, raw_rows, read_header
from hybridkv.gguf.tokenizer import end_ids, load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    `tokenizer` is None where the file has none; `notices` says what of the file was left out.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one parameter comes from."""

    info: TensorInfo
    rule: TensorRule


def describe_gguf(path: str | Path) -> tuple[str, PreTrainedConfig]:
    """Return a model's name and Transformers config, from the header alone.

    Raises
    ------
    ModelFileError
        For a damaged file, an unknown architecture, or metadata that is missing or out of range.
    """
    meta = Metadata(read_header(path))
    architecture = get_architecture(meta.header)
    return _name(meta), _config(architecture, _fields(meta, architecture))


def config_from_gguf(path: str | Path) -> PreTrainedConfig:
    """Return a file's Transformers config alone; see `describe_gguf`."""
    return describe_gguf(path)[1]


def load_gguf(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
    replace: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> LoadedModel:
    """Load a model with its tokenizer.

    Parameters
    ----------
    path
        The .gguf file.
    dtype
        Of the weights in memory; float32 if None.
    device
        Where the weights go.
    attn_implementation
        Any name that Transformers knows, registered ones included.
    replace
        Gives what takes a filled parameter's place in the model; the parameter is then free.

    Raises
    ------
    ModelFileError
        For whatever is wrong with the file, before memory is taken for its weights.
    """
    import torch

    dtype = torch.float32 if dtype is None else dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"weights cannot be {dtype}; allowed: float32, bfloat16, float16")
    meta = Metadata(read_header(path))
    architecture = get_architecture(meta.header)
    fields = _fields(meta, architecture)
    skipped = _skipped(meta, architecture)
    sources = _match(meta, architecture, fields, skipped)
    tokenizer = load_tokenizer(meta)
    model = _skeleton(_config(architecture, fields), dtype, attn_implementation)
    _check_shapes(meta, model, sources)
    _fill(meta, model, sources, fields, torch.device(device), replace)
    model.eval()
    if ends := end_ids(meta, fields["vocab_size"]):
        model.generation_config.eos_token_id = ends
    notices = (f"{len(skipped)} tensors of multi-token prediction blocks were skipped",) if skipped else ()
    return LoadedModel(_name(meta), model, tokenizer, notices)


def _name(meta: Metadata) -> str:
    return meta.text("general.name") if meta.has("general.name") else meta.header.path.stem


def _fields(meta: Metadata, architecture: Architecture) -> Fields:
    """Return the config class's arguments: the architecture's own, and those that all files share."""
    if meta.has("split.count") and meta.integer("split.count", low=0, high=2**16) > 1:
        meta.fail("this is one part of a split model", hint="join the parts with llama-gguf-split --merge")
    embedding = meta.tensor(_EMBEDDING)
    vocab_size = embedding.shape[0]
    if meta.has("tokenizer.ggml.tokens") and len(meta.texts("tokenizer.ggml.tokens")) > vocab_size:
        meta.fail(f"there are more tokens than the {vocab_size} rows of {_EMBEDDING!r}")
    return {
        **architecture.fields(meta),
        "vocab_size": vocab_size,
        "tie_word_embeddings": not meta.has_tensor(_OUTPUT),
        "bos_token_id": meta.token_id("bos", vocab_size),
        "eos_token_id": meta.token_id("eos", vocab_size),
        "pad_token_id": meta.token_id("padding", vocab_size),
    }


def _config(architecture: Architecture, fields: Fields) -> PreTrainedConfig:
    import transformers

    config_class = getattr(transformers, architecture.config_class)
    config: PreTrainedConfig = config_class(**fields, architectures=[architecture.model_class])
    return config


def _rules(architecture: Architecture, fields: Fields) -> Iterator[TensorRule]:
    """Yield the rules of every tensor that this model has, under the names of the whole file."""
    for rule in architecture.model_tensors:
        if rule.gguf != _OUTPUT or not fields["tie_word_embeddings"]:
            yield rule
    for layer, layer_type in enumerate(fields["layer_types"]):
        for rule in architecture.layer_tensors[layer_type]:
            gguf, param = f"blk.{layer}.{rule.gguf}", f"model.layers.{layer}.{rule.param}"
            yield TensorRule(gguf, param, rule.values, rule.rows, rule.cols)


def _skipped(meta: Metadata, architecture: Architecture) -> set[str]:
    prefixes = tuple(f"blk.{block}." for block in architecture.skipped_blocks(meta))
    return {info.name for info in meta.header.tensors if info.name.startswith(prefixes)}


def _match(meta: Metadata, architecture: Architecture, fields: Fields, skipped: set[str]) -> dict[str, _Source]:
    """Return the source of every parameter, after checking that tensors and parameters pair up."""
    rules = {rule.gguf: rule for rule in _rules(architecture, fields)}
    present = {info.name for info in meta.header.tensors} - skipped
    for problem, names in (("missing", rules.keys() - present), ("unknown", present - rules.keys())):
        if names:
            shown = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
            meta.fail(
                f"{len(names)} {problem} tensor(s) for architecture {architecture.name!r}: {shown}",
                hint="the file is incomplete, or its converter writes another variant of this architecture",
            )
    sources = {rule.param: _Source(meta.tensor(name), rule) for name, rule in rules.items()}
    for info in (source.info for source in sources.values()):
        if not is_decodable(info.type):
            meta.fail(
                f"tensor {info.name!r} has type {info.type.name}, which gguf-py cannot decode; "
                f"allowed: {', '.join(decodable_types())}",
                hint="requantize the model to one of these types",
            )
    return sources


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """Build the model without memory: all its tensors are on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    return model


def _state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what a checkpoint of this model holds, by name; tied tensors once."""
    unique = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: model.get_parameter_or_buffer(name) for name in unique.values()}


def _check_shapes(meta: Metadata, model: PreTrainedModel, sources: Mapping[str, _Source]) -> None:
    state = _state(model)
    assert state.keys() == sources.keys(), f"the tables leave out {sorted(state.keys() ^ sources.keys())}"
    for name, tensor in state.items():
        info, shape = sources[name].info, list(tensor.shape)
        # A dimension of one holds no numbers, and files leave it out.
        if [dim for dim in info.shape if dim > 1] != [dim for dim in shape if dim > 1]:
            meta.fail(f"tensor {info.name!r} has shape {list(info.shape)}; the metadata asks for {shape} ({name})")


def _fill(
    meta: Metadata,
    model: PreTrainedModel,
    sources: Mapping[str, _Source],
    fields: Fields,
    device: torch.device,
    replace: Callable[[torch.Tensor], torch.Tensor] | None,
) -> None:
    """Replace every meta tensor of the model: what the file holds, then the buffers that it does not."""
    import torch

    data = map_file(meta.header)
    for name, tensor in _state(model).items():
        info, rule = sources[name].info, sources[name].rule
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        raw = raw_rows(data, info)
        decode_into(
            value.view(len(raw), math.prod(info.shape) // len(raw)),
            raw,
            info.type,
            rows=rule.rows and rule.rows(fields),
            cols=rule.cols and rule.cols(fields),
            values=rule.values,
        )
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        loaded: Any = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
        loaded._is_hf_initialized = True
        if replace is not None and is_parameter:
            loaded = replace(loaded)
            loaded._is_hf_initialized = True
        _assign(model, name, loaded)
    for name, buffer in list(model.named_non_persistent_buffers()):
        _assign(model, name, torch.empty_like(buffer, device=device))
    # As in `from_pretrained`: what is loaded is marked as done, so that this computes the other buffers
    # alone (rotary frequencies, in float32 whatever the model's dtype).
    model.tie_weights()
    model.initialize_weights()


def _assign(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)
