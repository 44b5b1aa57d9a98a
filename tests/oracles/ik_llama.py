"""Oracle: whole models in ik_llama.cpp, through the ctypes API of the ik-llama-cpp-python wheel.

`model()` skips the calling test, with the reason, where the wheel is not installed (it exists for x86-64
Linux only). The wheel's `IkLlama` class is not used: it turns flash attention off, and says nothing, on
CPUs without AVX-VNNI.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

# ggml type numbers of ik_llama.cpp, ggml/include/ggml.h
KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
    "q6_0": 133,
    "q8_KV": 151,
}


@contextmanager
def model(path: Path, **options: Any) -> Iterator[IkModel]:
    """Load a model for the length of a `with` block; options as in `IkModel`."""
    if importlib.util.find_spec("ik_llama_cpp") is None:
        pytest.skip("ik-llama-cpp-python is not installed: no ik_llama.cpp to compare with")
    loaded = IkModel(path, **options)
    try:
        yield loaded
    finally:
        loaded.close()


class IkModel:
    """One model with one context: flash attention, CPU, a single sequence.

    Parameters
    ----------
    path
        GGUF file.
    n_ctx
        Tokens the context holds; also the batch, so that a prompt is one call.
    n_ubatch
        Tokens that are computed at once; `n_ctx` if None.
    type_k, type_v
        Names from `KV_TYPES`.
    khad, vhad
        Whether K and V are rotated.
    content
        `vocab` loads the tokenizer alone.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 2048,
        n_ubatch: int | None = None,
        n_threads: int = 1,
        type_k: str = "f16",
        type_v: str = "f16",
        khad: bool = False,
        vhad: bool = False,
        content: str = "model",
    ) -> None:
        self.api = api = _library()[0]
        self._context = None
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.vocab_only = content == "vocab"
        self._model = api.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, f"ik_llama.cpp cannot load {path}"
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        if content == "vocab":
            return
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = n_ubatch or n_ctx
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn = True
        params.type_k, params.type_v = KV_TYPES[type_k], KV_TYPES[type_v]
        params.k_cache_hadamard, params.v_cache_hadamard = khad, vhad
        self._context = api.llama_init_from_model(self._model, params)
        assert self._context, f"ik_llama.cpp makes no context for {type_k}/{type_v}"

    def close(self) -> None:
        if self._context:
            self.api.llama_free(self._context)
        self.api.llama_free_model(self._model)

    def tokenize(self, text: str, *, specials: bool = True) -> list[int]:
        """Ids of a text, without the begin token; `specials` are recognised in it."""
        raw = text.encode()
        buffer = (ctypes.c_int32 * (len(raw) + 8))()
        count = self.api.llama_tokenize(self._model, raw, len(raw), buffer, len(buffer), False, specials)
        assert count >= 0
        return list(buffer[:count])

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits `[len(ids), n_vocab]` of a fresh context."""
        self.api.llama_kv_cache_clear(self._context)
        return self._decode(ids, 0, range(len(ids)))

    def cross_entropy(self, ids: Sequence[int]) -> float:
        """Mean negative log probability of each token but the first, in a fresh context."""
        self.api.llama_kv_cache_clear(self._context)
        total, step = 0.0, 128  # logits of all tokens at once take a gigabyte where the vocabulary is large
        for start in range(0, len(ids) - 1, step):
            part, targets = ids[start : start + step], ids[start + 1 : start + step + 1]
            rows = self._decode(part, start, range(len(targets))).astype(np.float64)
            peaks = rows.max(axis=1)
            totals = np.log(np.exp(rows - peaks[:, None]).sum(axis=1)) + peaks
            total += float((totals - rows[np.arange(len(targets)), targets]).sum())
        return total / (len(ids) - 1)

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The `n` most likely tokens that follow, one after the other; no token ends it."""
        self.api.llama_kv_cache_clear(self._context)
        row = self._decode(ids, 0, [len(ids) - 1])[0]
        out = [int(row.argmax())]
        while len(out) < n:
            row = self._decode(out[-1:], len(ids) + len(out) - 1, [0])[0]
            out.append(int(row.argmax()))
        return out

    def _decode(self, ids: Sequence[int], start: int, wanted: Sequence[int]) -> npt.NDArray[np.float32]:
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i in wanted
        status = self.api.llama_decode(self._context, batch)
        self.api.llama_batch_free(batch)
        assert status == 0, f"llama_decode: {status}"
        rows = [self.api.llama_get_logits_ith(self._context, i) for i in wanted]
        return np.stack([np.ctypeslib.as_array(row, (self.n_vocab,)).copy() for row in rows])


@cache
def _library() -> tuple[Any, Any]:
    """Return the API with its log turned off, and the callback, which must live as long as the library."""
    from ik_llama_cpp import _ctypes_api as api

    log_type = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    callback = log_type(lambda level, text, data: None)
    api._lib.llama_log_set(callback, None)
    return api, callback
