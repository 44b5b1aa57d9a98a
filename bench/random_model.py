"""Write a GGUF of a Qwen3.5-like model with random q8_0 weights, for timing whole models of a real size.

By default the geometry of a 0.8B: 24 layers, full attention in every fourth, hidden 1024, feed-forward 3584, 8 query
and 2 KV heads of 256, 16 key and 16 value heads of 128, tied embeddings. The same arguments give the same bytes. The
vocabulary is made up (bytes, two words, numbered fillers); the text that comes out means nothing.

    python bench/random_model.py random-0.8b-q8_0.gguf
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

ARCHITECTURE = "qwen35"
HEAD_DIM, N_HEADS, N_KV_HEADS = 256, 8, 2
N_LINEAR, LINEAR_DIM, CONV = 16, 128, 4  # key heads, and as many value heads
INTERVAL = 4
STD = 0.02
_BLOCK = np.dtype([("d", "<f2"), ("codes", "i1", 32)])  # q8_0


def layer_matrices(layer: int, hidden: int, feed_forward: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes [out, in] of a layer's quantized weights."""
    inner = N_LINEAR * LINEAR_DIM
    if (layer + 1) % INTERVAL == 0:
        yield "attn_q", (2 * N_HEADS * HEAD_DIM, hidden)  # with the output's gate
        yield "attn_k", (N_KV_HEADS * HEAD_DIM, hidden)
        yield "attn_v", (N_KV_HEADS * HEAD_DIM, hidden)
        yield "attn_output", (hidden, N_HEADS * HEAD_DIM)
    else:
        yield "attn_qkv", (3 * inner, hidden)
        yield "attn_gate", (inner, hidden)
        yield "ssm_alpha", (N_LINEAR, hidden)
        yield "ssm_beta", (N_LINEAR, hidden)
        yield "ssm_out", (hidden, inner)
    yield "ffn_gate", (feed_forward, hidden)
    yield "ffn_up", (feed_forward, hidden)
    yield "ffn_down", (hidden, feed_forward)


def layer_vectors(
    layer: int, hidden: int, random: np.random.Generator
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Names and values of a layer's float32 weights."""
    yield "attn_norm.weight", np.ones(hidden, np.float32)
    yield "post_attention_norm.weight", np.ones(hidden, np.float32)
    if (layer + 1) % INTERVAL == 0:
        yield "attn_q_norm.weight", np.ones(HEAD_DIM, np.float32)
        yield "attn_k_norm.weight", np.ones(HEAD_DIM, np.float32)
        return
    yield "ssm_norm.weight", np.ones(LINEAR_DIM, np.float32)
    yield "ssm_a", -random.uniform(1, 16, N_LINEAR).astype(np.float32)
    yield "ssm_dt.bias", random.uniform(-6, -2, N_LINEAR).astype(np.float32)
    yield "ssm_conv1d.weight", random.normal(0, 0.3, (3 * N_LINEAR * LINEAR_DIM, CONV)).astype(np.float32)


def random_q8_0(shape: tuple[int, int], std: float, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Blocks of uniform codes whose values have about this standard deviation; uint8 [out, row bytes]."""
    blocks = np.empty((shape[0], shape[1] // 32), _BLOCK)
    blocks["d"] = std / (127 / 3**0.5)
    blocks["codes"] = random.integers(-127, 128, (*blocks.shape, 32), np.int8)
    blocks["codes"][..., 0] = 127  # as a quantizer leaves a block: its largest value has the largest code
    return blocks.view(np.uint8).reshape(shape[0], -1)


def add_keys(writer: GGUFWriter, args: argparse.Namespace) -> None:
    writer.add_name(args.path.stem)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(args.layers)
    writer.add_context_length(262144)
    writer.add_embedding_length(args.hidden)
    writer.add_feed_forward_length(args.feed_forward)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e7)
    writer.add_rope_dimension_count(64)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_state_size(LINEAR_DIM)
    writer.add_ssm_group_count(N_LINEAR)
    writer.add_ssm_time_step_rank(N_LINEAR)
    writer.add_ssm_inner_size(N_LINEAR * LINEAR_DIM)
    writer.add_uint32(f"{ARCHITECTURE}.full_attention_interval", INTERVAL)


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
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--feed-forward", type=int, default=3584)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    writer = GGUFWriter(args.path, ARCHITECTURE)
    add_keys(writer, args)
    add_vocabulary(writer, args.vocabulary)
    random = np.random.default_rng(args.seed)
    vectors = {"output_norm.weight": np.ones(args.hidden, np.float32)}
    matrices = {"token_embd.weight": (args.vocabulary, args.hidden)}
    for layer in range(args.layers):
        vectors |= {f"blk.{layer}.{name}": x for name, x in layer_vectors(layer, args.hidden, random)}
        shapes = layer_matrices(layer, args.hidden, args.feed_forward)
        matrices |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes}
    for name, values in vectors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    q8_0 = GGMLQuantizationType.Q8_0
    for name, (n_out, n_in) in matrices.items():
        packed = (n_out, n_in // 32 * _BLOCK.itemsize)
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), packed[0] * packed[1], raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in vectors.values():
        writer.write_tensor_data(values)
    for name, shape in matrices.items():
        # What adds to the residual stream is small, so that rounding errors do not grow from layer to layer.
        adds = name.endswith(("attn_output.weight", "ssm_out.weight", "ffn_down.weight"))
        std = STD / (2 * args.layers) ** 0.5 if adds else STD
        writer.write_tensor_data(random_q8_0(shape, std, random))
    writer.close()
    print(f"{args.path}: {args.path.stat().st_size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
