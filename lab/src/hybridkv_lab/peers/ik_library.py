"""ik_llama.cpp as the PyPI package ik-llama-cpp-python brings it: is it here, which build is it, its C libraries.

The package's own `IkLlama` class is not used: on processors without AVX-VNNI it turns flash attention off and says
nothing.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from hybridkv_lab.machine import cpu_flags
from hybridkv_lab.peers import Found

PACKAGE = "ik-llama-cpp-python"

ATTENTION_TYPES = ("f16", "q8_0", "q8_KV", "q6_0", "q4_0", "q4_1", "iq4_nl")
"""Types that its CPU flash attention has kernels for; others fall to a scalar loop or are refused."""

# What a build can be compiled for -> the processor's flag, in Linux's spelling.
_FLAGS = {
    "AVX2": "avx2",
    "FMA": "fma",
    "F16C": "f16c",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
}


def library_folder() -> Path | None:
    """Find the folder of its shared libraries; None if the package is not installed."""
    spec = importlib.util.find_spec("ik_llama_cpp")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "lib"


def find() -> Found:
    """Describe what is installed, in the library's own words: its build lists what it was compiled for."""
    folder = library_folder()
    if folder is None:
        return Found("ik", f"not installed (pip install {PACKAGE})")
    flags, version = _compiled_for(), metadata.version(PACKAGE)
    unused = [name for name, flag in _FLAGS.items() if flag in cpu_flags() and name not in flags]
    build = "native" if not unused else "plain AVX2" if "AVX512" not in flags else "partial"
    lacks = f" (not compiled for this processor's {' '.join(unused)})" if unused else ""
    path = str(folder / "libggml.so")
    return Found("ik", f"ik_llama.cpp, {PACKAGE} {version}, {build} build{lacks}, {path}", path, version, build, flags)


@cache
def ggml() -> ctypes.CDLL:
    """Load its libggml, for all, since libllama of a build from source does not find it by itself."""
    folder = library_folder()
    assert folder is not None
    return ctypes.CDLL(str(folder / "libggml.so"), mode=ctypes.RTLD_GLOBAL)


@cache
def llama() -> tuple[Any, Any]:
    """Load the package's ctypes API with its log turned off, and the log's callback, which must live as long."""
    ggml()
    api = importlib.import_module("ik_llama_cpp._ctypes_api")
    log_type = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    callback = log_type(lambda *_: None)
    api._lib.llama_log_set(callback, None)
    return api, callback


def _compiled_for() -> tuple[str, ...]:
    """List the names of `_FLAGS` that `llama_print_system_info` (compile-time constants) says 1 to."""
    info = llama()[0]._lib.llama_print_system_info
    info.restype = ctypes.c_char_p
    pairs = (item.split("=") for item in info().decode().split("|") if "=" in item)
    flags = {name.strip(): value.strip() for name, value in pairs}
    return tuple(name for name in _FLAGS if flags.get(name) == "1")
