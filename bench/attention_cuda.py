"""Attention over the packed cache on a CUDA device: right first, then timed beside torch's bf16 attention.

python bench/attention_cuda.py --quick --tune --out OUT.jsonl

A case is one shape and one type. It is compared with float64 attention over the decoded rows first; one that is
further off than 2e-3 is not timed. Stored rows repeat after 4096: their values do not change the time, and a row that
is stored n times is one row whose score is larger by log n. Times are microseconds: medians of single calls with a cold
cache (`do_bench`), and of CUDA graph replays through several copies of the rows, more than the second-level cache
holds. `ratio` is torch's best backend over ours, `ideal` the ratio of the bytes, `of copy` the packed bytes per second
over the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import torch
from torch import Tensor

from attention_cuda_torch import FAILED, Shape, copies, copy_gb_s, graph_us, measure_torch, query, single_us
from hybridkv.formats import FORMATS
from hybridkv.kernels import AttentionParams, KVView, Segment
from hybridkv.kernels.cuda import TOLERANCE, launch
from hybridkv.kernels.cuda.launch import ONE_TOKEN_ROWS, Tiling
from hybridkv.kernels.cuda.layout import row_format
from hybridkv.kernels.cuda.store import store

DISTINCT = 4096
HEADS = ((256, 16, 2), (128, 32, 8))


def decode_shapes(quick: bool) -> list[Shape]:
    shapes = []
    for d, hq, hkv in HEADS:
        for b, lengths in ((1, (4096, 32768, 131072, 262144)), (8, (4096, 32768, 131072))):
            shapes += [Shape(d, hq, hkv, b, 1, s) for s in lengths if not quick or s in (4096, 131072)]
    return shapes


def prefill_shapes() -> list[Shape]:
    return [Shape(d, hq, hkv, 1, 2048, 2048 + past) for d, hq, hkv in HEADS for past in (0, 32768)]


def decode_tilings(kv_type: str, d: int, group: int) -> list[Tiling]:
    if FORMATS[kv_type].is_quantized and group <= ONE_TOKEN_ROWS:
        return [Tiling(ONE_TOKEN_ROWS, rows, warps=4, programs=n) for rows in (64, 128) for n in (1, 2, 3, 4)]
    sizes = (32, 64, 128) if d <= 128 else (16, 32, 64)
    found = [Tiling(16, n, warps, programs) for n in sizes for warps in (4,) for programs in (2, 4)]
    found += [Tiling(16, sizes[0], 2, 8), Tiling(16, sizes[1], 2, 8), Tiling(16, sizes[2], 8, 2)]
    return [*found, Tiling(16, sizes[1], 4, 4, prefetch=False)]


def prefill_tilings(d: int) -> list[Tiling]:
    if d <= 128:
        sizes = [(128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4), (128, 64, 4)]
    else:
        sizes = [(128, 32, 8), (128, 64, 8), (64, 32, 4), (64, 64, 4), (64, 64, 8)]
    return [Tiling(*size, programs=1, prefetch=p) for size in sizes for p in (True, False)]


def distinct(shape: Shape, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(1, shape.hkv, DISTINCT, shape.d, device="cuda", generator=generator)


def view_of(shape: Shape, kv_type: str, n_rows: int | None = None) -> tuple[KVView, Tensor, Tensor]:
    """Stored rows, and the distinct rows decoded, float64 `[1, Hkv, rows, D]`."""
    fmt, n = FORMATS[kv_type], shape.s if n_rows is None else n_rows
    sides, decoded = [], []
    turns = torch.arange(n, device="cuda") % DISTINCT
    for seed in (1, 2):
        planes = [
            torch.empty(1, shape.hkv, DISTINCT, m, dtype=torch.uint8, device="cuda") for m in fmt.plane_bytes(shape.d)
        ]
        store(distinct(shape, seed), fmt, None, planes, 0)
        decoded.append(fmt.decode(planes, shape.d).double())
        sides.append(tuple(p[:, :, turns].expand(shape.b, -1, -1, -1).contiguous() for p in planes))
    return KVView((Segment(*sides, fmt, fmt, 0, n),), shape.d, shape.d), decoded[0], decoded[1]


def another(view: KVView) -> KVView:
    (s,) = view.segments
    twin = Segment(tuple(p.clone() for p in s.k), tuple(p.clone() for p in s.v), s.format_k, s.format_v, 0, s.length)
    return KVView((twin,), view.head_dim_k, view.head_dim_v)


def relative_rmse(got: Tensor, exact: Tensor) -> float:
    error = float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    return error if error == error else float("inf")


def exact_attention(q: Tensor, k: Tensor, v: Tensor, n_rows: int) -> Tensor:
    """float64, the last queries of some; row r of the distinct ones stands for the rows r, r + 4096, ..."""
    group, n_new = q.shape[1] // k.shape[1], q.shape[2]
    at = torch.linspace(0, n_new - 1, min(n_new, 8), device=q.device).round().long()
    seen = n_rows - n_new + 1 + at
    rows = torch.arange(k.shape[2], device=q.device)
    counts = ((seen[:, None] - rows + DISTINCT - 1) // DISTINCT).clamp_min(0).double()
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q[:, :, at].double() @ k.transpose(-1, -2) * q.shape[3] ** -0.5 + counts.log()
    return torch.softmax(scores, -1) @ v


def gate(q: Tensor, out: Tensor, k: Tensor, v: Tensor, n_rows: int) -> float:
    exact = exact_attention(q, k, v, n_rows)
    at = torch.linspace(0, q.shape[2] - 1, min(q.shape[2], 8), device=q.device).round().long()
    return relative_rmse(out[:, :, at], exact)


def measure_ours(shape: Shape, kv_type: str, tilings: Sequence[Tiling | None], quick: bool) -> list[dict[str, object]]:
    """One record per tiling: error, and times if it is right."""
    q = query(shape)
    view, k, v = view_of(shape, kv_type)
    params = AttentionParams(scale=shape.d**-0.5)
    views = [view] + [another(view) for _ in range((copies(shape.kv_bytes(kv_type)) if shape.t == 1 else 1) - 1)]
    records: list[dict[str, object]] = []
    for tiling in tilings:
        record: dict[str, object] = {"tiling": None if tiling is None else asdict(tiling)}
        try:
            out = launch.attend(q, view, params, tiling)
            record["error"] = gate(q, out, k, v, shape.s)
            if record["error"] <= TOLERANCE:  # type: ignore[operator]
                record["graph_us"] = graph_us([lambda x=x, t=tiling: launch.attend(q, x, params, t) for x in views])  # type: ignore[misc]
                if shape.t > 1:  # as a step hands them over that writes them so
                    call = partial(launch.attend, q.half(), view, params, tiling)
                    record["float16_us"] = graph_us([call] * len(views))
                if tiling is None:
                    record["single_us"] = single_us(lambda: launch.attend(q, view, params), quick)
        except FAILED as error:
            record["failed"] = f"{type(error).__name__}: {error}"[:300]
        records.append(record)
    return records


def measure_store(shape: Shape, kv_type: str) -> float:
    """Graph-replayed microseconds to rotate, encode and store K and V of the new tokens, rows on the device."""
    fmt = FORMATS[kv_type]
    x = torch.randn(shape.b, shape.hkv, shape.t, shape.d, device="cuda", dtype=torch.bfloat16)
    row = torch.zeros(shape.b, dtype=torch.int32, device="cuda")
    planes = [
        torch.empty(shape.b, shape.hkv, max(shape.t, 64), m, dtype=torch.uint8, device="cuda")
        for m in fmt.plane_bytes(shape.d)
    ]
    call = lambda: store(x, fmt, None, planes, row, rotated=True)  # noqa: E731
    return 2 * graph_us([call] * 8)


def compile_one(job: tuple[Shape, str, Tiling | None]) -> str | None:
    """Fill Triton's cache on disk, in a process of its own."""
    shape, kv_type, tiling = job
    try:
        small = 1024 if shape.t == 1 else shape.t
        view, _, _ = view_of(shape, kv_type, small)
        launch.attend(query(shape), view, AttentionParams(scale=1.0), tiling)
    except FAILED as error:
        return f"{kv_type} D={shape.d} T={shape.t} {tiling}: {type(error).__name__}: {str(error)[:200]}"
    return None


