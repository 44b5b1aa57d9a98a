"""Whose difference is it: engines' logits of a Qwen3.5-like GGUF beside float64 products of the same weights.

    python bench/reference_logits.py random-35b-q4_k_m.gguf         # of bench/random_model.py, with experts or dense
    python bench/reference_logits.py FILE.gguf --tokens 96 --against hybridkv,ik

The reference is written here, token after token as the papers have it, and shares no code with the engines: gguf-py
decodes one matrix at a time, of experts those that a token chose, and numpy multiplies in float64. A second pass beside
it rounds what enters each product to 8 bits, as llama.cpp and ik_llama.cpp do (one scale for 256 values). Errors are in
units of the spread of the reference's logits, their standard deviation. Every engine has an f16 cache, and a process of
its own: two of them bring libraries of the same name. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from rich.console import Console

from hybridkv.cli.show import simple_table
from perplexity import commit, cpu_name

TEXT = "The river runs from the mountains to the sea. In spring the snow melts and the water rises. Every year the"
ROWS = 4096
"""Rows of a matrix that are decoded at once."""
BLOCK = 256
L2_EPS = 1e-6

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rounded(x: Floats) -> Floats:
    """Values as 8 bits hold them, one scale for 256."""
    blocks = x.reshape(*x.shape[:-1], -1, min(BLOCK, x.shape[-1]))
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scale > 0, scale, 1)) * scale).reshape(x.shape)


class Reference:
    """A float64 pass over a file's weights, and beside it the one that rounds: each matrix is decoded once for both.

    Activations are `[2 T, ...]`, those of the rounding pass last.
    """

    def __init__(self, path: Path, progress: Callable[[str], object]) -> None:
        reader = GGUFReader(path)
        self._tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        self._arch = reader.fields["general.architecture"].contents()
        assert self._arch in ("qwen35", "qwen35moe"), self._arch
        self._keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tok")}
        self._eps = float(self._key("attention.layer_norm_rms_epsilon"))
        self._progress = progress
        self._n_chosen = self._n_moved = 0

    @property
    def moved(self) -> float:
        """Share of the experts that the rounding pass chose and the other did not."""
        return self._n_moved / max(1, self._n_chosen)

    def _key(self, name: str) -> Any:
        return self._keys[f"{self._arch}.{name}"]

    def _vector(self, name: str) -> Floats:
        return np.asarray(self._tensors[name].data, np.float64)

    def _product(self, x: Floats, name: str, *, rough: Mask | None = None, expert: int | None = None) -> Floats:
        """`x [N, in]` times a matrix `[out, in]`, or one of a stack; rows of `rough`, or the last half, are rounded."""
        tensor = self._tensors[name]
        rows = tensor.data if expert is None else tensor.data[expert]
        if tensor.tensor_type not in (Type.F32, Type.F16, Type.BF16):
            rough = np.arange(len(x)) >= len(x) // 2 if rough is None else rough
            x = np.where(rough[:, None], rounded(x), x)
        parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
        return np.concatenate([x @ dequantize(part, tensor.tensor_type).astype(np.float64).T for part in parts], 1)

    def _norm(self, x: Floats, name: str) -> Floats:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self._eps) * self._vector(name)

    def logits(self, ids: list[int]) -> tuple[Floats, Floats]:
        """Of both passes after every token, `[T, V]`."""
        embedding = self._tensors["token_embd.weight"]
        x = np.asarray(dequantize(embedding.data[ids * 2], embedding.tensor_type), np.float64)
        n_layers = int(self._key("block_count"))
        for layer in range(n_layers):
            at = f"blk.{layer}."
            mixer = self._attention if at + "attn_q.weight" in self._tensors else self._delta
            x = x + mixer(self._norm(x, at + "attn_norm.weight"), at)
            feed_forward = self._experts if at + "ffn_gate_inp.weight" in self._tensors else self._gated
            x = x + feed_forward(self._norm(x, at + "post_attention_norm.weight"), at)
            self._progress(f"layer {layer + 1}/{n_layers}")
        head = "output.weight" if "output.weight" in self._tensors else "token_embd.weight"
        exact, rough = np.split(self._product(self._norm(x, "output_norm.weight"), head), 2)
        return exact, rough

    def _attention(self, x: Floats, at: str) -> Floats:
        n_heads, n_kv = int(self._key("attention.head_count")), int(self._key("attention.head_count_kv"))
        dim, n = int(self._key("attention.key_length")), len(x) // 2
        q, gate = np.split(self._product(x, at + "attn_q.weight").reshape(2, n, n_heads, 2 * dim), 2, -1)
        k, v = (self._product(x, f"{at}attn_{name}.weight").reshape(2, n, n_kv, dim) for name in "kv")
        q, k = (self._turned(self._norm(part, f"{at}attn_{name}_norm.weight")) for part, name in ((q, "q"), (k, "k")))
        k, v = (np.repeat(part, n_heads // n_kv, 2) for part in (k, v))
        scores = np.einsum("bthd,bshd->bhts", q, k) * dim**-0.5
        seen = np.tril(np.ones((n, n), bool))
        out = np.einsum("bhts,bshd->bthd", softmax(np.where(seen, scores, -np.inf)), v) * sigmoid(gate)
        return self._product(out.reshape(2 * n, -1), at + "attn_output.weight")

    def _turned(self, x: Floats) -> Floats:
        """Rotary positions on the first values of each head `[2, T, heads, D]`, pairs half of them apart."""
        n_rotated = int(self._key("rope.dimension_count"))
        half = n_rotated // 2
        rates = float(self._key("rope.freq_base")) ** (-np.arange(half) / half)
        angles = (np.arange(x.shape[1])[:, None] * rates)[:, None]
        a, b = x[..., :half], x[..., half:n_rotated]
        turned = (a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles))
        return np.concatenate([*turned, x[..., n_rotated:]], -1)

    def _delta(self, x: Floats, at: str) -> Floats:
        """The gated delta rule; value head h has the keys of head h % keys, as files have them."""
        n_keys, n_values = int(self._key("ssm.group_count")), int(self._key("ssm.time_step_rank"))
        dim, width, n = int(self._key("ssm.state_size")), int(self._key("ssm.inner_size")) // n_values, len(x) // 2
        raw = self._product(x, at + "attn_qkv.weight").reshape(2, n, -1)
        taps = self._vector(at + "ssm_conv1d.weight")
        padded = np.concatenate([np.zeros((2, taps.shape[1] - 1, raw.shape[2])), raw], 1)
        mixed = silu(sum(padded[:, i : i + n] * taps[:, i] for i in range(taps.shape[1])))
        q, k, v = np.split(mixed, [n_keys * dim, 2 * n_keys * dim], 2)
        q, k = (part.reshape(2, n, n_keys, dim) for part in (q, k))
        q, k = (part / np.sqrt((part * part).sum(-1, keepdims=True) + L2_EPS) for part in (q, k))
        q, k = (np.tile(part, (1, 1, n_values // n_keys, 1)) for part in (q * dim**-0.5, k))
        v = v.reshape(2, n, n_values, width)
        steps = self._product(x, at + "ssm_alpha.weight") + self._vector(at + "ssm_dt.bias")
        decay = np.exp(self._vector(at + "ssm_a") * np.logaddexp(0, steps)).reshape(2, n, n_values, 1, 1)
        rate = sigmoid(self._product(x, at + "ssm_beta.weight")).reshape(2, n, n_values, 1)
        state, out = np.zeros((2, n_values, dim, width)), np.empty_like(v)
        for t in range(n):
            state *= decay[:, t]
            error = (v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])) * rate[:, t]
            state += np.einsum("bhk,bhv->bhkv", k[:, t], error)
            out[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t])
        z = self._product(x, at + "attn_gate.weight")
        normed = self._norm(out, at + "ssm_norm.weight").reshape(2 * n, -1)
        return self._product(normed * silu(z), at + "ssm_out.weight")

    def _gated(self, x: Floats, at: str, kind: str = "", **which: Any) -> Floats:
        gate, up = (self._product(x, f"{at}ffn_{name}{kind}.weight", **which) for name in ("gate", "up"))
        return self._product(silu(gate) * up, f"{at}ffn_down{kind}.weight", **which)

    def _experts(self, x: Floats, at: str) -> Floats:
        shares = softmax(self._product(x, at + "ffn_gate_inp.weight"))
        used = np.argsort(-shares, axis=1, kind="stable")[:, : int(self._key("expert_used_count"))]
        exact, rough = np.split(used, 2)
        self._n_chosen += exact.size
        self._n_moved += int((~(rough[:, :, None] == exact[:, None]).any(2)).sum())
        weights = np.take_along_axis(shares, used, 1)
        weights = weights / weights.sum(1, keepdims=True)
        out = np.zeros_like(x)
        for expert in np.unique(used):
            token, place = np.nonzero(used == expert)
            result = self._gated(x[token], at, "_exps", rough=token >= len(x) // 2, expert=int(expert))
            out[token] += weights[token, place, None] * result
        shared = sigmoid(x @ self._vector(at + "ffn_gate_inp_shexp.weight").reshape(-1, 1))
        return out + shared * self._gated(x, at, "_shexp")


def ours(path: Path, ids: list[int], n_threads: int) -> Floats:
    """Return hybridkv's logits after every token, less a number for each token."""
    import torch

    from hybridkv.engine.load import describe, load
    from perplexity import log_probs, parse

    torch.set_num_threads(n_threads)
    loaded = load(describe(path), dtype=torch.float32, device="cpu", weights="auto")
    rows: Floats = torch.cat(list(log_probs(loaded, parse("f16"), torch.tensor([ids]), len(ids)))).double().numpy()
    return rows


