"""Which scale rule each symmetric KV format should have by default: `absmax` or `refit`.

For every symmetric format it prints the error ratio refit/absmax (below 1: refit is better) of

* decode: relative RMSE of the decoded rows, plain, and weighted by x*x (what the refit minimises);
* attention: relative RMSE of the output of float64 attention over decoded K and V against exact K and V,

on normal and heavy-tailed (Student t, 4 degrees of freedom) rows, with and without Hadamard rotation, as the
geometric mean over seeds, with the smallest and largest. `unweighted` is the decode ratio of a least-squares
scale with w = 1, for comparison only: no format stores it. The default is refit where the geometric mean of
the attention ratios over the four data sets is below 1. The last line is JSON.

    python bench/scale_rule.py --head-dim 128 --n-ctx 1024 --seeds 4
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import geometric_mean

import torch
from torch import Tensor

from hybridkv.formats import FORMATS, KVFormat, Scale
from hybridkv.rotation import rotate

N_QUERIES = 64
DATA: dict[str, Callable[[torch.Size], Tensor]] = {
    "normal": torch.randn,
    "student-t4": lambda shape: torch.distributions.StudentT(4.0).sample(shape),
}


@dataclass(frozen=True, slots=True)
class Record:
    """One format on one data set; `ratios` maps a measure to (geometric mean, min, max) over seeds."""

    format: str
    data: str
    rotation: str
    attention_rmse_absmax: float
    ratios: dict[str, tuple[float, float, float]]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Float64 attention; q [H, T, D], k and v [H, S, D]."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


def unweighted(fmt: KVFormat, x: Tensor) -> float:
    """Relative RMSE with a least-squares scale of weight 1 per block, for the codes of `absmax`."""
    y = fmt.decode(fmt.encode(x, "absmax"), x.shape[-1]).double()
    lanes = fmt.lanes(x.shape[-1])
    xb, yb = x.double().reshape(-1, lanes), y.reshape(-1, lanes)
    fit = (xb * yb).sum(-1, keepdim=True) / (yb * yb).sum(-1, keepdim=True)
    return rms(fit * yb - xb) / rms(x)


def errors(fmt: KVFormat, scale: Scale, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Relative RMSE per measure, with K and V stored in `fmt`."""
    k_out, v_out = (fmt.decode(fmt.encode(rows, scale), rows.shape[-1]) for rows in (k, v))
    exact = attention(q, k, v)
    return {
        "decode": rms(k_out - k) / rms(k),
        "weighted": rms((k_out - k) * k) / rms(k * k),
        "attention": rms(attention(q, k_out, v_out) - exact) / rms(exact),
    }


def compare(fmt: KVFormat, data: str, rotation: str, args: argparse.Namespace) -> Record:
    ratios: dict[str, list[float]] = {}
    levels: list[float] = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        shape = torch.Size((args.heads, args.n_ctx, args.head_dim))
        q = torch.randn(args.heads, N_QUERIES, args.head_dim)
        k, v = DATA[data](shape), DATA[data](shape)
        if rotation == "hadamard":
            q, k, v = rotate(q), rotate(k), rotate(v)
        absmax, refit = errors(fmt, "absmax", q, k, v), errors(fmt, "refit", q, k, v)
        for measure, error in absmax.items():
            ratios.setdefault(measure, []).append(refit[measure] / error)
        ratios.setdefault("unweighted", []).append(unweighted(fmt, k) / absmax["decode"])
        levels.append(absmax["attention"])
    spread = {measure: (geometric_mean(r), min(r), max(r)) for measure, r in ratios.items()}
    return Record(fmt.name, data, rotation, geometric_mean(levels), spread)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--n-ctx", type=int, default=1024, help="stored rows per head")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()

    results: list[Record] = []
    defaults: dict[str, Scale] = {}
    print(f"{'format':8}{'data':12}{'rotation':10}{'attention':>10}   ratio refit/absmax: mean (min..max)")
    for fmt in (fmt for fmt in FORMATS.values() if fmt.symmetric):
        records = [compare(fmt, data, rotation, args) for data in DATA for rotation in ("none", "hadamard")]
        for r in records:
            cells = "  ".join(f"{m} {a:.4f} ({b:.4f}..{c:.4f})" for m, (a, b, c) in r.ratios.items())
            print(f"{r.format:8}{r.data:12}{r.rotation:10}{r.attention_rmse_absmax:10.3e}   {cells}")
        mean = geometric_mean([r.ratios["attention"][0] for r in records])
        defaults[fmt.name] = "refit" if mean < 1 else "absmax"
        print(f"{fmt.name:8}attention {mean:.4f}: {defaults[fmt.name]} (table: {fmt.default_scale})")
        results += records
    run = {"torch": torch.__version__, "machine": platform.machine(), **vars(args)}
    print(json.dumps({**run, "defaults": defaults, "results": [asdict(record) for record in results]}))


if __name__ == "__main__":
    main()
