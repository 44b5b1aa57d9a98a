"""Write a Transformers checkpoint as a GGUF file: the architectures' tables, read from right to left.

Owns the order of tensors, their types and the bytes. Does not own reading the checkpoint (`checkpoint.py`), the
tokenizer's metadata (`vocabulary.py`) or which parameter a tensor is (`pairing.py`). Called by `engine/convert.py`.

Memory: the largest parameter, in the checkpoint's dtype, in float32 and in the file's type.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from numpy.typing import NDArray

from hybridkv.errors import ModelError, ModelFileError
from hybridkv.gguf.architectures import DIRECTORIES, WRITABLE
from hybridkv.gguf.architectures.record import Architecture, Config, Key, Keys, Tables
from hybridkv.gguf.checkpoint import Checkpoint
from hybridkv.gguf.decode import Floats
from hybridkv.gguf.pairing import Pairing, build_skeleton, file_tensors, pair
from hybridkv.gguf.prediction import find_head

F32, F16, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""Values of `--type`; the names are ggml's."""

# Small, or read as float32 by every program: llama.cpp's converter keeps them so.
_PLAIN = ("norm.weight", "conv1d.weight", "shortconv.conv.weight", "ssm_a", "ssm_d", "ffn_gate_inp.weight", ".bias")

_SHARED = ("general.", "tokenizer.")


def find_architecture(config: Config) -> Architecture:
    """Return the architecture that a config can be written as.

    Raises
    ------
    ModelError
        For a `model_type` that is not in the tables, or a config that the format has no place for.
    """
    problems = []
    for architecture in _fitting(config):
        problem = architecture.suits(config) if architecture.suits else None
        if problem is None:
            return architecture
        problems.append(f"{architecture.name}: {problem}")
    raise ModelError(f"this {config.model_type!r} model cannot be written as GGUF: {'; '.join(problems)}")


def find_tables(config: Config) -> Architecture | Tables:
    """Return the tables that name a config's tensors, whether or not a file could say all else of it.

    Raises
    ------
    ModelError
        For a `model_type` that no table is of.
    """
    import transformers

    for tables in DIRECTORIES:
        if getattr(transformers, tables.config_class).model_type == config.model_type:
            return tables
    fitting = _fitting(config)
    suiting = (each for each in fitting if each.suits is None or each.suits(config) is None)
    return next(suiting, fitting[0])


def _fitting(config: Config) -> list[Architecture]:
    fitting = [each for each in WRITABLE if each.model_type == config.model_type]
    if not fitting:
        known = ", ".join(sorted({each.model_type for each in WRITABLE}))
        raise ModelError(f"unknown model_type {config.model_type!r}; known: {known}")
    return fitting


def write_gguf(
    directory: Path, output: Path, config: Config, *, name: str, type_: str, tokenizer: Keys
) -> tuple[Architecture, tuple[str, ...]]:
    """Write a model; the file appears whole or not at all.

    Parameters
    ----------
    directory
        Where the safetensors are.
    config
        Of the text model.
    type_
        Key of `TYPES`, for matrices; vectors, norms, convolutions and routers stay float32, and rows that do not
        fill q8_0 blocks are float16.
    tokenizer
        Its metadata; without a tokenizer, special ids at most, and the file says that it has none.

    Returns
    -------
    The architecture, and names of the checkpoint's tensors that were left out.

    Raises
    ------
    ModelError, ModelFileError
        For whatever is wrong with the checkpoint, or if the file cannot be written.
    """
    import torch

    architecture = find_architecture(config)
    model = build_skeleton(config, torch.float32)
    own = pair(architecture, config, model, ())
    settings = {each: values for each, write in architecture.settings if (values := write(config)) is not None}
    checkpoint = Checkpoint(directory, model)
    parts, keys, unused = [(own, checkpoint)], _keys(architecture, config), checkpoint.unused
    if (head := find_head(directory, architecture, config, unused)) is not None:
        parts.append(head)
        keys = _keys_with_head(architecture, config)
        unused = tuple(name for name in unused if name not in head[1].used)
    try:
        with _replacing(output) as temporary:
            writer = GGUFWriter(temporary, architecture.name)
            keys = {"general.name": name, "general.file_type": int(TYPES[type_][1]), **keys}
            for key, value in {**keys, "tokenizer.ggml.model": "none", **tokenizer}.items():
                _add_key(writer, key if key.startswith(_SHARED) else f"{architecture.name}.{key}", value)
            _write(writer, parts, settings, TYPES[type_][0])
            return architecture, unused
    except OSError as error:
        raise ModelFileError(f"{output} cannot be written: {error.strerror or error}") from error


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Give a file beside `output` to write to; it takes that place at the end, and is removed after an error."""
    handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _keys(architecture: Architecture, config: Config) -> Keys:
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        **{key: getattr(config, field) for field, key in architecture.sizes.items()},
        **{key: float(getattr(config, field)) for field, key in architecture.reals.items()},
        **architecture.keys(config),
    }


def _keys_with_head(architecture: Architecture, config: Config) -> Keys:
    """Return the metadata of a model and the one block of a head behind its own."""
    keys = _keys(architecture, config)
    if any(isinstance(value, list) and len(value) == config.num_hidden_layers for value in keys.values()):
        longer = deepcopy(config)  # what is listed by layer is listed by block
        longer.num_hidden_layers += 1
        longer.layer_types = [*config.layer_types, "full_attention"]
        keys = _keys(architecture, longer)
    return {**keys, "block_count": config.num_hidden_layers + 1, "nextn_predict_layers": 1}


def _add_key(writer: GGUFWriter, key: str, value: Key) -> None:
    if isinstance(value, list):
        writer.add_key_value(key, value, GGUFValueType.ARRAY)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _write(
    writer: GGUFWriter,
    parts: list[tuple[list[Pairing], Checkpoint]],
    settings: Mapping[str, Floats],
    type_: GGMLQuantizationType,
) -> None:
    """Write header and tensors; one parameter is in memory at a time."""
    pairings = [(pairing, checkpoint) for own, checkpoint in parts for pairing in own]
    for name, values in settings.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for pairing, _ in pairings:
        for name, shape in zip(pairing.names, pairing.shapes, strict=True):
            kind = _type_of(name, shape, type_)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            n_bytes = math.prod(shape) // block * block_bytes
            writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in settings.values():
            writer.write_tensor_data(values)
        for pairing, checkpoint in pairings:
            value = checkpoint.parameter(pairing.param).float()
            for name, tensor in file_tensors(pairing, checkpoint.config, value):
                kind = _type_of(name, tuple(tensor.shape), type_)
                writer.write_tensor_data(_encoded(name, tensor.contiguous().numpy(), kind))
    finally:
        writer.close()


def _type_of(name: str, shape: tuple[int, ...], asked: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1 or name.endswith(_PLAIN):
        return F32
    return F16 if asked == Q8_0 and shape[-1] % GGML_QUANT_SIZES[Q8_0][0] else asked


def _encoded(name: str, values: Floats, type_: GGMLQuantizationType) -> NDArray[Any]:
    with np.errstate(all="ignore"):
        encoded: NDArray[Any] = quantize(np.ascontiguousarray(values, np.float32), type_)
    largest = max(float(values.max()), -float(values.min()))
    if type_ != F32 and math.isfinite(largest) and largest > _LIMITS[type_]:
        raise ModelError(
            f"tensor {name!r} holds {largest:g}, more than {type_.name} can", hint="convert it with --type f32"
        )
    return encoded


_LIMITS = {F16: 65504.0, Q8_0: 65504.0 * 127}
