"""ik_llama.cpp's attention on the CPU: one graph with one flash_attn_ext node, through ctypes on its libggml."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hybridkv.formats import FORMATS
from hybridkv_lab.peers.ik_library import ATTENTION_TYPES, ggml
from hybridkv_lab.shape import Shape

_SPARE_BYTES = 256 << 20  # its work buffer and the graph
_MASK_ROWS = 64  # its mask is padded to a multiple of this many queries


_STORED_MULTIPLE = 256  # the program itself always attends a multiple of this; at 300 rows its threads wait for ever


def runs(shape: Shape, kv_type: str) -> bool:
    """Check whether it has a kernel for the type and takes this many rows."""
    return kv_type in ATTENTION_TYPES and shape.n_stored % _STORED_MULTIPLE == 0


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@contextmanager
def flash_attention(
    shape: Shape, kv_type: str, q: Tensor, k_rows: Tensor, v_rows: Tensor, n_threads: int
) -> Iterator[Callable[[], Tensor]]:
    """Build a call that computes the graph into its output, float32 `[1, Hq, T, D]`, which the next call overwrites.

    Parameters
    ----------
    q
        float32 `[1, Hq, T, D]`.
    k_rows, v_rows
        ggml's block bytes, uint8 `[1, Hkv, S, row bytes]`.
    """
    lib = _signatures(ggml())
    t, s, d = shape.n_new, shape.n_stored, shape.head_dim
    padded = -(-t // _MASK_ROWS) * _MASK_ROWS
    sizes = k_rows.nbytes + v_rows.nbytes + 2 * q.nbytes + 2 * padded * s
    context = lib.ggml_init(_InitParams(sizes + _SPARE_BYTES, None, False))

    def tensor(ggml_type: int, ne: tuple[int, int, int, int], data: Tensor) -> int:
        made = int(lib.ggml_new_tensor_4d(context, ggml_type, *ne))
        data = data.contiguous()
        assert data.nbytes == lib.ggml_nbytes(made), (ne, data.nbytes)
        ctypes.memmove(lib.ggml_get_data(made), data.data_ptr(), data.nbytes)
        return made

    try:
        stored = (d, s, shape.n_kv_heads, 1)
        k, v = (tensor(FORMATS[kv_type].ggml_type, stored, rows) for rows in (k_rows, v_rows))
        queries = tensor(FORMATS["f32"].ggml_type, (d, t, shape.n_heads, 1), q)
        hidden = torch.ones(padded, s, dtype=torch.bool).triu(s - t + 1)
        mask = torch.zeros(padded, s, dtype=torch.float16).masked_fill_(hidden, -torch.inf)
        mask_tensor = tensor(FORMATS["f16"].ggml_type, (s, padded, 1, 1), mask)
        out = lib.ggml_flash_attn_ext(context, queries, k, v, mask_tensor, d**-0.5, 0.0, 0.0)
        graph = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(graph, out)

        def call() -> Tensor:
            lib.ggml_graph_compute_with_ctx(context, graph, n_threads)
            values = (ctypes.c_float * q.numel()).from_address(lib.ggml_get_data(out))
            return torch.frombuffer(values, dtype=torch.float32).view(1, t, shape.n_heads, d).transpose(1, 2)

        yield call
    finally:
        lib.ggml_free(context)


def _signatures(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions used here, with their argument types. Source: ik_llama.cpp, ggml/include/ggml.h."""
    pointer, size, i64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    signatures: dict[str, tuple[list[type], type | None]] = {
        "ggml_init": ([_InitParams], pointer),
        "ggml_free": ([pointer], None),
        "ggml_new_tensor_4d": ([pointer, ctypes.c_int, i64, i64, i64, i64], pointer),
        "ggml_get_data": ([pointer], pointer),
        "ggml_nbytes": ([pointer], size),
        "ggml_flash_attn_ext": ([pointer] * 5 + [ctypes.c_float] * 3, pointer),
        "ggml_new_graph": ([pointer], pointer),
        "ggml_build_forward_expand": ([pointer, pointer], None),
        "ggml_graph_compute_with_ctx": ([pointer, pointer, ctypes.c_int], ctypes.c_int),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib
