"""Products with packed weights on one CUDA device, in chains as a decode step has them: microseconds and bytes.

Each shape has as many matrices as exceed the card's cache, multiplied one after the other in a recorded graph.

A tiling is warps, units held, programs a multiprocessor (0: one a tile), shares of a row, registers (0: the compiler's
choice).

    python bench/packed_products_cuda.py --rows 1,8 --tilings 4:2:0:1:0,4:2:3:1:0
"""

from __future__ import annotations

import argparse
from statistics import median

import torch

from hybridkv.kernels.cuda import packed
from hybridkv.kernels.cuda.packed import Tiling, multiply_gated, multiply_packed
from hybridkv.kernels.cuda.packed_layout import PACKED, UNIT, PackedWeight

SHAPES = {
    "qkv": ("q5_K", 2560, 8192, False), "out": ("q4_K", 4096, 2560, False), "gated": ("q4_K", 2560, 18432, True),
    "down": ("q6_K", 9216, 2560, False), "head": ("q6_K", 2560, 151936, False), "q8": ("q8_0", 2560, 12288, False),
    "q": ("q4_K", 2560, 10240, False), "down4": ("q4_K", 9216, 2560, False), "out8": ("q8_0", 4096, 2560, False),
    "down8": ("q8_0", 9216, 2560, False), "q4": ("q4_0", 2560, 12288, False), "moe": ("q4_K", 2048, 12288, False),
}  # fmt: skip
"""Type, inputs, outputs, and whether they are a SwiGLU's."""
CACHE_BYTES = 200e6


def random_weight(name: str, n_in: int, n_out: int) -> PackedWeight:
    """Random codes; scales near 1e-3."""
    planes = []
    units = n_in // UNIT
    for i, n in enumerate(PACKED[name].plane_bytes):
        if n:
            planes.append(torch.randint(0, 256, (n_out, units, n), dtype=torch.uint8, device="cuda"))
            if (PACKED[name].scales in ("half", "six") and i == 2) or i == 3:
                planes[-1].view(torch.float16)[..., : 2 if PACKED[name].scales == "six" else None] = 1e-3
        else:
            planes.append(planes[0])
    return PackedWeight(PACKED[name], tuple(planes), 1, n_out, n_in)  # type: ignore[arg-type]


def microseconds(weights: list[PackedWeight], n_rows: int, gated: bool) -> float:
    """Of one product, the median of some replays of a chain."""
    x = torch.randn(n_rows, weights[0].n_in, device="cuda", dtype=torch.float16)

    def chain() -> None:
        for weight in weights:
            if gated:
                multiply_gated(x, weight)
            else:
                multiply_packed(x, (weight,), shared=True)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * median(times[2:]) / len(weights)


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--tilings", default="2:2:0:1:0,4:2:0:1:0,8:2:0:1:0")
    options = parser.parse_args()
    for label in options.shapes.split(","):
        name, n_in, n_out, gated = SHAPES[label]
        first = random_weight(name, n_in, n_out)
        weights = [first] + [random_weight(name, n_in, n_out) for _ in range(int(CACHE_BYTES // first.nbytes))]
        for n_rows in map(int, options.rows.split(",")):
            start = f"{label:6} {name:5} {n_in:6} {n_out:7} rows {n_rows} MB {first.nbytes / 1e6:6.1f}"
            for text in options.tilings.split(","):
                warps, held, programs, shares, registers = map(int, text.split(":"))
                tiling = Tiling(warps, held, programs or None, shares, registers or None)
                packed.tiling_of = lambda *_, tiling=tiling: tiling
                try:
                    print(f"{start}  {text:12} {microseconds(weights, n_rows, gated):7.2f} us", flush=True)
                except RuntimeError as error:
                    print(f"{start}  {text:12} {str(error)[:80]}", flush=True)
        del weights, first
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
