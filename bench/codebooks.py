"""The codebooks and starts of the hq formats, derived: what `hybridkv.formats.table` holds comes from here.

A block of 32 rotated values is stored as a scale and codes. For codebooks of 16, 8 and 4 values (symmetric) this
alternates, on normal blocks,

* for every block the codes and the scale with the least squared error, out of a fine range of scales;
* for every code the value with the least squared error over the blocks, `sum(d*|x|) / sum(d*d)`.

It is Lloyd's iteration with the scale as part of the code. Lloyd-Max for the normal distribution itself is another
codebook (6 18 31 44 58 75 96 127): a block that chooses its scale spares it the rare large values. Then, for the
codebook in whole numbers, the range of five evenly spaced starts with the least error. Printed beside it: what
rotated rows that are not normal would have given, heavy-tailed ones and K and V of models. The last line is JSON.

    python bench/codebooks.py
    python bench/codebooks.py --model SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from hybridkv.engine.load import bundled_model
from hybridkv.formats import FORMATS
from hybridkv.rotation import rotate
from real_rows import attention_rows

TOP = 127
N_STARTS = 5
LLOYD_MAX = {4: (6, 18, 31, 44, 58, 75, 96, 127), 3: (14, 45, 79, 127), 2: (38, 127)}
"""Where the iteration begins: positive half, for the normal distribution."""


def fit(x: Tensor, half: Tensor, tops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best codes, scale and squared error of blocks `[N, 32]` over scalings of their largest magnitude to `tops`."""
    size = x.abs()
    middles, largest = (half[1:] + half[:-1]) / 2, size.amax(-1, keepdim=True)
    best, scale = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    codes = torch.zeros_like(x, dtype=torch.int32)
    for top in tops:
        tried = torch.bucketize(size * (top / largest), middles, out_int32=True, right=True)
        q = half[tried]
        sum_qx = (q * size).sum(-1, keepdim=True)
        d = sum_qx / (q * q).sum(-1, keepdim=True)
        better = d * sum_qx > best
        best = torch.where(better, d * sum_qx, best)
        scale, codes = torch.where(better, d, scale), torch.where(better, tried, codes)
    return codes, scale, x.square().sum(-1, keepdim=True) - best


def derive(x: Tensor, bits: int, rounds: int) -> Tensor:
    """Positive half of the codebook for blocks `[N, 32]`, scaled to end at 127."""
    x = x[x.abs().amax(-1) > 0]
    x = x / x.square().mean(-1, keepdim=True).sqrt()  # every block counts alike
    half = torch.tensor(LLOYD_MAX[bits], dtype=torch.float32)
    tops = torch.linspace(0.7, 2.2, 31) * TOP
    for _ in range(rounds):
        codes, d, _ = fit(x, half, tops)
        flat, weight = codes.flatten(), (d * d).expand_as(x).flatten()
        sums = torch.zeros(2, len(half)).index_add_(1, flat, torch.stack([(d * x.abs()).flatten(), weight]))
        half = sums[0] / sums[1]
        half = half * (TOP / half[-1])
    return half


def relative_error(x: Tensor, half: Tensor, tops: Tensor) -> float:
    return float((fit(x, half, tops)[2].sum() / x.square().sum()).sqrt())


def starts(x: Tensor, half: Tensor) -> tuple[list[int], float]:
    """The five evenly spaced tops with the least error, and that error."""
    ranges = product(torch.arange(0.8, 1.3, 0.05).tolist(), torch.arange(1.1, 2.3, 0.05).tolist())
    tried = [torch.linspace(low, high, N_STARTS) * TOP for low, high in ranges if low < high]
    errors = [relative_error(x, half, tops.round()) for tops in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    return tried[best].round().int().tolist(), errors[best]


def sources(paths: list[Path], n_blocks: int) -> dict[str, Tensor]:
    """Rotated blocks `[N, 32]` by what they come from."""
    tails = rotate(torch.distributions.StudentT(4.0).sample(torch.Size((n_blocks // 4, 128))))
    found = {"normal": torch.randn(n_blocks, 32), "rotated student-t4": tails.reshape(-1, 32)}
    for path in paths:
        layers = attention_rows(path)
        for side in ("k", "v"):
            x = torch.cat([rotate(getattr(rows, side)).reshape(-1, 32) for rows in layers])
            found[f"{path.stem} {side.upper()}"] = x[torch.randperm(len(x))[:n_blocks]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", help="GGUF file (default: the bundled model)")
    parser.add_argument("--blocks", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.manual_seed(0)
    data = sources(args.model or [bundled_model()], args.blocks)
    results = []
    for bits in (4, 3, 2):
        for name, x in data.items():
            half = derive(x, bits, args.rounds)
            print(f"{bits} bits  {name:32}", " ".join(f"{value:6.1f}" for value in half), flush=True)
            if name == "normal":
                book = half.round()
        tops, error = starts(data["normal"], book)
        least = relative_error(data["normal"], book, torch.linspace(0.6, 2.4, 100) * TOP)
        print(f"{bits} bits  codebook {book.int().tolist()} starts {tops}: error {error:.4f}, all scales {least:.4f}")
        held = next(fmt for fmt in FORMATS.values() if fmt.rotated and fmt.code_bits == bits)
        assert held.codebook is not None
        half, tops_held = torch.tensor(held.codebook[len(book) :]).float(), torch.tensor(held.starts).float()
        in_table = {name: round(relative_error(x, half, tops_held), 4) for name, x in data.items()}
        print(f"{bits} bits  {held.name}: {half.int().tolist()} {list(held.starts)}: error {in_table}", flush=True)
        results.append({"bits": bits, "codebook": book.int().tolist(), "starts": tops, "error": error, "least": least})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
