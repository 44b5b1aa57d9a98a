"""A whole model in ik_llama.cpp: one context, one sequence, flash attention, on the CPU.

Owns the way to a depth without a prefill of that length: the sequence's saved state holds its K and V rows as plain
bytes, and is written back with those rows repeated.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridkv.errors import ModelError
from hybridkv.formats import FORMATS
from hybridkv_lab.peers.ik_library import ATTENTION_TYPES, llama

Logits = npt.NDArray[np.float32]


@contextmanager
def ik_model(path: Path) -> Iterator[int]:
    """Load a model file and yield its handle.

    Raises
    ------
    ModelError
        If it cannot load the file.
    """
    api = llama()[0]
    api.llama_backend_init()
    handle = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    if not handle:
        raise ModelError(f"ik_llama.cpp cannot load {path}", hint="leave ik out: --against ''")
    try:
        yield handle
    finally:
        api.llama_free_model(handle)


@contextmanager
def ik_context(model: int, kv_type: str, *, n_ctx: int, n_threads: int, rotated: str = "") -> Iterator[IkContext]:
    """Open a context with K and V of `kv_type`; batches as its own tools take them; `rotated` sides: k, v, kv."""
    context = IkContext(model, kv_type, n_ctx=n_ctx, n_threads=n_threads, rotated=rotated)
    try:
        yield context
    finally:
        context.close()


def runs(kv_type: str) -> bool:
    """Check whether its flash attention has a kernel for the type."""
    return kv_type in ATTENTION_TYPES


class IkContext:
    """One sequence of tokens and what the model remembers of it."""

    def __init__(self, model: int, kv_type: str, *, n_ctx: int, n_threads: int, rotated: str = "") -> None:
        self._api: Any = llama()[0]
        params = self._api.llama_context_default_params()
        params.n_ctx = -(-n_ctx // 256) * 256
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn = True
        params.type_k = params.type_v = FORMATS[kv_type].ggml_type
        params.k_cache_hadamard, params.v_cache_hadamard = "k" in rotated, "v" in rotated
        self._n_batch = int(params.n_batch)
        self._n_vocab = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(model))
        self._context = self._api.llama_init_from_model(model, params)
        if not self._context:
            raise ModelError(f"ik_llama.cpp makes no context for K and V of {kv_type}")
        self.n_tokens = 0
        self._one = self._api.llama_batch_init(1, 0, 1)

    def close(self) -> None:
        """Free its memory."""
        self._api.llama_batch_free(self._one)
        self._api.llama_free(self._context)

    def reset(self) -> None:
        """Forget all tokens."""
        self._api.llama_kv_cache_clear(self._context)
        self.n_tokens = 0

    def advance(self, ids: Sequence[int]) -> Logits:
        """Process tokens; the logits after them `[V]`, valid until the next call."""
        for begin in range(0, len(ids), self._n_batch):
            self._decode(ids[begin : begin + self._n_batch], last=begin + self._n_batch >= len(ids))
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, -1), (self._n_vocab,))

    def scores(self, ids: Sequence[int], chunk: int) -> Iterator[Logits]:
        """Process tokens chunk by chunk; the logits after each of a chunk's, `[n, V]`."""
        for begin in range(0, len(ids), chunk):
            part = ids[begin : begin + chunk]
            self._decode(part, every=True)
            rows = [self._api.llama_get_logits_ith(self._context, i) for i in range(len(part))]
            yield np.stack([np.ctypeslib.as_array(row, (self._n_vocab,)) for row in rows])

    def _decode(self, part: Sequence[int], *, last: bool = False, every: bool = False) -> None:
        """Process one batch, with the logits of its last token, of every token, or of none."""
        batch = self._one if len(part) == 1 else self._api.llama_batch_init(len(part), 0, 1)
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i] = token, self.n_tokens + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or (last and i == len(part) - 1)
        status = self._api.llama_decode(self._context, batch)
        if len(part) > 1:
            self._api.llama_batch_free(batch)
        if status:
            raise ModelError(f"ik_llama.cpp cannot process {len(part)} tokens: llama_decode gives {status}")
        self.n_tokens += len(part)

    def deepen(self, n_tokens: int) -> None:
        """Repeat the stored rows until there are `n_tokens`; recurrent states stay as they are."""
        library = self._api._lib
        get, put, measure = (
            getattr(library, f"llama_state_seq_{name}") for name in ("get_data", "set_data", "get_size")
        )
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        get.argtypes = put.argtypes = [pointer, pointer, size, ctypes.c_int32, ctypes.c_uint32]
        measure.argtypes = [pointer, ctypes.c_int32, ctypes.c_uint32]
        get.restype = put.restype = measure.restype = size
        state = ctypes.create_string_buffer(measure(self._context, 0, 0))
        get(self._context, state, len(state), 0, 0)
        deeper = repeat_rows(state.raw, n_tokens)
        self.reset()
        if put(self._context, deeper, len(deeper), 0, 0) != len(deeper):
            raise ModelError(f"ik_llama.cpp does not take a state of {n_tokens} tokens")
        self.n_tokens = n_tokens


def repeat_rows(state: bytes, n_tokens: int) -> bytes:
    """Repeat the K and V rows of a sequence's saved state to `n_tokens`.

    Source: ik_llama.cpp, src/llama.cpp, `llama_data_write`: the count of cells, each cell's position and 0; whether V
    is transposed, the count of layers; per layer K's type, bytes per row and rows; then V's; then the
    recurrent states, which are kept.
    """
    (n_cells,) = struct.unpack_from("<I", state)
    out = [struct.pack("<I", n_tokens), *(struct.pack("<iI", position, 0) for position in range(n_tokens))]
    layers, at = repeat_layers(state, 4 + 8 * n_cells, n_cells, n_tokens)
    return b"".join([*out, *layers, state[at:]])


def repeat_layers(state: bytes, at: int, n_cells: int, n_tokens: int) -> tuple[list[bytes], int]:
    """Repeat all layers' K and V rows of a saved state, from `at` on, to `n_tokens`; give where they end.

    Whether V is transposed, the count of layers; per layer K's type, bytes per row and rows; then V's: as in
    llama.cpp.
    """
    transposed, n_layers = struct.unpack_from("<II", state, at)
    assert not transposed, "with flash attention V is not transposed"
    out = [state[at : at + 8]]
    at += 8
    for _ in range(2 * n_layers):
        _, row_bytes = struct.unpack_from("<iQ", state, at)
        out.append(state[at : at + 12])
        rows = state[at + 12 : at + 12 + n_cells * row_bytes]
        at += 12 + len(rows)
        out.append((rows * -(-n_tokens // n_cells))[: n_tokens * row_bytes])
    return out, at
