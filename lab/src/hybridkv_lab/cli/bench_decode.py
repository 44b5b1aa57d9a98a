"""`hybridkv bench decode`: a whole model's steps and prompts beside ik_llama.cpp's, on the same file."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hybridkv.cli.model_options import limit_spinning, quiet_transformers
from hybridkv.cli.show import model_path, simple_table
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

    from hybridkv_lab.decode_bench import DecodeReport, LogitsGate, Plan, Speed

NAME = "decode"
HELP = "time a whole model: prompt tokens/s, and generated tokens/s at several cache depths"

_MAX_DEPTH = 2**22
_MAX_DIFFERENCE = 100


@dataclass(frozen=True, slots=True)
class _Usual:
    """The measurements made where nothing else was asked for."""

    types: str
    depths: str
    n_prompt: int
    n_steps: int


_FULL = _Usual("f16,q8_0,q4_0", "0,8192,32768", 2048, 32)
_QUICK = _Usual("q8_0,q4_0", "0,8192", 512, 16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv bench decode`."""
    parser.add_argument("-m", "--model", metavar="PATH", help="GGUF file (default: the bundled model)")
    add_bench_arguments(
        parser,
        types=_FULL.types,
        against="ik",
        quick="two types, depths 0 and 8192, a prompt of 512 tokens and 16 steps, where not given",
    )
    parser.set_defaults(types=None)
    parser.add_argument(
        "--depths", metavar="N,...", help=f"tokens in the cache when generation is timed (default {_FULL.depths})"
    )
    parser.add_argument(
        "--prompt", type=int, metavar="N", help=f"tokens of the timed prompt (default {_FULL.n_prompt})"
    )
    parser.add_argument("-khad", "--k-cache-hadamard", action="store_true", help="rotate K, as in `run`")
    parser.add_argument("-vhad", "--v-cache-hadamard", action="store_true", help="rotate V, as in `run`")
    parser.add_argument("-n", "--steps", type=int, metavar="N", help=f"steps at each depth (default {_FULL.n_steps})")
    parser.add_argument(
        "--backend",
        "--engine",
        dest="backend",
        default="auto",
        metavar="auto|native|eager",
        help="as in `run` (default auto)",
    )
    parser.add_argument(
        "--activations", default="int16", metavar="int16|int8", help="of our products, as in `run` (default int16)"
    )
    parser.add_argument(
        "--difference-limit",
        metavar="X",
        help="largest difference from the other program's logits, relative to their spread (default 0.1)",
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where a token's time goes, by kind of native operation"
    )


def main(arguments: argparse.Namespace) -> int:
    """Check, measure, print; 1 if the answers did not agree."""
    limit_spinning()  # as `run` does; the peers' threads lose nothing by it
    a = arguments
    plan = _plan(a)
    from hybridkv.engine.load import bundled_model, describe
    from hybridkv_lab.decode_bench import PEERS, run_decode_bench

    quiet_transformers()
    peers = peers_from(a.against, PEERS)
    description = describe(bundled_model() if a.model is None else model_path(a.model))
    notice_load()
    report = run_decode_bench(description, plan, peers=peers, progress=progress_to_stderr("measuring"))
    _print(report, plan, table_console(json_on_stdout=a.json))
    if a.json:
        print_json(_result(report, plan))
    return 0 if report.passed else EXIT_WRONG


def _plan(a: argparse.Namespace) -> Plan:
    from hybridkv.engine.steps import parse_activations, parse_backend
    from hybridkv_lab.decode_bench import Plan

    usual = _QUICK if a.quick else _FULL
    n_prompt = usual.n_prompt if a.prompt is None else a.prompt
    n_steps = usual.n_steps if a.steps is None else a.steps
    check_range("--prompt", n_prompt, 1, _MAX_DEPTH)
    check_range("-n", n_steps, 1, 4096)
    return Plan(
        types=tuple(types_from(usual.types if a.types is None else a.types)),
        depths=_depths(usual.depths if a.depths is None else a.depths),
        n_prompt=n_prompt,
        n_steps=n_steps,
        n_threads=threads_from(a.threads),
        kind=parse_backend(a.backend),
        activations=parse_activations(a.activations),
        profile=a.profile,
        difference_limit=_limit(a.difference_limit),
        rotated="k" * a.k_cache_hadamard + "v" * a.v_cache_hadamard,
    )


