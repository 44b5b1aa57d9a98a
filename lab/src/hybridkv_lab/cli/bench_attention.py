"""`hybridkv bench attention`: the attention kernels beside the machine's ceilings, ik_llama.cpp and torch."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hybridkv.cli.model_options import limit_spinning
from hybridkv.cli.show import simple_table, size
from hybridkv.errors import UsageError
from hybridkv_lab.cli.bench_options import (
    EXIT_WRONG,
    add_bench_arguments,
    check_range,
    notice_load,
    peers_from,
    print_json,
    print_machine,
    print_peers,
    progress_to_stderr,
    table_console,
    threads_from,
    types_from,
    words,
)

if TYPE_CHECKING:
    from rich.console import Console

    from hybridkv_lab.attention_bench import AttentionReport, Case
    from hybridkv_lab.shape import Shape

NAME = "attention"
HELP = "time attention over the packed cache (decode and prefill, per type), and storing rows"

_LIMITS = {"head dim": 1024, "heads": 1024, "KV heads": 1024, "T": 65536, "S": 2**22}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv bench attention`."""
    add_bench_arguments(
        parser,
        types="q8_0,q6_0,q4_0,f16",
        against="ik,torch",
        quick="head dim 256 only, up to 32768 stored tokens, shorter timings: within 40 s on 2 cores",
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="D,HQ,HKV,T,S",
        help="shape to time instead of the default ones: head dim, query heads, KV heads, new and stored tokens; "
        "repeatable",
    )


def main(arguments: argparse.Namespace) -> int:
    """Check, measure, print; 1 if a case was wrong."""
    limit_spinning()  # as `run` does
    from hybridkv_lab.attention_bench import PEERS, run_attention_bench, shapes

    a = arguments
    cases = shapes(quick=a.quick) if a.shape is None else [_shape(text) for text in a.shape]
    types, peers, n_threads = types_from(a.types), peers_from(a.against, PEERS), threads_from(a.threads)
    notice_load()
    report = run_attention_bench(
        cases,
        types,
        peers=peers,
        n_threads=n_threads,
        quick=a.quick,
        progress=progress_to_stderr("measuring"),
    )
    _print(report, table_console(json_on_stdout=a.json))
    if a.json:
        print_json(_result(report))
    return EXIT_WRONG if report.wrong else 0


def _shape(text: str) -> Shape:
    from hybridkv_lab.shape import Shape

    parts = words(text)
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 10]
    if len(parts) != 5 or len(numbers) != 5:
        raise UsageError(f"--shape {text!r}; allowed: five numbers D,HQ,HKV,T,S", hint="try --shape 256,16,2,1,4096")
    for (name, most), number in zip(_LIMITS.items(), numbers, strict=True):
        check_range(f"--shape {text}: {name}", number, 1, most)
    shape = Shape(*numbers)
    if shape.head_dim % 32:
        raise UsageError(f"--shape {text}: head dim {shape.head_dim}; allowed: multiples of 32")
    if shape.n_heads % shape.n_kv_heads:
        raise UsageError(
            f"--shape {text}: {shape.n_heads} heads; allowed: multiples of the {shape.n_kv_heads} KV heads"
        )
    if shape.n_new > shape.n_stored:
        raise UsageError(f"--shape {text}: T {shape.n_new}; allowed: at most the {shape.n_stored} stored tokens")
    return shape


def _print(report: AttentionReport, console: Console) -> None:
    from hybridkv_lab.ceilings import MEANING

    top = report.ceilings
    print_machine(console, top.n_threads)
    print_peers(console, report.peers)
    console.print(
        f"ceilings: read {top.read_gb_s:.1f} GB/s out of 256 MiB, float {top.float_gmac_s:.0f} and "
        f"integer {top.integer_gmac_s:.0f} G multiply-adds/s"
    )
    for name, meaning in MEANING.items():
        console.print(f"  {name}: {meaning}")
    _print_cases(report, console)
    for wrong in report.wrong:
        console.print(f"WRONG {wrong}")
    _print_stores(report, console)


def _print_cases(report: AttentionReport, console: Console) -> None:
    peers = [p.name for p in report.peers if any(p.name in case.peer_ms for case in report.cases)]
    table = simple_table(
        "attention", "type", "ms", "p10-p90", "GB/s", "GFLOP/s", "of ceiling", "bound", "1 thread", "scratch", "error",
        *(column for peer in peers for column in (f"{peer} ms", "ratio")),
        left=("attention", "type", "bound"),
    )  # fmt: skip
    for case in report.cases:
        table.add_row(*_cells(case, peers))
    console.print(table)
    console.print(
        "of ceiling: the slower of reading the case's bytes (at the speed of a set of that size) and its multiply-adds "
        "at their peak, over the median; 1 thread: how many times faster than one thread; error: relative RMSE against "
        "float64; ratio: the peer's median over ours"
    )


def _cells(case: Case, peers: list[str]) -> list[str]:
    t = case.time
    cells = [str(case.shape), case.kv_type, f"{t.median_ms:.3f}", f"{t.p10_ms:.3f}-{t.p90_ms:.3f}"]
    cells += [f"{case.gb_s:.1f}", f"{case.gflop_s:.0f}", f"{case.of_ceiling:.0%}", case.bound]
    cells += ["-" if case.scaling is None else f"{case.scaling:.2f}x", size(case.scratch_bytes), f"{case.error:.0e}"]
    for peer in peers:
        ms = case.peer_ms.get(peer)
        cells += ["-", "-"] if ms is None else [f"{ms:.3f}", f"{case.ratio[peer]:.2f}x"]
    return cells


def _print_stores(report: AttentionReport, console: Console) -> None:
    shapes = list(dict.fromkeys(shape for store in report.stores for shape in store.of_decode))
    table = simple_table("store", "GB/s a core", *(f"token of {shape}" for shape in shapes), left=("store",))
    for store in report.stores:
        tokens = [
            f"{store.token_us[s]:.1f} us, {store.of_decode[s]:.1%}" if s in store.of_decode else "-" for s in shapes
        ]
        table.add_row(store.kv_type, f"{store.bulk_gb_s:.2f}", *tokens)
    console.print(table)
    console.print("GB/s: of float32 input, head dim 256; token: K and V of one token, and its share of the attention")


def _result(report: AttentionReport) -> dict[str, Any]:
    from hybridkv_lab.machine import machine, versions

    return {
        "bench": "attention",
        "ratio": {str(case): case.ratio for case in report.cases},
        "ceilings": asdict(report.ceilings),
        "machine": machine(report.ceilings.n_threads),
        "versions": versions(),
        "peers": {peer.name: asdict(peer) for peer in report.peers},
        "cases": [
            asdict(case)
            | {"gb_s": case.gb_s, "gflop_s": case.gflop_s, "of_ceiling": case.of_ceiling, "scaling": case.scaling}
            for case in report.cases
        ],
        "wrong": [asdict(wrong) for wrong in report.wrong],
        "store": [asdict(store) for store in report.stores],
    }
