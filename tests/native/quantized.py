"""GGUF files of small random models in mixes of weight types, rounded by ggml's own quantizers."""

from __future__ import annotations

from atexit import register
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from hybridkv.engine.convert import convert
from hybridkv.formats.weights import get_weight_format
from tests.families import build
from tests.oracles import ik_ggml

MIXES = {
    "q4_k_m": (Type.Q4_K, Type.Q6_K, Type.Q5_K),
    "q6_k": (Type.Q6_K, Type.Q6_K, Type.Q6_K),
    "q5_k": (Type.Q5_K, Type.Q5_K, Type.Q5_K),
    "iq4_xs": (Type.IQ4_XS, Type.Q6_K, Type.Q5_K),
    "q8_0": (Type.Q8_0, Type.Q8_0, Type.Q8_0),
    "q3_k": (Type.Q3_K, Type.Q5_K, Type.Q4_K),
    "q2_k": (Type.Q2_K, Type.Q4_K, Type.Q3_K),
}
"""Types of most matrices, of those that llama.cpp gives more bits, and of joined projections."""

SIZES = {
    "qwen3_5_text": {"linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "qwen3_5_moe_text": {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "head_dim": 64},
    "qwen3_next": {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "head_dim": 64},
    "llama_unbiased": {"head_dim": 64},
    "qwen3": {"head_dim": 128, "num_attention_heads": 4},
    "qwen3_moe": {"head_dim": 64, "intermediate_size": 256},
}
"""Changes to the families' models so that every row is blocks of 256."""

_WIDE = {"hidden_size": 256, "intermediate_size": 512}
_EXPERTS = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
_MORE = ("output.weight", "attn_v.weight", "ffn_down.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight")
_JOINED = ("attn_qkv.weight", "ssm_in.weight")


@cache
def plain_file(family: str) -> Path:
    """A family's random model as a float32 file, with rows of whole blocks of 256."""
    directory = Path(mkdtemp(prefix="hybridkv-quantized-"))
    register(rmtree, directory)
    experts = _EXPERTS if "moe" in family or family == "qwen3_next" else {}
    build(family, **{**_WIDE, **experts, **SIZES[family]}).save_pretrained(directory / "model")
    return convert(directory / "model", directory / "f32.gguf", weights="f32", tokenizer="omitted").path


@cache
def quantized_file(family: str, mix: str, tensors_per_part: int = 0) -> Path:
    """The same model in a mix; of several parts the first, if there is a number of tensors for each."""
    plain = plain_file(family)
    path = plain.with_name(f"{mix}-{tensors_per_part}.gguf")
    most, more, joined = MIXES[mix]

    def type_of(name: str) -> Type:
        return more if name.endswith(_MORE) else joined if name.endswith(_JOINED) else most

    reader = GGUFReader(plain)
    writer = _like(reader, path, tensors_per_part)
    for tensor in reader.tensors:
        values = np.asarray(tensor.data)
        if values.ndim == 1 or tensor.name.endswith(("ssm_conv1d.weight", "ffn_gate_inp.weight")):
            writer.add_tensor(tensor.name, values)
        else:
            type_ = type_of(tensor.name)
            writer.add_tensor(tensor.name, rounded(values, type_), raw_dtype=type_)
    _write(writer)
    return path if not tensors_per_part else min(plain.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def rounded(values: npt.NDArray[np.float32], type_: Type) -> npt.NDArray[np.uint8]:
    """A matrix or a stack `[..., n_in]` as ggml rounds it, uint8 `[..., row_bytes]`."""
    n_bytes = get_weight_format(int(type_)).row_bytes(values.shape[-1])
    rows = ik_ggml.quantize(int(type_), values.reshape(-1, values.shape[-1]), n_bytes)
    return rows.reshape(*values.shape[:-1], n_bytes)


def with_tensor(source: Path, path: Path, name: str, data: npt.NDArray[np.uint8], type_: Type) -> Path:
    """A copy of a file with other bytes for one tensor."""
    reader = GGUFReader(source)
    writer = _like(reader, path, 0)
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, data, raw_dtype=type_)
        else:
            writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
    _write(writer)
    return path


def _like(reader: GGUFReader, path: Path, tensors_per_part: int) -> GGUFWriter:
    """A writer with a file's metadata."""
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    return writer


def _write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