def _limit(text: str | None) -> float:
    from hybridkv_lab.decode_bench import DIFFERENCE_LIMIT

    if text is None:
        return DIFFERENCE_LIMIT
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit <= _MAX_DIFFERENCE:
        raise UsageError(
            f"--difference-limit {text!r}; allowed: a number above 0 and at most {_MAX_DIFFERENCE}",
            hint=f"the default is {DIFFERENCE_LIMIT}; a wrong layer gives 1 and more",
        )
    return limit


def _depths(text: str) -> tuple[int, ...]:
    parts = words(text)
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(f"--depths {text!r}; allowed: token counts, separated by commas", hint="try --depths 0,8192")
    for part in parts:
        check_range("--depths", int(part), 0, _MAX_DEPTH)
    return tuple(dict.fromkeys(int(part) for part in parts))


def _print(report: DecodeReport, plan: Plan, console: Console) -> None:
    print_machine(console, plan.n_threads)
    console.print(f"{report.model}, backend {report.backend}")
    print_peers(console, report.peers)
    for gate in report.gates:
        console.print(
            f"{gate.kv_type}: {_verdict(gate)}: logits within {gate.difference:.1e}, "
            f"the first {gate.agreed} of 16 greedy tokens the same"
        )
    if not report.gates:
        console.print("no peer: answers were not compared")
    for line in report.fallbacks:
        console.print(f"WRONG: not stored as asked: {line}")
    peers = [p.name for p in report.peers if p.path is not None]
    for title, speeds in (("prompt", report.prompts), ("generation", report.steps)):
        _print_speeds(title, speeds, peers, console)
    for speed in (*report.prompts, *report.steps):
        if speed.profile:
            _print_profile(speed, console)
        elif plan.profile:
            console.print("no profile: operations are timed where the native step runs")


def _verdict(gate: LogitsGate) -> str:
    from hybridkv_lab.decode_bench import DIFFERENCE_LIMIT

    if not gate.passed:
        return f"WRONG, above {gate.limit:g}: not timed, against {gate.peer}"
    if gate.difference > DIFFERENCE_LIMIT:
        return f"differs from {gate.peer}, which --difference-limit {gate.limit:g} allows"
    return f"agrees with {gate.peer}"


def _print_profile(speed: Speed, console: Console) -> None:
    where = f"in a prompt of {speed.n_tokens}" if speed.n_tokens > 1 else f"at depth {speed.depth}"
    whole, title = sum(speed.profile.values()), f"{speed.kv_type} {where}"
    table = simple_table(title, "ms a token", "share", left=(title,))
    for kind, ms in speed.profile.items():
        table.add_row(kind, f"{ms:.3f}", f"{ms / whole:.1%}")
    console.print(table)


def _print_speeds(title: str, speeds: tuple[Speed, ...], peers: list[str], console: Console) -> None:
    from hybridkv_lab.decode_bench import OURS

    what = "tokens" if title == "prompt" else "depth"
    table = simple_table(
        title, what, "tokens/s", "ms", "p10-p90",
        *(column for peer in peers for column in (f"{peer} tokens/s", "ratio")),
        left=(title,),
    )  # fmt: skip
    for speed in speeds:
        t = speed.time[OURS]
        n = speed.n_tokens if title == "prompt" else speed.depth
        cells = [speed.kv_type, str(n), f"{speed.tok_s[OURS]:.1f}", f"{t.median_ms:.2f}"]
        cells.append(f"{t.p10_ms:.2f}-{t.p90_ms:.2f}")
        for peer in peers:
            here = peer in speed.time
            cells += [f"{speed.tok_s[peer]:.1f}", f"{speed.ratio[peer]:.2f}x"] if here else ["-", "-"]
        table.add_row(*cells)
    console.print(table)


def _result(report: DecodeReport, plan: Plan) -> dict[str, Any]:
    from hybridkv_lab.machine import machine, versions

    def speeds(found: tuple[Speed, ...]) -> list[dict[str, Any]]:
        return [asdict(s) | {"tok_s": s.tok_s, "ratio": s.ratio} for s in found]

    return {
        "bench": "decode",
        "model": report.model,
        "backend": report.backend,
        "ratio": {f"{s.kv_type} depth {s.depth}": s.ratio for s in report.steps}
        | {f"{s.kv_type} prompt {s.n_tokens}": s.ratio for s in report.prompts},
        "machine": machine(plan.n_threads),
        "versions": versions(),
        "peers": {peer.name: asdict(peer) for peer in report.peers},
        "gates": [asdict(gate) | {"passed": gate.passed} for gate in report.gates],
        "fallbacks": list(report.fallbacks),
        "prompt": speeds(report.prompts),
        "steps": speeds(report.steps),
    }
