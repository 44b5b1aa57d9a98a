"""Oracle: whole models in llama.cpp, through the ctypes API of PyPI's llama-cpp-python.

`logits()` and `tokenize()` skip the calling test, with the reason, where the wheel is not installed. Each call is a
process of its own: llama.cpp ends the process over some files.
"""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest


def logits(path: Path, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits `[len(ids), n_vocab]` over a float32 cache, without flash attention, on one thread."""
    done = _run("logits", path, list(ids))
    rows: npt.NDArray[np.float32] = np.load(io.BytesIO(done))
    return rows


def tokenize(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without begin and end tokens; control tokens are recognised."""
    ids: list[list[int]] = json.loads(_run("tokenize", path, list(texts)))
    return ids


def _run(what: str, path: Path, argument: list[int] | list[str]) -> bytes:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: no llama.cpp to compare with")
    command = [sys.executable, "-m", "tests.oracles.llama_cpp", what, str(path), json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout


def _logits(path: Path, ids: list[int]) -> bytes:
    import llama_cpp as api

    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    assert model, f"llama.cpp cannot load {path}"
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(64, len(ids))
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = 0
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    context = api.llama_init_from_model(model, params)
    assert context, "llama.cpp makes no context"
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert api.llama_decode(context, batch) == 0
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (n_vocab,)).copy() for i in range(len(ids))]
    out = io.BytesIO()
    np.save(out, np.stack(rows))
    return out.getvalue()


def _tokenize(path: Path, texts: list[str]) -> bytes:
    import llama_cpp as api

    params = api.llama_model_default_params()
    params.vocab_only = True
    model = api.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp cannot load {path}"
    vocab, found = api.llama_model_get_vocab(model), []
    for raw in map(str.encode, texts):
        buffer = (api.llama_token * (len(raw) + 8))()
        count = api.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), False, True)
        assert count >= 0
        found.append(list(buffer[:count]))
    return json.dumps(found).encode()


if __name__ == "__main__":
    what, path, argument = sys.argv[1:]
    run = {"logits": _logits, "tokenize": _tokenize}[what]
    sys.stdout.buffer.write(run(Path(path), json.loads(argument)))
    sys.stdout.flush()
