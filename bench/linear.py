"""Linear layers over packed weights on the CPU: correctness first, then speed beside the machine's own ceilings.

For every case: relative RMSE against float64 with the stored weight (a case above its tolerance is not timed and the
exit code is 1), then the median of many calls with its 10th and 90th percentile, preparation of the activations
included; GB/s of weights and the fraction of the measured read bandwidth of a set of that size (weights that were just
used lie in a cache, as they do in a model that fits); G multiply-adds per second. The shapes are those of a 0.8B
Qwen3.5-like model and of one of 29M. The last line is JSON.

    python bench/linear.py --quick
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hybridkv.kernels import cpu_native
from hybridkv.kernels.linear import PackedWeight, WeightType, gather, linear, pack

# Few rows keep far more bits than the weights have; many rows on AMX are bfloat16 products.
TOLERANCE = 4e-3
SHAPES = (
    (1024, 384),
    (384, 1024),
    (8192, 384),
    (6144, 1024),
    (3584, 1024),
    (1024, 3584),
    (151936, 1024),
)
N_ROWS = (1, 4, 16, 64, 512)
MOST_OUTPUT_BYTES = 200 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One timed case."""

    n_out: int
    n_in: int
    weight_type: str
    n_rows: int
    threads: int
    error: float
    median_us: float
    p10_us: float
    p90_us: float
    gb_s: float
    of_bandwidth: float
    gmac_s: float


def timed(call: Callable[[], object], budget_s: float) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile in microseconds, after a warm-up."""
    call()
    call()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 5000):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    times.sort()
    return times[len(times) // 2], times[len(times) // 10], times[-1 - len(times) // 10]


def weight_of(n_out: int, n_in: int, weight_type: WeightType) -> PackedWeight:
    """Normal rows; beyond 4096 they repeat."""
    weight = torch.randn(min(n_out, 4096), n_in, generator=torch.Generator().manual_seed(1))
    return pack(weight.repeat(-(-n_out // 4096), 1)[:n_out], weight_type)


def error_of(packed: PackedWeight, x: Tensor, out: Tensor) -> float:
    """Relative RMSE of at most 64 rows and 4096 outputs: float64 products of more would dominate the run."""
    some = torch.arange(min(packed.n_out, 4096)) * (packed.n_out // min(packed.n_out, 4096))
    exact = x[:64].double() @ gather(packed, some).double().T
    return float((out[:64, some] - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def read_bandwidth(n_bytes: int, threads: int) -> float:
    """GB/s of reading a set of this size again and again."""
    data = torch.ones(max(n_bytes // 4, 1 << 14))
    return float(cpu_native._native().probe(cpu_native.isa(), "read", data.data_ptr(), data.numel(), threads)) / 1e9


def bench(n_out: int, n_in: int, weight_type: WeightType, threads: int, budget: float) -> tuple[list[Row], bool]:
    """All numbers of rows of one weight, and whether all of them were right."""
    done: list[Row] = []
    right = True
    packed = weight_of(n_out, n_in, weight_type)
    bandwidth = read_bandwidth(packed.nbytes, threads)
    for n_rows in N_ROWS:
        if n_rows * n_out * 4 > MOST_OUTPUT_BYTES:
            continue
        x, out = torch.randn(n_rows, n_in), torch.empty(n_rows, n_out)
        error = error_of(packed, x, linear(x, packed, out=out, n_threads=threads))
        if not error <= TOLERANCE:
            print(f"[{n_out}, {n_in}] {weight_type} x {n_rows}: relative RMSE {error:.1e}: not timed")
            right = False
            continue
        median, p10, p90 = timed(lambda x=x, out=out: linear(x, packed, out=out, n_threads=threads), budget)  # type: ignore[misc]
        gb_s = packed.nbytes / median / 1e3
        macs = n_out * n_in * n_rows / median / 1e3
        row = Row(
            n_out, n_in, weight_type, n_rows, threads, error, median, p10, p90, gb_s, gb_s / bandwidth, macs
        )  # fmt: skip
        done.append(row)
        print(
            f"{f'[{n_out}, {n_in}]':15} {packed.nbytes / 1e6:6.1f} MB {weight_type:5} x{n_rows:4} {median:10.1f} us "
            f"[{p10:.1f}, {p90:.1f}]  {gb_s:6.1f} GB/s {gb_s / bandwidth:4.0%} of {bandwidth:.0f}  "
            f"{macs:7.1f} GMAC/s  error {error:.0e}",
            flush=True,
        )
    return done, right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter timings, q8_0 and q4_0 only")
    parser.add_argument("--types", default="q8_0,q4_0,bf16,f32")
    parser.add_argument("-t", "--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    native, isa = cpu_native._native(), cpu_native.isa()
    top = {kind: native.probe(isa, kind, 0, 400_000, args.threads) / 1e9 for kind in ("float", "integer")}
    print(f"isa {isa}, {args.threads} threads, {platform.processor() or platform.machine()}")
    half = " (bfloat16 tiles do half of it)" if isa == "amx" else ""
    print(f"ceilings: {top['float']:.0f} G float and {top['integer']:.0f} G integer MAC/s{half}")
    done: list[Row] = []
    right = True
    for weight_type in ["q8_0", "q4_0"] if args.quick else args.types.split(","):
        for n_out, n_in in SHAPES:
            if weight_type == "f32" and n_out > 100_000:
                continue
            some, fine = bench(n_out, n_in, weight_type, args.threads, 0.1 if args.quick else 0.5)
            done, right = done + some, right and fine
    print(json.dumps({"isa": isa, "ceilings": top, "rows": [asdict(row) for row in done]}))
    return int(not right)


if __name__ == "__main__":
    raise SystemExit(main())
