"""`hybridkv tune`: types of K and V for each KV layer, found by measuring, verified on other tokens."""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hybridkv import __version__
from hybridkv.cli.cache_options import add_options, given_options
from hybridkv.cli.fits import Demand, check_memory
from hybridkv.cli.model_options import Opened, add_model_arguments, check_limits, limit_spinning, open_model
from hybridkv.cli.show import notice, summary
from hybridkv.errors import UsageError, one_of
from hybridkv.options import COMMON, kv_option
from hybridkv_lab.cli.bench_options import types_from
from hybridkv_lab.cli.outputs import output_path
from hybridkv_lab.cli.tune_report import Report

if TYPE_CHECKING:
    from rich.progress import Progress

    from hybridkv.cache import AttentionFacts
    from hybridkv.engine.load import Loaded
    from hybridkv.runtime import Step
    from hybridkv_lab.corpus import Corpus
    from hybridkv_lab.evaluate import Evaluator
    from hybridkv_lab.journal import Journal
    from hybridkv_lab.run import Tick
    from hybridkv_lab.sensitivity import Part, Storage
    from hybridkv_lab.tuner import Goal, Outcome, Tuner

NAME = "tune"
DEFAULT_OUTPUT = "kv.toml"
HELP = "find KV cache types for each layer within a budget of bits, bytes or divergence"

_TYPES = "f16,q8_0,q6_0,q5_0,hq4_nl,hq3_nl,hq2_nl"

_PIECE = 32
"""Tokens given at once where newest tokens stay exact: of a longer chunk, most would never be read packed."""

_EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv tune`."""
    add_model_arguments(parser, limit_option="--total-memory")
    goal = parser.add_argument_group("goal", "give one of these")
    goal.add_argument("--budget", metavar="BITSbpv", help="mean bits per value, such as 5.0bpv")
    goal.add_argument("--memory", metavar="SIZE", help="size of the KV cache at -c tokens, such as 2GiB")
    goal.add_argument(
        "--max-kld",
        type=float,
        metavar="X",
        help="mean divergence from an f16 cache in nats; the fewest bytes within it are found",
    )
    parser.add_argument(
        "-o", "--output", default="kv.toml", metavar="FILE", help="file to write the types to (default kv.toml)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="resume from the measurements beside -o; the goal may be another one"
    )
    group = parser.add_argument_group("candidates")
    group.add_argument(
        "--types", default=_TYPES, metavar="T,...", help=f"types to choose from, for K and V (default {_TYPES})"
    )
    group.add_argument(
        "--measure",
        metavar="T,...",
        help="types to measure layer by layer; losses of the others are interpolated from one measurement of "
        "all layers together (default: all)",
    )
    group.add_argument(
        "--rotate", default="kv", metavar="none|k|v|kv", help="sides to rotate; hq types always rotate (default kv)"
    )
    add_options(group, COMMON)
    text = parser.add_argument_group("measuring")
    text.add_argument("-f", "--file", metavar="TEXT", help="a UTF-8 text (default: the bundled held-out text)")
    text.add_argument("--window", type=int, default=1024, metavar="N", help="tokens per window (default 1024)")
    text.add_argument("--calibrate", type=int, default=2, metavar="N", help="windows to choose types on (default 2)")
    text.add_argument(
        "--verify", type=int, default=6, metavar="N", help="held-out windows to judge the choice on (default 6)"
    )
    text.add_argument(
        "--mode",
        default="prefill",
        metavar="prefill|decode",
        help="process the text in chunks (prefill), or token by token as in generation (decode) (default prefill)",
    )
    text.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="local-search rounds (default 3)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Check, resolve, load, measure, choose, verify, print, write."""
    limit_spinning()
    a = arguments
    output = _check(a)
    from hybridkv_lab.evaluate import MODES, Evaluator
    from hybridkv_lab.sensitivity import Meter, measure_sensitivities
    from hybridkv_lab.tuner import Tuner

    mode = one_of(a.mode, MODES, "--mode", hint="decode is what generation does, prefill is faster")
    types, measured, storage = _candidates(a)
    opened = open_model(a)
    goal = _goal(a, opened.n_ctx)
    facts = _resolve(opened, types, storage)
    goal.check(facts, storage, types)
    opened = check_memory(opened, _demand(opened, facts, a.window))
    loaded, step = opened.load()
    print(f"backend: {opened.backend_name(step)}", file=sys.stderr)
    parts = _parts(a, loaded)
    evaluator = Evaluator(loaded.model, step, facts, a.window)
    if storage.common.tail:
        evaluator.piece = min(evaluator.piece, _PIECE)
    journal = _journal(a, output, opened, step, parts, storage)
    try:
        with _progress() as progress:
            meter = Meter(evaluator, parts, mode, journal, partial(_begin, progress))
            sensitivities = measure_sensitivities(meter, facts, storage, types, measured)
            tuner = Tuner(meter, facts, storage, sensitivities, goal)
            outcome = tuner.solve(n_rounds=a.rounds)
        errors = _guard_errors(evaluator, tuner, outcome, parts)
    except KeyboardInterrupt:
        notice("interrupted: the measurements are kept; --resume continues")
        return _EXIT_INTERRUPTED
    report = Report(_conditions(a, opened, step, parts, goal, storage), facts, storage, sensitivities, outcome, errors)
    report.show()
    report.write(output)
    return 0


def _check(a: argparse.Namespace) -> Path:
    """Refuse what can be refused before anything heavy is imported; where the types go."""
    asked = [name for name in ("budget", "memory", "max_kld") if getattr(a, name) is not None]
    if len(asked) != 1:
        given = " and ".join(f"--{name.replace('_', '-')}" for name in asked) or "none"
        raise UsageError(f"a goal is one of --budget, --memory, --max-kld; given: {given}", hint="try --budget 5.0bpv")
    check_limits(
        a,
        ("--window", "window", 2, 2**20),
        ("--calibrate", "calibrate", 1, 10**4),
        ("--verify", "verify", 1, 10**4),
        ("--rounds", "rounds", 0, 100),
    )
    if a.max_kld is not None and not 0 < a.max_kld < 100:
        raise UsageError(f"--max-kld {a.max_kld}; allowed: more than 0, less than 100 nats", hint="try --max-kld 0.003")
    exact = sum(value for name, value in given_options(a, COMMON).items() if kv_option(name).kind == "count")
    if exact and a.window <= exact + 2 * _PIECE:
        raise UsageError(
            f"--window {a.window} with {exact} exact tokens; allowed: more than {exact + 2 * _PIECE}",
            hint="in a shorter window almost every token is kept exact, so there is nothing to measure",
        )
    return output_path(a.output, DEFAULT_OUTPUT, (".npz", ".json"), resume=a.resume)


def _candidates(a: argparse.Namespace) -> tuple[list[str], list[str], Storage]:
    """Choose the ladder, what of it is measured layer by layer, and what holds for all layers."""
    from hybridkv.policy import common_types
    from hybridkv.policy.labels import ROTATIONS
    from hybridkv_lab.sensitivity import REFERENCE, Storage

    types = types_from(a.types)
    measured = types if a.measure is None else types_from(a.measure, "--measure")
    for name in measured:
        one_of(name, types, "--measure: not among --types:", hint="measure some of --types")
    if not [name for name in measured if name != REFERENCE]:
        raise UsageError(f"nothing to measure beside {REFERENCE}", hint="leave --types and --measure out")
    common = common_types(given_options(a, COMMON))
    rotate = one_of(a.rotate, ROTATIONS, "--rotate", hint="kv measures better for nearly every type below 8 bits")
    return types, measured, Storage(rotate, common)


def _goal(a: argparse.Namespace, n_ctx: int) -> Goal:
    from hybridkv.planner import parse_bytes
    from hybridkv_lab.tuner import Goal

    if a.max_kld is not None:
        return Goal("kld", a.max_kld, n_ctx)
    if a.memory is not None:
        return Goal("memory", parse_bytes(a.memory), n_ctx)
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)(bpv)?", a.budget.strip(), re.ASCII)
    if match is None or not 0 < float(match[1]) <= 32:
        raise UsageError(
            f"--budget {a.budget!r}; allowed: bits per value, up to 32", hint="for example --budget 5.0bpv"
        )
    return Goal("bits", float(match[1]), n_ctx)


def _demand(opened: Opened, facts: Sequence[AttentionFacts], n_window: int) -> Demand:
    """Count nothing in main memory but the model; on a card, two caches of a window that are not quantized."""
    if opened.device_type == "cpu":
        return Demand((), opened.n_ctx, guarded=False)
    from hybridkv.cache import KVTypes
    from hybridkv.policy import Policy

    return Demand(2 * Policy(KVTypes("f32", "f32")).resolve(facts), n_window, n_caches=2, guarded=False)


def _resolve(opened: Opened, types: Sequence[str], storage: Storage) -> Sequence[AttentionFacts]:
    """Return the model's KV layers, after checking that every pair of types has kernels for them."""
    from hybridkv.cache import KVSpec, resolve
    from hybridkv.kernels import ENCODERS, KERNELS
    from hybridkv.model import kv_facts

    facts = kv_facts(opened.description.facts)
    print(summary(opened.description), file=sys.stderr)
    if not facts:
        raise UsageError(
            f"{opened.description.name} has no KV cache, so there is nothing to tune",
            hint="recurrent states are always float32",
        )
    for f in {(f.head_dim_k, f.head_dim_v, f.window is None): f for f in facts}.values():
        for k in types:
            for v in types:
                resolve(KVSpec(f, storage.types(k, v)), opened.device_type, KERNELS, ENCODERS)
    return facts


def _parts(a: argparse.Namespace, loaded: Loaded) -> dict[Part, Corpus]:
    """Cut the text into calibration and held-out windows."""
    from hybridkv.engine.load import bundled_text
    from hybridkv_lab.corpus import read_text, split

    path = bundled_text() if a.file is None else Path(a.file)
    text = read_text(path)
    if loaded.tokenizer is None:
        raise UsageError("this model has no tokenizer", hint="take a model directory with its tokenizer files")
    first, second = split(path.name, loaded.tokenizer.encode(text), a.window, a.calibrate, a.verify)
    return {"calibration": first, "held-out": second}


def _journal(
    a: argparse.Namespace, output: Path, opened: Opened, step: Step, parts: dict[Part, Corpus], storage: Storage
) -> Journal:
    from hybridkv.policy.labels import label
    from hybridkv_lab.journal import Journal

    identity: dict[str, str | int] = {
        "model": opened.description.name,
        "calibration": parts["calibration"].digest,
        "held-out": parts["held-out"].digest,
        "window": a.window,
        "mode": a.mode,
        "backend": step.name,
        "rotate": storage.rotate,
        "cache": label(storage.common),
    }
    journal = Journal(output.with_suffix(".npz"), identity)
    if a.resume:
        journal.load()
    return journal


def _progress() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from hybridkv.cli.show import stderr_console

    columns = (
        TextColumn("{task.description}, tokens"),
        BarColumn(40),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=stderr_console())


def _begin(progress: Progress, what: str, n_ticks: int) -> Tick:
    """Begin one bar per phase; a phase whose every number is there already has none."""
    if not n_ticks:
        return lambda _: None
    task = progress.add_task(what, total=n_ticks)
    return lambda n_tokens: progress.advance(task, n_tokens)


def _guard_errors(evaluator: Evaluator, tuner: Tuner, outcome: Outcome, parts: dict[Part, Corpus]) -> dict[int, float]:
    """Measure each layer's attention error as the guard would; print what the guard would raise."""
    from hybridkv.policy import Guard
    from hybridkv_lab.candidates import Candidate

    policy = tuner.config(outcome.chosen.pairs, "tuning", "")
    errors = evaluator.layer_errors(Candidate("chosen", policy), parts["calibration"].windows[0])
    limits = {spec.facts.layer: Guard().limit_for(spec.types) for spec in policy.resolve(evaluator.facts)}
    if over := [layer for layer, error in errors.items() if not error <= limits[layer]]:
        notice(
            f"layers {', '.join(map(str, over))}: the attention error is above the limit of --kv-guard check, which "
            "will store these layers in more bits; --kv-guard off or warn keeps the types"
        )
    return errors


def _conditions(
    a: argparse.Namespace, opened: Opened, step: Step, parts: dict[Part, Corpus], goal: Goal, storage: Storage
) -> dict[str, str | int | float]:
    """Record what was asked and what it was measured with."""
    import torch
    import transformers

    from hybridkv.policy.labels import label
    from hybridkv_lab.machine import cpu_model

    corpus = parts["calibration"]
    return {
        "model": opened.description.name,
        "goal": {"bits": "bits per value", "memory": "bytes", "kld": "mean KLD"}[goal.kind],
        "limit": goal.limit,
        "context": goal.n_ctx,
        "text": corpus.name,
        "window": corpus.n_ctx,
        "calibration_tokens": corpus.n_ctx * len(corpus.windows),
        "held_out_tokens": corpus.n_ctx * len(parts["held-out"].windows),
        "mode": a.mode,
        "rotate": storage.rotate,
        "exact": label(storage.common).removeprefix("f16").lstrip("+"),
        "backend": step.name,
        "hybridkv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
