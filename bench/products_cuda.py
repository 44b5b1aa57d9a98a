"""A matrix times one row on a CUDA device: ours and torch's, recorded one after the other. Right first, then timed.

    python bench/products_cuda.py

At the widths of 4B and 35B-A3B Qwen3.5 models, bfloat16, over as many matrices as exceed the cache; medians of graph
replays in microseconds, beside what the bytes take at the copy bandwidth measured here.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_cuda_torch import copies, copy_gb_s, graph_us
from hybridkv.kernels.cuda.layers import swiglu
from hybridkv.kernels.cuda.products import one_row

TOLERANCE = 6e-3
SHAPES = {
    "4B, into a delta net": (2560, 12352, False),
    "4B, gate, up and SwiGLU": (2560, 9216, True),
    "4B, down": (9216, 2560, False),
    "4B, out of a mixer": (4096, 2560, False),
    "4B, head": (2560, 151936, False),
    "35B-A3B, into a delta net": (2048, 12352, False),
    "35B-A3B, out of a mixer": (4096, 2048, False),
    "35B-A3B, router": (2048, 257, False),
}


def torch_product(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    return swiglu(F.linear(x, weight)) if gated else F.linear(x, weight)


def error(x: Tensor, weight: Tensor, gated: bool) -> float:
    """Of ours against float64, relative RMSE."""
    exact = x.double() @ weight.double().T
    if gated:
        gate, up = exact.chunk(2, 1)
        exact = F.silu(gate) * up
    return float((one_row(x, weight, gated=gated).double() - exact).norm() / exact.norm())


@torch.inference_mode()
def main() -> int:
    copy = copy_gb_s()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy:.0f} GB/s")
    print("| product | inputs | outputs | torch, us | ours, us | bytes, us | error |\n|---|---|---|---|---|---|---|")
    for name, (n_in, n_out, gated) in SHAPES.items():
        rows = n_out * (2 if gated else 1)
        x = torch.randn(1, n_in, device="cuda", dtype=torch.bfloat16)
        n = copies(2 * rows * n_in) + 1
        weights = [torch.randn(rows, n_in, device="cuda", dtype=torch.bfloat16) * n_in**-0.5 for _ in range(n)]
        wrong = error(x, weights[0], gated)
        if not wrong <= TOLERANCE:
            print(f"WRONG {name}: {wrong:.1e}")
            return 1
        theirs = graph_us([partial(torch_product, x, weight, gated) for weight in weights])
        ours = graph_us([partial(one_row, x, weight, gated=gated) for weight in weights])
        floor = 2e-3 * rows * n_in / copy
        print(f"| {name} | {n_in} | {n_out} | {theirs:.1f} | {ours:.1f} | {floor:.1f} | {wrong:.0e} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
