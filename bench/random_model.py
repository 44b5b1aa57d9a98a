"""Write a GGUF of a Qwen3.5-like model with random weights in a mix of types, for timing whole models of a real size.

By default the geometry of a 0.8B at q8_0: 24 layers, full attention in every fourth, hidden 1024, feed-forward 3584, 8
query and 2 KV heads of 256, 16 key and 16 value heads of 128, tied embeddings. With experts, that of a 35B-A3B: 16
query heads, 32 value heads, experts of 512, 8 for each token beside a shared one. The same arguments give the same
bytes. Other types than q8_0 are rounded by ggml itself (ik-llama-cpp-python, of the test extra). The vocabulary is made
up (bytes, two words, numbered fillers); the text that comes out means nothing.

    python bench/random_model.py random-0.8b-q8_0.gguf
    python bench/random_model.py random-2b-q6_k.gguf --mix q6_k --hidden 2048 --dense 6144
    python bench/random_model.py random-35b-q4_k_m.gguf --mix q4_k_m --layers 40 --hidden 2048 --experts 256
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGUFWriter, LlamaFileType, TokenType
from gguf import GGMLQuantizationType as Type

HEAD_DIM = 256
N_KEYS, LINEAR_DIM, CONV = 16, 128, 4
INTERVAL = 4
EXPERT_WIDTH, N_USED = 512, 8
STD = 0.02
POOL = 4096
"""Rows that are rounded for each type and length; longer matrices repeat them, turned."""

MIXES = {
    "q8_0": (Type.Q8_0, Type.Q8_0, Type.Q8_0),
    "q4_k_m": (Type.Q4_K, Type.Q6_K, Type.Q5_K),
    "iq4_xs": (Type.IQ4_XS, Type.Q6_K, Type.Q5_K),
    "q6_k": (Type.Q6_K, Type.Q6_K, Type.Q6_K),
    "q5_k": (Type.Q5_K, Type.Q5_K, Type.Q5_K),
    "q3_k": (Type.Q3_K, Type.Q5_K, Type.Q4_K),
    "q2_k": (Type.Q2_K, Type.Q4_K, Type.Q3_K),
    "q4_0": (Type.Q4_0, Type.Q4_0, Type.Q4_0),
}
"""Types of most matrices, of the head and of some layers' values and down projections, and of joined projections."""

FILE_TYPES = {
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_M,
    "q3_k": LlamaFileType.MOSTLY_Q3_K_M,
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}

