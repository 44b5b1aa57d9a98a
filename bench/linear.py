"""Products on ggml weight rows on the CPU: correctness first, then speed beside the machine's own ceilings.

For every case: relative RMSE against float64 products with what gguf-py decodes (a case above the tolerance is not
timed and the exit code is 1), then the least and the median time of many calls, preparation of the activations
included; GB/s of weights and the fraction of the measured read bandwidth of a set of that size; G multiply-adds per
second and the fraction of the measured peak. One row takes a matrix that no cache holds, more rows one of a layer. With
one thread, only the processor's own time counts. With --ik, the product of ik_llama.cpp (PyPI's ik-llama-cpp-python) is
timed in the same process on the same bytes. The last line is JSON.

    HYBRIDKV_ISA=avx2 python bench/linear.py --types q4_K,q6_K -t 1 --ik
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

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from hybridkv.formats.weights import WEIGHTS, WeightFormat
from hybridkv.kernels import cpu_native
from hybridkv.kernels.weights import Weight, matmul

TOLERANCE = 1e-3
Clock = Callable[[], float]

LARGE, LAYER = (65536, 2048), (1024, 2048)
N_ROWS = (1, 2, 4, 8, 16, 64, 512)
CHECKED = 256
# Where a block keeps float16 scales; random bytes there would be NaN or huge.
HALVES = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "iq4_nl": (0,), "q2_K": (80, 82),
    "q3_K": (108,), "q4_K": (0, 2), "q5_K": (0, 2), "q6_K": (208,), "iq4_xs": (0,), "iq2_xxs": (0,), "iq2_xs": (0,),
    "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,), "iq1_s": (0,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One timed case."""

    weight_type: str
    n_out: int
    n_in: int
    n_rows: int
    threads: int
    error: float
    least_us: float
    median_us: float
    gb_s: float
    of_bandwidth: float
    gmac_s: float
    of_peak: float
    ik_us: float | None
    ik_error: float | None


