"""A whole model in llama.cpp, through the ctypes API of PyPI's llama-cpp-python: one context, one sequence, on the CPU.

Owns the way to a depth without a prefill of that length: the sequence's saved state holds its K and V rows as plain
bytes, and is written back with those rows repeated. Used by `families.py`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
import numpy.typing as npt

from hybridkv.formats import FORMATS
from hybridkv_lab.peers.ik_model import repeat_layers

Logits = npt.NDArray[np.float32]
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
Q4_K_M = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M


def start() -> None:
    """Load the library, without its log."""
    api.llama_log_set(_LOG, None)
    api.llama_backend_init()


def build() -> str:
    """Version, and what the library says it was compiled for."""
    info = api.llama_print_system_info().decode()
    flags = [word.split("=")[0].split(":")[-1].strip() for word in info.split("|") if word.strip().endswith("= 1")]
    return f"llama.cpp, llama-cpp-python {metadata.version('llama-cpp-python')}, {' '.join(flags)}"


def quantize(source: Path, target: Path) -> None:
    """Write a float file's weights as llama.cpp's own Q4_K_M mix."""
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = Q4_K_M, 2
    code = api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert code == 0, f"llama.cpp cannot quantize {source}"


class LlamaModel:
    """A model file."""

    def __init__(self, path: Path) -> None:
        self.handle = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        assert self.handle, f"llama.cpp cannot load {path}"
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.handle))

    def close(self) -> None:
        """Free its memory."""
        api.llama_model_free(self.handle)


class LlamaContext:
    """One sequence of tokens and what the model remembers of it; flash attention, K and V of one type."""

    def __init__(self, model: LlamaModel, kv_type: str, *, n_ctx: int, n_threads: int) -> None:
        params = api.llama_context_default_params()
        params.n_ctx = -(-n_ctx // 256) * 256
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = 1
        params.type_k = params.type_v = FORMATS[kv_type].ggml_type
        self._n_batch, self._n_vocab = int(params.n_batch), model.n_vocab
        self._context: Any = api.llama_init_from_model(model.handle, params)
        assert self._context, f"llama.cpp makes no context for K and V of {kv_type}"
        self._batch = api.llama_batch_init(self._n_batch, 0, 1)
        self.n_tokens = 0

    def close(self) -> None:
        """Free its memory."""
        api.llama_batch_free(self._batch)
        api.llama_free(self._context)

    def reset(self) -> None:
        """Forget all tokens."""
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        self.n_tokens = 0

    def advance(self, ids: Sequence[int]) -> Logits:
        """Process tokens; the logits after them `[V]`, valid until the next call."""
        self._decode(ids, every=False)
        return self._row(-1)

    def every(self, ids: Sequence[int]) -> Logits:
        """Process tokens; the logits after each, `[T, V]`."""
        self._decode(ids, every=True)
        return np.stack([self._row(i) for i in range(len(ids))])

    def _row(self, index: int) -> Logits:
        return np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, index), (self._n_vocab,))

    def _decode(self, ids: Sequence[int], *, every: bool) -> None:
        assert len(ids) <= self._n_batch, len(ids)
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, self.n_tokens + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == len(ids) - 1
        status = api.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode gives {status} for {len(ids)} tokens"
        self.n_tokens += len(ids)

    def deepen(self, n_tokens: int) -> None:
        """Repeat the stored rows until there are `n_tokens`; recurrent states stay as they are."""
        state = (ctypes.c_uint8 * api.llama_state_seq_get_size(self._context, 0))()
        api.llama_state_seq_get_data(self._context, state, len(state), 0)
        deeper = repeat_rows(bytes(state), n_tokens)
        self.reset()
        data = (ctypes.c_uint8 * len(deeper)).from_buffer_copy(deeper)
        taken = api.llama_state_seq_set_data(self._context, data, len(deeper), 0)
        assert taken == len(deeper), f"llama.cpp does not take a state of {n_tokens} tokens"
        self.n_tokens = n_tokens


def repeat_rows(state: bytes, n_tokens: int) -> bytes:
    """A sequence's saved state with its K and V rows repeated to `n_tokens`.

    Source: llama.cpp, src/llama-context.cpp (`state_seq_get_data`), src/llama-kv-cache.cpp and
    src/llama-memory-recurrent.cpp (`state_write`): a magic number and the sequence; streams (one), cells, per cell its
    position and its sequences; whether V is transposed, layers; per layer K's type, bytes of a row, and rows; then V's.
    Then the recurrent memory: cells, the position of each and 0, and states, which are kept.
    """
    n_streams, n_cells = struct.unpack_from("<II", state, 8)
    assert n_streams == 1, n_streams
    out = [state[:12], struct.pack("<I", n_tokens)]
    out += [struct.pack("<iIi", position, 1, 0) for position in range(n_tokens)]
    layers, at = repeat_layers(state, 16 + 12 * n_cells, n_cells, n_tokens)
    out += layers
    if at < len(state):
        n_cells, _, n_seq = struct.unpack_from("<IiI", state, at)
        assert (n_cells, n_seq) == (1, 0), (n_cells, n_seq)
        out.append(struct.pack("<IiI", 1, n_tokens - 1, 0))
        out.append(state[at + 12 :])
    return b"".join(out)