_BLOCK = np.dtype([("d", "<f2"), ("codes", "i1", 32)])  # q8_0
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Model:
    """Sizes of a model; `n_experts` 0 for a dense one."""

    mix: str
    layers: int
    hidden: int
    feed_forward: int
    vocabulary: int
    n_experts: int
    n_heads: int
    n_kv_heads: int
    n_values: int
    """Value heads of a recurrent layer."""

    @property
    def architecture(self) -> str:
        """GGUF's name of it."""
        return "qwen35moe" if self.n_experts else "qwen35"

    @property
    def channels(self) -> int:
        """Of a recurrent layer's convolution."""
        return (2 * N_KEYS + self.n_values) * LINEAR_DIM

    def type_of(self, name: str, layer: int) -> Type:
        """The type of a layer's matrix, chosen as llama.cpp's mixes do."""
        most, more, joined = MIXES[self.mix]
        if name == "attn_qkv":
            return joined
        eighth = self.layers // 8
        favoured = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        return more if favoured and name.startswith(("attn_v", "ffn_down")) else most

    def matrices(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes [(experts,) out, in] of a layer's rounded weights."""
        hidden = self.hidden
        if (layer + 1) % INTERVAL == 0:
            yield "attn_q", (2 * self.n_heads * HEAD_DIM, hidden)  # with the output's gate
            yield "attn_k", (self.n_kv_heads * HEAD_DIM, hidden)
            yield "attn_v", (self.n_kv_heads * HEAD_DIM, hidden)
            yield "attn_output", (hidden, self.n_heads * HEAD_DIM)
        else:
            yield "attn_qkv", (self.channels, hidden)
            yield "attn_gate", (self.n_values * LINEAR_DIM, hidden)
            if not self.n_experts:
                yield "ssm_alpha", (self.n_values, hidden)
                yield "ssm_beta", (self.n_values, hidden)
            yield "ssm_out", (hidden, self.n_values * LINEAR_DIM)
        if self.n_experts:
            for name, shape in (("gate", (EXPERT_WIDTH, hidden)), ("up", (EXPERT_WIDTH, hidden))):
                yield f"ffn_{name}_exps", (self.n_experts, *shape)
                yield f"ffn_{name}_shexp", shape
            yield "ffn_down_exps", (self.n_experts, hidden, EXPERT_WIDTH)
            yield "ffn_down_shexp", (hidden, EXPERT_WIDTH)
        else:
            yield "ffn_gate", (self.feed_forward, hidden)
            yield "ffn_up", (self.feed_forward, hidden)
            yield "ffn_down", (hidden, self.feed_forward)

    def vectors(self, layer: int, random: np.random.Generator) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Names and values of a layer's float32 weights."""

        def normal(*shape: int, std: float = STD) -> npt.NDArray[np.float32]:
            return random.normal(0, std, shape).astype(np.float32)

        yield "attn_norm.weight", np.ones(self.hidden, np.float32)
        yield "post_attention_norm.weight", np.ones(self.hidden, np.float32)
        if self.n_experts:
            yield "ffn_gate_inp.weight", normal(self.n_experts, self.hidden)
            yield "ffn_gate_inp_shexp.weight", normal(self.hidden)
        if (layer + 1) % INTERVAL == 0:
            yield "attn_q_norm.weight", np.ones(HEAD_DIM, np.float32)
            yield "attn_k_norm.weight", np.ones(HEAD_DIM, np.float32)
            return
        yield "ssm_norm.weight", np.ones(LINEAR_DIM, np.float32)
        yield "ssm_a", -random.uniform(1, 16, self.n_values).astype(np.float32)
        yield "ssm_dt.bias", random.uniform(-6, -2, self.n_values).astype(np.float32)
        yield "ssm_conv1d.weight", normal(self.channels, CONV, std=0.3)
        if self.n_experts:
            yield "ssm_alpha.weight", normal(self.n_values, self.hidden)
            yield "ssm_beta.weight", normal(self.n_values, self.hidden)


@dataclass
class Rows:
    """Random rows of a type."""

    random: np.random.Generator
    _pools: dict[tuple[Type, int, float], Bytes] = field(default_factory=dict)

    def take(self, type_: Type, shape: tuple[int, ...], std: float) -> Bytes:
        """Rows of values of about this standard deviation, uint8 [rows, row bytes]."""
        n_rows = math.prod(shape[:-1])
        if type_ == Type.Q8_0:
            return random_q8_0((n_rows, shape[-1]), std, self.random)
        key = (type_, shape[-1], std)
        if key not in self._pools:
            self._pools[key] = quantize(type_, self.random.normal(0, std, (POOL, shape[-1])).astype(np.float32))
        pool = self._pools[key]
        turned = [np.roll(pool, 17 * i, axis=0) for i in range(-(-n_rows // POOL))]
        return np.concatenate(turned)[:n_rows]


def random_q8_0(shape: tuple[int, int], std: float, random: np.random.Generator) -> Bytes:
    """Blocks of uniform codes whose values have about this standard deviation; uint8 [out, row bytes]."""
    blocks = np.empty((shape[0], shape[1] // 32), _BLOCK)
    blocks["d"] = std / (127 / 3**0.5)
    blocks["codes"] = random.integers(-127, 128, (*blocks.shape, 32), np.int8)
    blocks["codes"][..., 0] = 127  # as a quantizer leaves a block: its largest value has the largest code
    return blocks.view(np.uint8).reshape(shape[0], -1)


def quantize(type_: Type, x: npt.NDArray[np.float32]) -> Bytes:
    """Rows as ggml rounds them."""
    spec = importlib.util.find_spec("ik_llama_cpp")
    if spec is None or spec.origin is None:
        sys.exit("ik-llama-cpp-python is not installed, and rounds all types but q8_0: pip install ik-llama-cpp-python")
    ggml = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml.so"))
    ggml.ggml_quantize_init.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p
    ]  # fmt: skip
    block, block_bytes = GGML_QUANT_SIZES[type_]
    out = np.zeros((len(x), x.shape[1] // block * block_bytes), np.uint8)
    ggml.ggml_quantize_init(int(type_))
    done = ggml.ggml_quantize_chunk(int(type_), x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
    assert done == out.nbytes, (done, out.nbytes)
    return out


def add_keys(writer: GGUFWriter, name: str, model: Model) -> None:
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[model.mix])
    writer.add_block_count(model.layers)
    writer.add_context_length(262144)
    writer.add_embedding_length(model.hidden)
    if model.n_experts:
        writer.add_expert_count(model.n_experts)
        writer.add_expert_used_count(min(N_USED, model.n_experts))
        writer.add_expert_feed_forward_length(EXPERT_WIDTH)
        writer.add_expert_shared_feed_forward_length(EXPERT_WIDTH)
    else:
        writer.add_feed_forward_length(model.feed_forward)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e7)
    writer.add_rope_dimension_count(64)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_state_size(LINEAR_DIM)
    writer.add_ssm_group_count(N_KEYS)
    writer.add_ssm_time_step_rank(model.n_values)
    writer.add_ssm_inner_size(model.n_values * LINEAR_DIM)
    writer.add_uint32(f"{model.architecture}.full_attention_interval", INTERVAL)


def add_vocabulary(writer: GGUFWriter, n_vocab: int) -> None:
    """The 256 bytes in the spelling of byte-level tokenizers, two merged words, an end token, and fillers."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    tokens = [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
    merges = [f"{tokens[ord(' ')]} t", "h e"]
    tokens += [merge.replace(" ", "") for merge in merges]
    end = len(tokens)
    types = [TokenType.NORMAL] * end + [TokenType.CONTROL] + [TokenType.UNUSED] * (n_vocab - end - 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, "<|end|>", *(f"[PAD{i}]" for i in range(end + 1, n_vocab))])
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--mix", choices=tuple(MIXES), default="q8_0")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dense", "--feed-forward", type=int, default=3584, metavar="FF", help="of a dense model")
    parser.add_argument("--experts", type=int, default=0, metavar="N", help="0: a dense model (default)")
    parser.add_argument("--heads", type=int, metavar="N", help="query heads (default 8, with experts 16)")
    parser.add_argument("--kv-heads", type=int, default=2, metavar="N", help="KV heads (default 2)")
    parser.add_argument(
        "--value-heads", type=int, metavar="N", help="of recurrent layers (default 16, with experts 32)"
    )
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    n_heads, n_values = args.heads or (16 if args.experts else 8), args.value_heads or (32 if args.experts else 16)
    sizes = args.layers, args.hidden, args.dense, args.vocabulary, args.experts
    model = Model(args.mix, *sizes, n_heads, args.kv_heads, n_values)
    writer = GGUFWriter(args.path, model.architecture)
    add_keys(writer, args.path.stem, model)
    add_vocabulary(writer, args.vocabulary)
    rows = Rows(np.random.default_rng(args.seed))
    vectors = {"output_norm.weight": np.ones(args.hidden, np.float32)}
    most, more, _ = MIXES[args.mix]
    matrices = {"token_embd.weight": (most, (args.vocabulary, args.hidden))}
    if args.mix != "q8_0":
        matrices["output.weight"] = (more, (args.vocabulary, args.hidden))
    for layer in range(args.layers):
        vectors |= {f"blk.{layer}.{name}": x for name, x in model.vectors(layer, rows.random)}
        shapes = model.matrices(layer)
        matrices |= {f"blk.{layer}.{name}.weight": (model.type_of(name, layer), shape) for name, shape in shapes}
    for name, values in vectors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for name, (type_, shape) in matrices.items():
        block, block_bytes = GGML_QUANT_SIZES[type_]
        packed = (*shape[:-1], shape[-1] // block * block_bytes)
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), math.prod(packed), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in vectors.values():
        writer.write_tensor_data(values)
    for name, (type_, shape) in matrices.items():
        # What adds to the residual stream is small, so that rounding errors do not grow from layer to layer.
        adds = any(part in name for part in ("attn_output", "ssm_out", "ffn_down"))
        # And the stream begins large, so that where a rounding chooses another expert, that changes little too.
        std = STD / (2 * args.layers) ** 0.5 if adds else 1.0 if name == "token_embd.weight" else STD
        writer.write_tensor_data(rows.take(type_, shape, std))
    writer.close()
    print(f"{args.path}: {args.path.stat().st_size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
