"""Which scale rule each KV format should have by default, and which grid of values the hq formats should have.

First, for every format with a refit, the error ratio refit/absmax (below 1: refit is better) of

* decode: relative RMSE of the decoded rows, plain, and weighted by x*x (what the refit `pairs` minimises);
* attention: relative RMSE of the output of float64 attention over decoded K and V against exact K and V,

as the geometric mean over samples, with the smallest and largest. A sample is a seed of normal or of heavy-tailed
(Student t, 4 degrees of freedom) rows, or a layer of a model on held-out text; each with and without Hadamard
rotation, the hq formats with it alone. The default is refit where the geometric mean of the attention ratios over
the data sets is below 1.

Then, on the rotated samples, the errors of 4, 3 and 2 bits with the hq codebooks, with the Lloyd-Max codebook of the
normal distribution, and with a midpoint grid (half-integer multiples of the scale), each under the hq formats' own
scale rule and with starts enough not to matter; with the hq codebooks under a fit weighted by x*x (iq4_nl's search);
and of q4_0 and iq4_nl. The last line is JSON.

    python bench/scale_rule.py --model SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean

import torch
from torch import Tensor

from codebooks import LLOYD_MAX
from hybridkv.engine.load import bundled_model
from hybridkv.formats import FORMATS, KVFormat, Scale
from hybridkv.rotation import rotate
from real_rows import attention_rows

N_QUERIES = 64
N_LAYERS = 6
DATA: dict[str, Callable[[torch.Size], Tensor]] = {
    "normal": torch.randn,
    "student-t4": lambda shape: torch.distributions.StudentT(4.0).sample(shape),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Queries and the rows that all of them see: q `[H, T, D]`, k and v `[H, S, D]`, the scores' `scale`."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def rotated(self) -> Sample:
        """The same attention over rotated rows."""
        return replace(self, q=rotate(self.q), k=rotate(self.k), v=rotate(self.v))

    def attend(self, k: Tensor, v: Tensor) -> Tensor:
        """Attention in float64, over other rows."""
        return torch.softmax(self.q.double() @ k.double().mT * self.scale, dim=-1) @ v.double()


@dataclass(frozen=True, slots=True)
class Record:
    """One format on one data set; `ratios` maps a measure to (geometric mean, min, max) over its samples."""

    format: str
    data: str
    rotation: str
    attention_rmse_absmax: float
    ratios: dict[str, tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class GridRecord:
    """Relative RMSE of decoded rows and of attention, in the mean over samples, by data set."""

    grid: str
    bits: float
    decode: dict[str, float]
    attention: dict[str, float]


def synthetic(name: str, args: argparse.Namespace) -> list[Sample]:
    """One sample per seed."""
    samples = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        shape = torch.Size((args.heads, args.n_ctx, args.head_dim))
        q = torch.randn(args.heads, N_QUERIES, args.head_dim)
        samples.append(Sample(q, DATA[name](shape), DATA[name](shape), args.head_dim**-0.5))
    return samples


def real(path: Path, n_ctx: int) -> list[Sample]:
    """One sample per layer, of at most `N_LAYERS`: the last queries and the rows before them, one head per KV head."""
    layers = attention_rows(path, n_ctx + N_QUERIES)
    samples = []
    for rows in layers[:: -(-len(layers) // N_LAYERS)]:
        group = len(rows.q) // len(rows.k)
        samples.append(Sample(rows.q[::group, n_ctx:], rows.k[:, :n_ctx], rows.v[:, :n_ctx], rows.scale))
    return samples


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def errors(fmt: KVFormat, scale: Scale, sample: Sample) -> dict[str, float]:
    """Relative RMSE per measure, with K and V stored in `fmt`."""
    k, v = sample.k, sample.v
    k_out, v_out = (fmt.decode(fmt.encode(rows, scale), rows.shape[-1]) for rows in (k, v))
    exact = sample.attend(k, v)
    return {
        "decode": rms(k_out - k) / rms(k),
        "weighted": rms((k_out - k) * k) / rms(k * k),
        "attention": rms(sample.attend(k_out, v_out) - exact) / rms(exact),
    }


def compare(fmt: KVFormat, data: str, rotation: str, samples: Sequence[Sample]) -> Record:
    ratios: dict[str, list[float]] = {}
    levels: list[float] = []
    for sample in samples:
        absmax, refit = errors(fmt, "absmax", sample), errors(fmt, "refit", sample)
        for measure, error in absmax.items():
            ratios.setdefault(measure, []).append(refit[measure] / error)
        levels.append(absmax["attention"])
    spread = {measure: (geometric_mean(r), min(r), max(r)) for measure, r in ratios.items()}
    return Record(fmt.name, data, rotation, geometric_mean(levels), spread)


def scale_rules(sets: dict[tuple[str, str], list[Sample]]) -> tuple[list[Record], dict[str, Scale]]:
    """The table of ratios, printed, and the default that follows for each format."""
    results: list[Record] = []
    defaults: dict[str, Scale] = {}
    print(f"{'format':8}{'data':20}{'rotation':10}{'attention':>10}   ratio refit/absmax: mean (min..max)")
    for fmt in (fmt for fmt in FORMATS.values() if fmt.refit):
        records = [
            compare(fmt, data, rotation, samples)
            for (data, rotation), samples in sets.items()
            if rotation == "hadamard" or not fmt.rotated
        ]
        for r in records:
            cells = "  ".join(f"{m} {a:.4f} ({b:.4f}..{c:.4f})" for m, (a, b, c) in r.ratios.items())
            print(f"{r.format:8}{r.data[:18]:20}{r.rotation:10}{r.attention_rmse_absmax:10.3e}   {cells}")
        mean = geometric_mean([r.ratios["attention"][0] for r in records])
        defaults[fmt.name] = "refit" if mean < 1 else "absmax"
        print(f"{fmt.name:8}attention {mean:.4f}: {defaults[fmt.name]} (table: {fmt.default_scale})", flush=True)
        results += records
    return results, defaults


def grids() -> dict[str, KVFormat]:
    """The formats to compare: what is in the table, and what might have been."""
    found = {"q4_0": FORMATS["q4_0"], "iq4_nl": FORMATS["iq4_nl"]}
    for fmt in (fmt for fmt in FORMATS.values() if fmt.rotated):
        bits = fmt.code_bits
        starts = tuple(range(90, 300, 6))
        halves = {"lloyd-max": LLOYD_MAX[bits], "midpoint": tuple(range(1, 2**bits, 2))}
        found[fmt.name] = fmt
        found[f"{fmt.name}, all starts"] = replace(fmt, starts=starts)
        found[f"{fmt.name}, weighted"] = replace(fmt, refit="search")
        for name, half in halves.items():
            book = (*(-value for value in reversed(half)), *half)
            tops = tuple(round(start * half[-1] / 127, 3) for start in starts)
            found[f"{name} {bits}"] = replace(fmt, codebook=book, starts=tops)
    return found


def compare_grids(sets: dict[tuple[str, str], list[Sample]]) -> list[GridRecord]:
    """The table of grids on rotated rows, printed."""
    rotated = {data: samples for (data, rotation), samples in sets.items() if rotation == "hadamard"}
    records = []
    print(f"{'grid':22}{'bits':>5}   decode / attention on rotated rows: {', '.join(rotated)}")
    for name, fmt in grids().items():
        decode, attention = {}, {}
        for data, samples in rotated.items():
            measured = [errors(fmt, "refit", sample) for sample in samples]
            decode[data] = geometric_mean([m["decode"] for m in measured])
            attention[data] = geometric_mean([m["attention"] for m in measured])
        records.append(GridRecord(name, fmt.bits_per_value(128), decode, attention))
        cells = "  ".join(f"{decode[data]:.4f} / {attention[data]:.4f}" for data in rotated)
        print(f"{name:22}{fmt.bits_per_value(128):5.1f}   {cells}", flush=True)
    return records


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--n-ctx", type=int, default=960, help="stored rows per head")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--model", type=Path, action="append", default=[bundled_model()], help="another GGUF model")
    args = parser.parse_args()

    plain = {name: synthetic(name, args) for name in DATA} | {p.stem: real(p, args.n_ctx) for p in args.model}
    sets = {(name, "none"): samples for name, samples in plain.items()}
    sets |= {(name, "hadamard"): [sample.rotated() for sample in samples] for name, samples in plain.items()}
    ratios, defaults = scale_rules(sets)
    found = compare_grids(sets)
    models = [path.name for path in args.model]
    run = {"torch": torch.__version__, "machine": platform.machine(), **vars(args), "model": models}
    tables = {"results": [asdict(record) for record in ratios], "grids": [asdict(record) for record in found]}
    print(json.dumps({**run, "defaults": defaults, **tables}))


if __name__ == "__main__":
    main()