def compile_all(jobs: Sequence[tuple[Shape, str, Tiling | None]], n_processes: int) -> None:
    begin = time.time()
    with ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as pool:
        for failure in pool.map(compile_one, jobs):
            if failure:
                print("failed to compile:", failure)
    print(f"compiled {len(jobs)} kernels in {time.time() - begin:.0f} s", flush=True)


def best(records: Sequence[dict[str, object]]) -> dict[str, object] | None:
    timed = [r for r in records if "graph_us" in r]
    return min(timed, key=lambda r: r["graph_us"]) if timed else None  # type: ignore[arg-type, return-value]


def tiling_text(record: dict[str, object]) -> str:
    t = record["tiling"]
    if t is None:
        return "default"
    assert isinstance(t, dict)
    return f"{t['block_m']}x{t['block_n']} w{t['warps']} p{t['programs']}{'' if t['prefetch'] else ' np'}"


def row(
    shape: Shape, kv_type: str, records: Sequence[dict[str, object]], base_us: float, stored_us: float, copy: float
) -> list[str]:
    """A type's line in the table: the best tiling, and the default's time beside it."""
    top, default = best(records), records[0]
    if top is None:
        return []
    us, nbytes = float(top["graph_us"]), shape.kv_bytes(kv_type)  # type: ignore[arg-type]
    ratio, ideal, rate = base_us / us, shape.kv_bytes("bf16") / nbytes, nbytes / us / 1e3
    return [
        f"  {kv_type:7} {us:8.1f} single {default.get('single_us', 0.0):7.1f} ratio {ratio:5.2f} = "
        f"{ratio / ideal:4.2f} of ideal, {rate:4.0f} GB/s = {rate / copy:4.0%} of copy, err {top['error']:.0e}, "
        f"store {stored_us:5.1f}, "
        + (f"with float16 queries {top['float16_us']:6.1f}, " if "float16_us" in top else "")
        + f"default {default.get('graph_us', 0.0):7.1f}, best {tiling_text(top)}"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default="q8_0,q6_0,q4_0,f16,hq4_nl")
    parser.add_argument("--quick", action="store_true", help="fewer lengths")
    parser.add_argument("--tune", action="store_true", help="several tilings per case; the best is reported")
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--shape", action="append", default=[], metavar="D,HQ,HKV,B,T,S")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--out", default=os.environ.get("OUT", ".") + "/attention_cuda.jsonl")
    a = parser.parse_args()
    begin, types = time.time(), a.types.split(",")
    shapes = [Shape(*map(int, text.split(","))) for text in a.shape]
    if not shapes:
        shapes += decode_shapes(a.quick) if a.only != "prefill" else []
        shapes += prefill_shapes() if a.only != "decode" else []
    tilings: dict[tuple[Shape, str], list[Tiling | None]] = {}
    for shape in shapes:
        for kv_type in types:
            more: list[Tiling] = []
            if a.tune:
                more = (
                    decode_tilings(kv_type, shape.d, shape.hq // shape.hkv)
                    if shape.t == 1
                    else prefill_tilings(shape.d)
                )
            tilings[shape, kv_type] = [None, *more]
    jobs = {}
    for (shape, kv_type), candidates in tilings.items():
        for t in candidates:
            rows = shape.t * shape.hq // shape.hkv
            both = row_format(kv_type, shape.d)
            chosen = t or launch.choose_tiling(both, both, rows, one_token=shape.t == 1 and rows <= ONE_TOKEN_ROWS)
            jobs[shape.d, shape.t, kv_type, chosen.block_m, chosen.block_n, chosen.warps, chosen.prefetch] = (
                shape,
                kv_type,
                t,
            )
    compile_all(list(jobs.values()), a.jobs)
    copy = copy_gb_s()
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": copy, "argv": sys.argv[1:]}
    lines, table, wrong = [json.dumps(head)], [], []
    for shape in shapes:
        base = measure_torch(shape, a.quick)
        name, (graph, _) = min(base.items(), key=lambda item: item[1][0]) if base else ("none", (0.0, 0.0))
        lines.append(json.dumps({"shape": asdict(shape), "torch": base}))
        rate = shape.kv_bytes("bf16") / max(graph, 1e-9) / 1e3
        table.append(f"{shape}: torch bf16 {graph:.1f} us ({name}, {rate:.0f} GB/s)")
        for kv_type in types:
            records = measure_ours(shape, kv_type, tilings[shape, kv_type], a.quick)
            torch.cuda.empty_cache()
            stored = measure_store(shape, kv_type)
            lines.append(json.dumps({"shape": asdict(shape), "type": kv_type, "store_us": stored, "ours": records}))
            failures = (r for r in records if "graph_us" not in r)
            wrong += [f"{shape} {kv_type} {tiling_text(r)}: {r.get('failed', r.get('error'))}" for r in failures]
            table += row(shape, kv_type, records, graph, stored, copy)
        print(f"{time.time() - begin:5.0f} s  {shape}", flush=True)
    Path(a.out).write_text("\n".join(lines) + "\n")
    print(f"\n{head['device']}, torch {head['torch']}, copy {copy:.0f} GB/s; microseconds: graph replay, single call")
    print("\n".join(table))
    for line in wrong:
        print("WRONG", line)
    print(f"{time.time() - begin:.0f} s; {a.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
