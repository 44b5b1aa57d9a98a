"""Oracle: the C quantizers of ik_llama.cpp, as compiled into the ik-llama-cpp-python wheel, through ctypes.

Both functions skip the calling test, with the reason, where the wheel is not installed (it exists for x86-64
Linux only). The compiler of that wheel contracts `a*b + c` within the reference functions to a fused
multiply-add; see `tests/formats/test_reference.py` for where that shows.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# The `_ref` function wherever there is one.
QUANTIZE = {
    "q8_0": "quantize_row_q8_0_ref",
    "q8_1": "quantize_row_q8_1_ref",
    "q8_KV": "quantize_row_q8_KV_ref",
    "q6_0": "quantize_row_q6_0_ref",
    "q5_0": "quantize_row_q5_0_ref",
    "q5_1": "quantize_row_q5_1_ref",
    "q4_0": "quantize_row_q4_0_ref",
    "q4_1": "quantize_row_q4_1_ref",
    "iq4_nl": "quantize_row_iq4_nl_ref",
}
DEQUANTIZE = {name: f"dequantize_row_{name}" for name in QUANTIZE if name != "q8_1"}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("ik_llama_cpp")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml.so"))
    # The first context fills ggml's float16 table, without which every scale decodes to 0.
    library.ggml_init.argtypes, library.ggml_init.restype = [_InitParams], ctypes.c_void_p
    library.ggml_free.argtypes, library.ggml_free.restype = [ctypes.c_void_p], None
    library.ggml_free(library.ggml_init(_InitParams(1 << 16, None, False)))
    return library


def _function(symbol: str) -> ctypes._NamedFuncPointer:
    library = _library()
    if library is None:
        pytest.skip("ik-llama-cpp-python is not installed: no compiled ggml to compare with")
    function = library[symbol]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function


def encode(name: str, x: Floats, row_bytes: int, *, symbol: str | None = None) -> Bytes:
    """Rows [N, D] to ggml's bytes [N, row_bytes]; `symbol` names another C function than the reference."""
    function = _function(symbol or QUANTIZE[name])
    x = np.ascontiguousarray(x, dtype=np.float32)
    out = np.full((x.shape[0], row_bytes), 0xFF, dtype=np.uint8)
    for row, packed in zip(x, out, strict=True):
        function(row.ctypes.data, packed.ctypes.data, x.shape[1])
    return out


def decode(name: str, rows: Bytes, head_dim: int) -> Floats:
    """ggml's bytes [N, row_bytes] to rows [N, head_dim]."""
    function = _function(DEQUANTIZE[name])
    rows = np.ascontiguousarray(rows)
    out = np.full((rows.shape[0], head_dim), np.nan, dtype=np.float32)
    for packed, row in zip(rows, out, strict=True):
        function(packed.ctypes.data, row.ctypes.data, head_dim)
    return out


def quantize(ggml_type: int, x: Floats, row_bytes: int) -> Bytes:
    """Rows [N, D] to the bytes [N, row_bytes] of any weight type, all inputs counting alike."""
    library = _library()
    if library is None:
        pytest.skip("ik-llama-cpp-python is not installed: nothing quantizes weights of this type")
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    x = np.ascontiguousarray(x, dtype=np.float32)
    out, importance = np.zeros((x.shape[0], row_bytes), dtype=np.uint8), np.ones(x.shape[1], dtype=np.float32)
    library.ggml_quantize_init(ggml_type)
    done = function(ggml_type, x.ctypes.data, out.ctypes.data, 0, *x.shape, importance.ctypes.data)
    assert done == out.nbytes, (done, out.nbytes)
    return out
