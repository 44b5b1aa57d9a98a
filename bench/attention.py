"""Attention over the packed cache on the CPU: correctness first, then speed beside the machine's own ceilings.

For every case: relative RMSE against float64 attention over the decoded cache (a case above 2e-3 is not timed and the
exit code is 1), then the median of many calls with its 10th and 90th percentile, GB/s of cache, GFLOP/s, and the
fraction of the measured read bandwidth and of the measured multiply-add peak. Ceilings are measured in the same run:
`integer` is what the kernels use for codes (int8 tiles with AMX, int16 pairs elsewhere; a query or probability is two
int8 terms, so a tile does half of its peak at best), `float` what they use for f32, f16 and bf16. Beside them
torch's scaled_dot_product_attention in float32 and, if ik-llama-cpp-python is installed, ik_llama.cpp's kernel for the
same type through ctypes (its wheel is a plain AVX2 build, 1.2 to 2.2 times slower than a native one).
The last line is JSON.

    python bench/attention.py --quick
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hybridkv.formats import FORMATS
from hybridkv.kernels import cpu_native

TOLERANCE = 2e-3
PEERS = ("ik", "torch")
Planes = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """Head dim, query and KV heads, new and stored tokens."""

    head_dim: int
    n_heads: int
    n_kv_heads: int
    n_new: int
    n_stored: int

    @property
    def multiply_adds(self) -> float:
        """Of one call: both products, causal."""
        seen = self.n_stored - (self.n_new - 1) / 2
        return 2 * self.n_heads * self.n_new * seen * self.head_dim

    def __str__(self) -> str:
        return f"D={self.head_dim} {self.n_heads}/{self.n_kv_heads} T={self.n_new} S={self.n_stored}"


@dataclass(frozen=True, slots=True)
class Row:
    """One timed case."""

    shape: str
    kv_type: str
    threads: int
    error: float
    median_ms: float
    p10_ms: float
    p90_ms: float
    gb_s: float
    gflop_s: float
    of_bandwidth: float
    of_peak: float
    ik_ms: float | None
    torch_ms: float | None


def timed(call: Callable[[], object], budget_s: float) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile in milliseconds, after a warm-up."""
    call()
    call()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 2000):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    times.sort()
    return times[len(times) // 2], times[len(times) // 10], times[-1 - len(times) // 10]


def store(kv_type: str, shape: Shape, seed: int) -> Planes:
    """Normal rows, encoded; beyond 4096 rows they repeat."""
    generator = torch.Generator().manual_seed(seed)
    rows = min(shape.n_stored, 4096)
    planes = FORMATS[kv_type].encode(torch.randn(1, shape.n_kv_heads, rows, shape.head_dim, generator=generator))
    times = -(-shape.n_stored // rows)
    return tuple(p.repeat(1, 1, times, 1)[:, :, : shape.n_stored].contiguous() for p in planes)


def attend(shape: Shape, kv_type: str, q: Tensor, k: Planes, v: Planes, threads: int) -> Tensor:
    d = shape.head_dim
    return cpu_native.attend(q, k, kv_type, v, kv_type, d, d, 0, shape.n_stored, d**-0.5, n_threads=threads)


def error_of(shape: Shape, kv_type: str, threads: int) -> float:
    """Relative RMSE of at most 8 queries over at most 4096 rows: float64 decoding of more would dominate the run."""
    small = Shape(shape.head_dim, shape.n_heads, shape.n_kv_heads, min(shape.n_new, 8), min(shape.n_stored, 4096))
    q = torch.randn(1, small.n_heads, small.n_new, small.head_dim, generator=torch.Generator().manual_seed(3))
    k, v = store(kv_type, small, 1), store(kv_type, small, 2)
    got = attend(small, kv_type, q, k, v, threads).double()
    group = small.n_heads // small.n_kv_heads
    k64, v64 = (FORMATS[kv_type].decode(p, small.head_dim).double().repeat_interleave(group, 1) for p in (k, v))
    mask = torch.ones(small.n_new, small.n_stored, dtype=torch.bool).tril(small.n_stored - small.n_new)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k64, v64, attn_mask=mask)
    return float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def torch_call(shape: Shape) -> Callable[[], object]:
    q = torch.randn(1, shape.n_heads, shape.n_new, shape.head_dim)
    k, v = (torch.randn(1, shape.n_kv_heads, shape.n_stored, shape.head_dim) for _ in range(2))
    mask = torch.ones(shape.n_new, shape.n_stored, dtype=torch.bool).tril(shape.n_stored - shape.n_new)
    bias = None if shape.n_new == 1 else mask
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


class Ik:
    """ik_llama.cpp's flash_attn_ext, one graph per case, through ctypes on its ggml."""

    class _Params(ctypes.Structure):
        _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

    def __init__(self) -> None:
        spec = importlib.util.find_spec("ik_llama_cpp")
        self.path = None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib" / "libggml.so"
        if self.path is None:
            return
        lib = self.lib = ctypes.CDLL(str(self.path))
        pointer, size, i64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        signatures: dict[str, tuple[list[type], type | None]] = {
            "ggml_init": ([self._Params], pointer),
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

    def tensor(self, context: int, ggml_type: int, sizes: tuple[int, int, int, int], data: Tensor) -> int:
        """A copy of `data` as a tensor of `context`."""
        tensor = int(self.lib.ggml_new_tensor_4d(context, ggml_type, *sizes))
        data = data.contiguous()
        n_bytes = data.numel() * data.element_size()
        assert n_bytes == self.lib.ggml_nbytes(tensor), (sizes, n_bytes)
        ctypes.memmove(self.lib.ggml_get_data(tensor), data.data_ptr(), n_bytes)
        return tensor

    def time_ms(self, shape: Shape, kv_type: str, threads: int, budget_s: float) -> float | None:
        """Median, or None where it has no kernel for the type."""
        if self.path is None or kv_type not in ("f16", "q8_0", "q8_KV", "q6_0", "q4_0", "q4_1", "iq4_nl"):
            return None
        fmt, d, padded = FORMATS[kv_type], shape.head_dim, -(-shape.n_new // 64) * 64
        rows = [fmt.to_ggml(store(kv_type, shape, seed), d) for seed in (1, 2)]
        n_bytes = sum(r.numel() for r in rows) + 16 * shape.n_heads * shape.n_new * d + 4 * padded * shape.n_stored
        context = self.lib.ggml_init(self._Params(n_bytes + (256 << 20), None, False))
        kv = (d, shape.n_stored, shape.n_kv_heads, 1)
        k, v = (self.tensor(context, fmt.ggml_type, kv, r) for r in rows)
        q = self.tensor(context, 0, (d, shape.n_new, shape.n_heads, 1), torch.randn(shape.n_heads, shape.n_new, d))
        seen = torch.ones(padded, shape.n_stored, dtype=torch.bool).tril(shape.n_stored - shape.n_new)
        mask = torch.zeros(padded, shape.n_stored, dtype=torch.float16).masked_fill(~seen, -torch.inf)
        mask_tensor = self.tensor(context, 1, (shape.n_stored, padded, 1, 1), mask)
        out = self.lib.ggml_flash_attn_ext(context, q, k, v, mask_tensor, d**-0.5, 0.0, 0.0)
        graph = self.lib.ggml_new_graph(context)
        self.lib.ggml_build_forward_expand(graph, out)
        median, _, _ = timed(lambda: self.lib.ggml_graph_compute_with_ctx(context, graph, threads), budget_s)
        self.lib.ggml_free(context)
        return median


def ceilings(threads: int) -> dict[str, float]:
    """GB/s of reads out of memory, and giga multiply-adds per second, on `threads` threads."""
    native = cpu_native._native()
    data = torch.ones(64 << 20)
    return {
        "read": native.probe(cpu_native.isa(), "read", data.data_ptr(), data.numel(), threads) / 1e9,
        "float": native.probe(cpu_native.isa(), "float", 0, 400_000, threads) / 1e9,
        "integer": native.probe(cpu_native.isa(), "integer", 0, 400_000, threads) / 1e9,
    }


def shapes(quick: bool) -> list[Shape]:
    heads = [(256, 16, 2)] if quick else [(256, 16, 2), (128, 32, 8)]
    decode = [4096, 32768] if quick else [4096, 32768, 131072]
    prefill = [4096] if quick else [4096, 32768]
    return [Shape(*h, 1, n) for h in heads for n in decode] + [Shape(*h, 512, n) for h in heads for n in prefill]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and shorter timings: within 40 s")
    parser.add_argument("--types", default="q8_0,q6_0,q4_0,f16")
    parser.add_argument("-t", "--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--against", default="ik,torch", help="comma-separated peers, or nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    budget = 0.25 if args.quick else 1.0
    peers = [p for p in args.against.split(",") if p]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; allowed: {', '.join(PEERS)}")
    ik = Ik() if "ik" in peers else None
    print(f"isa {cpu_native.isa()}, {args.threads} threads, {platform.processor() or platform.machine()}")
    if ik is not None:
        print(f"ik: {ik.path or 'not installed (ik-llama-cpp-python)'}")
    top = ceilings(args.threads)
    print(f"ceilings: {top['read']:.1f} GB/s read, {top['float']:.0f} G float and {top['integer']:.0f} G integer MAC/s")
    rows: list[Row] = []
    failed = False
    for shape in shapes(args.quick):
        torch_ms = timed(torch_call(shape), budget)[0] if "torch" in peers else None
        for kv_type in args.types.split(","):
            error = error_of(shape, kv_type, args.threads)
            if not error <= TOLERANCE:
                print(f"{shape} {kv_type}: relative RMSE {error:.1e} is above {TOLERANCE:.0e}: not timed")
                failed = True
                continue
            q = torch.randn(1, shape.n_heads, shape.n_new, shape.head_dim)
            k, v = store(kv_type, shape, 1), store(kv_type, shape, 2)
            call = lambda q=q, k=k, v=v, s=shape, t=kv_type: attend(s, t, q, k, v, args.threads)  # noqa: E731
            median, p10, p90 = timed(call, budget)
            n_bytes = sum(p.numel() for p in (*k, *v))
            peak = top["integer" if FORMATS[kv_type].is_quantized else "float"]
            row = Row(
                shape=str(shape),
                kv_type=kv_type,
                threads=args.threads,
                error=error,
                median_ms=median,
                p10_ms=p10,
                p90_ms=p90,
                gb_s=n_bytes / median / 1e6,
                gflop_s=2 * shape.multiply_adds / median / 1e6,
                of_bandwidth=n_bytes / median / 1e6 / top["read"],
                of_peak=shape.multiply_adds / median / 1e6 / peak,
                ik_ms=ik.time_ms(shape, kv_type, args.threads, budget) if ik is not None else None,
                torch_ms=torch_ms,
            )
            rows.append(row)
            against = [
                f"{name} {ms:.2f} ms ({ms / median:.2f}x)"
                for name, ms in (("ik", row.ik_ms), ("torch f32", torch_ms))
                if ms is not None
            ]
            print(
                f"{shape!s:28} {kv_type:6} {median:9.3f} ms [{p10:.3f}, {p90:.3f}]  {row.gb_s:6.1f} GB/s "
                f"{row.of_bandwidth:4.0%}  {row.gflop_s:7.0f} GFLOP/s {row.of_peak:4.0%}  error {error:.0e}  "
                f"{'  '.join(against)}",
                flush=True,
            )
    ratios = {f"{r.shape} {r.kv_type}": r.ik_ms / r.median_ms for r in rows if r.ik_ms is not None}
    print(json.dumps({"isa": cpu_native.isa(), "ceilings": top, "ratio": ratios, "rows": [asdict(r) for r in rows]}))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