def ik(path: Path, ids: list[int], n_threads: int) -> Floats:
    """Return ik_llama.cpp's."""
    from hybridkv_lab.peers.ik_model import ik_context, ik_model

    with ik_model(path) as handle, ik_context(handle, "f16", n_ctx=len(ids), n_threads=n_threads) as context:
        return np.concatenate([rows.copy() for rows in context.scores(ids, len(ids))]).astype(np.float64)


def llama_cpp(path: Path, ids: list[int], n_threads: int) -> Floats:
    """Return llama.cpp's, with weights as they lie in the file."""
    import llama_cpp as api

    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    options = api.llama_model_default_params()
    options.use_extra_bufts = False  # a second copy of the weights, laid out anew
    model = api.llama_model_load_from_file(str(path).encode(), options)
    assert model, f"llama.cpp cannot load {path}"
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(64, len(ids))
    params.n_threads = params.n_threads_batch = n_threads
    context = api.llama_init_from_model(model, params)
    assert context, "llama.cpp makes no context"
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert api.llama_decode(context, batch) == 0
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (n_vocab,)).copy() for i in range(len(ids))]
    return np.stack(rows).astype(np.float64)


ENGINES = {"hybridkv": ours, "ik": ik, "llama.cpp": llama_cpp}


def token_ids(path: Path, n: int) -> list[int]:
    """The first tokens of the text that `hybridkv bench decode` compares."""
    from hybridkv.native import map_gguf

    tokenizer = map_gguf(path).tokenizer
    assert tokenizer is not None
    return list(tokenizer.encode(TEXT))[:n]


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """A call's result out of a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def errors(got: Floats, exact: Floats) -> dict[str, float]:
    """Root mean square (of all tokens, the median's, the last's) and largest difference in units of the spread."""
    got, exact = (x - x.mean(1, keepdims=True) for x in (got, exact))
    off = (got - exact) / exact.std(1, keepdims=True)
    by_token = np.sqrt((off**2).mean(1))
    return {
        "rms": float(np.sqrt((off**2).mean())),
        "rms_median": float(np.median(by_token)),
        "rms_last": float(by_token[-1]),
        "largest": float(np.abs(off).max()),
        "same_top": float((got.argmax(1) == exact.argmax(1)).mean()),
    }


def references(path: Path, ids: list[int], kept: Path | None) -> tuple[Floats, Floats, float]:
    """Logits of both passes, and the share of experts that rounding changes; computed, or read where they were kept."""
    if kept is not None and kept.exists():
        found = np.load(kept)
        assert found["ids"].tolist() == ids, f"{kept} is of other tokens"
        return found["exact"], found["rough"], float(found["moved"])
    reference = Reference(path, say)
    exact, rough = reference.logits(ids)
    if kept is not None:
        np.savez(kept, ids=ids, exact=exact, rough=rough, moved=reference.moved)
    return exact, rough, reference.moved


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokens", type=int, default=16, help="of the text (default 16)")
    parser.add_argument("--reference", type=Path, metavar="NPZ", help="keep the reference there, or take it from there")
    parser.add_argument("--against", default=",".join(ENGINES), help="engines (default all)")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    measured = commit()
    ids = apart(token_ids, args.path, args.tokens)
    exact, rough, moved = references(args.path, ids, args.reference)
    rows = {"float64, activations of 8 bits": errors(rough, exact)}
    for name in filter(None, args.against.split(",")):
        rows[name] = errors(apart(ENGINES[name], args.path, ids, args.threads), exact)
        say(f"{name}: {rows[name]}")
    first = "beside float64"
    table = simple_table(first, "RMS", "median token", "last token", "largest", "same top", left=(first,))
    for name, row in rows.items():
        figures = [f"{row[key]:.1e}" for key in ("rms", "rms_median", "rms_last", "largest")]
        table.add_row(name, *figures, f"{row['same_top']:.0%}")
    Console(width=120).print(table)
    conditions = {
        "model": args.path.name,
        "bytes": args.path.stat().st_size,
        "tokens": len(ids),
        "experts_moved_by_8_bits": moved,
        "cpu": cpu_name(),
        "isa": os.environ.get("HYBRIDKV_ISA", "native"),
        "commit": measured,
    }
    print(json.dumps({"conditions": conditions, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