def timed(call: Callable[[], object], budget_s: float, clock: Clock) -> tuple[float, float]:
    """Least and median microseconds, after a warm-up."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 5000):
        begin = clock()
        call()
        times.append((clock() - begin) * 1e6)
    times.sort()
    return times[0], times[len(times) // 2]


def weight_of(fmt: WeightFormat, n_out: int, n_in: int) -> Weight:
    """Random codes with scales of one magnitude; beyond 4096, rows repeat."""
    rng, some = np.random.default_rng(1), min(n_out, 4096)
    if fmt.block == 1:
        values = torch.from_numpy(rng.normal(size=(some, n_in)).astype(np.float32))
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[fmt.name]
        rows = values.to(dtype).view(torch.uint8).numpy()
    else:
        blocks = rng.integers(0, 256, (some, n_in // fmt.block, fmt.block_bytes), dtype=np.uint8)
        scales = rng.uniform(0.5, 1.0, (some, n_in // fmt.block)).astype(np.float16)
        for at in HALVES.get(fmt.name, ()):
            blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
        if fmt.name == "mxfp4":
            blocks[..., 0] = rng.integers(120, 128, blocks.shape[:2])
        if fmt.name == "iq1_m":
            blocks[..., 48:56:1] = blocks[..., 48:56] & 0x0F | np.array([0, 0, 0, 0, 0, 0, 0, 0x30], dtype=np.uint8)
        rows = blocks.reshape(some, -1)
    data = cpu_native.allocate((1, n_out, fmt.row_bytes(n_in)))
    data[0] = torch.from_numpy(rows).repeat(-(-n_out // some), 1)[:n_out]
    return Weight(fmt, data, n_in)


def error_of(weight: Weight, x: Tensor, out: Tensor) -> float:
    """Relative RMSE of at most 64 rows and the first outputs: float64 products of more would dominate the run."""
    rows = weight.data[0, :CHECKED].numpy()
    values = rows.view(np.float32) if weight.format.name == "f32" else dequantize(rows, _ggml(weight.format))
    exact = x[:64].double() @ torch.from_numpy(values.astype(np.float64)).T
    return float((out[:64, :CHECKED] - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _ggml(fmt: WeightFormat) -> GGMLQuantizationType:
    return GGMLQuantizationType(fmt.ggml_type)


def read_bandwidth(n_bytes: int, threads: int) -> float:
    """GB/s of reading a set of this size again and again."""
    data = cpu_native.allocate((max(n_bytes, 1 << 16),)).fill_(0).view(torch.float32)
    return cpu_native.probe("read", threads, data) / 1e9


class Ik:
    """ik_llama.cpp's own product of one matrix, through its graph; activations are quantized in every call."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("ik_llama_cpp")
        assert spec is not None, "install ik-llama-cpp-python"
        assert spec.origin is not None
        self.ggml = ggml = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml.so"))
        pointer = ctypes.c_void_p
        for name, arguments in {
            "ggml_init": [_InitParams],
            "ggml_new_tensor_2d": [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64],
            "ggml_mul_mat": [pointer] * 3,
            "ggml_new_graph": [pointer],
            "ggml_build_forward_expand": [pointer] * 2,
            "ggml_get_data": [pointer],
            "ggml_graph_compute_with_ctx": [pointer, pointer, ctypes.c_int],
            "ggml_free": [pointer],
        }.items():
            function = getattr(ggml, name)
            function.argtypes, function.restype = arguments, pointer

    def time(self, weight: Weight, x: Tensor, threads: int, budget_s: float, clock: Clock) -> tuple[float, float]:
        """Least microseconds and error of a product; each call plans its graph anew, which takes a few of them."""
        ggml, n_out, (n_rows, n_in) = self.ggml, weight.n_out, x.shape
        work = 4 * x.numel() * 2 + (64 << 20)
        room = weight.nbytes + 4 * x.numel() + 4 * n_rows * n_out + work
        context = ggml.ggml_init(_InitParams(room, None, False))
        w = ggml.ggml_new_tensor_2d(context, weight.format.ggml_type, n_in, n_out)
        a = ggml.ggml_new_tensor_2d(context, 0, n_in, n_rows)
        y = ggml.ggml_mul_mat(context, w, a)
        ctypes.memmove(ggml.ggml_get_data(w), weight.data.data_ptr(), weight.nbytes)
        ctypes.memmove(ggml.ggml_get_data(a), x.data_ptr(), 4 * x.numel())
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, y)
        # Every call takes its working memory from the context: so many fit.
        calls = max(2, min(200, work // (4 * x.numel() + (1 << 16)) - 1))
        times: list[float] = []
        end = time.perf_counter() + budget_s
        while len(times) < calls and (len(times) < 2 or time.perf_counter() < end):
            begin = clock()
            ggml.ggml_graph_compute_with_ctx(context, graph, threads)
            times.append((clock() - begin) * 1e6)
        out = torch.empty(n_rows, n_out)
        ctypes.memmove(out.data_ptr(), ggml.ggml_get_data(y), out.nbytes)
        ggml.ggml_free(context)
        return min(times), error_of(weight, x, out)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def bench(
    fmt: WeightFormat, n_rows: int, shape: tuple[int, int], threads: int, budget: float, peak: float, ik: Ik | None
) -> Row | None:
    """One case; None if its results are wrong."""
    n_out, n_in = shape
    weight = weight_of(fmt, n_out, n_in)
    bandwidth = read_bandwidth(weight.nbytes, threads)
    x, out = torch.randn(n_rows, n_in, generator=torch.Generator().manual_seed(2)), torch.empty(n_rows, n_out)
    error = error_of(weight, x, matmul(x, weight, out=out, n_threads=threads))
    if not error <= TOLERANCE:
        print(f"{list(shape)} {fmt.name} x {n_rows}: relative RMSE {error:.1e}: not timed")
        return None
    # One thread may have to share its processor: only its own time counts.
    clock = time.process_time if threads == 1 else time.perf_counter
    least, median = timed(lambda: matmul(x, weight, out=out, n_threads=threads), budget, clock)
    # ik_llama.cpp has another type of mxfp4's number.
    theirs = None if ik is None or fmt.name == "mxfp4" else ik.time(weight, x, threads, budget, clock)
    gb_s, macs = weight.nbytes / least / 1e3, n_out * n_in * n_rows / least / 1e3
    row = Row(
        fmt.name,
        n_out,
        n_in,
        n_rows,
        threads,
        error,
        least,
        median,
        gb_s,
        gb_s / bandwidth,
        macs,
        macs / peak,
        *(theirs or (None, None)),
    )
    anchor = "" if theirs is None else f"  ik {theirs[0]:9.1f} us, {theirs[0] / least:.2f}x, error {theirs[1]:.0e}"
    print(
        f"{fmt.name:7} {f'[{n_out}, {n_in}]':13} x{n_rows:4} {least:9.1f} us (median {median:9.1f})  {gb_s:5.1f} GB/s "
        f"{gb_s / bandwidth:4.0%} of {bandwidth:.0f}  {macs:6.1f} GMAC/s {macs / peak:4.0%}  error {error:.0e}{anchor}",
        flush=True,
    )
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(WEIGHTS))
    parser.add_argument("--rows", default=",".join(map(str, N_ROWS)))
    parser.add_argument("--shape", help="n_out,n_in of every case")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of a case")
    parser.add_argument("--ik", action="store_true", help="time ik_llama.cpp on the same bytes")
    parser.add_argument("-t", "--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    isa = cpu_native.isa()
    top = {kind: cpu_native.probe(kind, args.threads) / 1e9 for kind in ("float", "integer")}  # type: ignore[arg-type]
    print(f"isa {isa}, {args.threads} threads, {platform.processor() or platform.machine()}")
    print(f"ceilings: {top['float']:.0f} G float and {top['integer']:.0f} G int16 multiply-adds/s")
    ik = Ik() if args.ik else None
    done: list[Row | None] = []
    for name in args.types.split(","):
        fmt = WEIGHTS[name]
        for n_rows in map(int, args.rows.split(",")):
            shape = LARGE if n_rows == 1 else LAYER
            if args.shape:
                n_out, n_in = map(int, args.shape.split(","))
                shape = n_out, n_in
            peak = top["integer" if fmt.is_quantized else "float"]
            done.append(bench(fmt, n_rows, shape, args.threads, args.budget, peak, ik))
    right = [row for row in done if row is not None]
    print(json.dumps({"isa": isa, "ceilings": top, "rows": [asdict(row) for row in right]}))
    return int(len(right) < len(done))


if __name__ == "__main__":
    raise SystemExit(main())
