"""`hybridkv eval`: what each cache type changes in what a model says, token by token."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybridkv import __version__
from hybridkv.cli.bench_options import check_range, words
from hybridkv.cli.model_options import Opened, add_model_arguments, check_limits, open_model
from hybridkv.cli.show import notice, simple_table, stdout_console, summary
from hybridkv.errors import UsageError, one_of

if TYPE_CHECKING:
    from hybridkv.engine.load import Loaded
    from hybridkv.hf import Step
    from hybridkv.lab.candidates import Candidate
    from hybridkv.lab.corpus import Corpus
    from hybridkv.lab.results import Conditions, Result
    from hybridkv.lab.run import Run

NAME = "eval"
HELP = "measure what each KV cache type changes: perplexity, divergence, greedy text, bytes, speed"

DEFAULT_CTX = 8192

_TYPES = "q8_0,q6_0,q5_1,q5_0,q4_1,q4_0,iq4_nl"
_EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv eval`."""
    add_model_arguments(parser, default_ctx=DEFAULT_CTX)
    parser.add_argument("-f", "--file", metavar="TEXT", help="a UTF-8 text (default: the bundled held-out text)")
    parser.add_argument(
        "--windows", type=int, default=1, metavar="N", help="windows of -c tokens; 0: all of the text (default 1)"
    )
    parser.add_argument(
        "--mode",
        default="prefill",
        metavar="prefill|decode",
        help="give the text in pieces, or token by token as generation does (default prefill)",
    )
    parser.add_argument(
        "--reference", default="f16", metavar="f16|f32", help="cache that the others are compared with (default f16)"
    )
    parser.add_argument(
        "-n", "--greedy", type=int, default=64, metavar="N", help="tokens of each greedy text; 0: none (default 64)"
    )
    parser.add_argument("-o", "--output", default="hybridkv-eval.jsonl", metavar="FILE", help="results as JSON lines")
    parser.add_argument("--resume", action="store_true", help="go on with -o: run only what it lacks")
    group = parser.add_argument_group("candidates", "options multiply: each type with each rotation, rule and length")
    group.add_argument(
        "--types",
        default=_TYPES,
        metavar="T,K/V,...",
        help=f"types or pairs K/V; options may follow, as in q4_0+kv+tail128+sink4+center (default {_TYPES})",
    )
    group.add_argument("--rotate", metavar="none,k,v,kv", help="sides to rotate")
    group.add_argument("--scale", metavar="absmax,refit", help="scale rules")
    group.add_argument("--tail", metavar="N,...", help="newest tokens kept as f16")
    group.add_argument("--sink", metavar="N,...", help="first tokens kept as f16")
    group.add_argument("--center", action="store_true", help="store K less a fixed vector, where there is a tail")


def main(arguments: argparse.Namespace) -> int:
    """Check, resolve, load, measure, print, write."""
    a = arguments
    output = _check(a)
    from hybridkv.lab.candidates import label
    from hybridkv.lab.evaluate import MODES, Evaluator
    from hybridkv.lab.journal import Journal
    from hybridkv.lab.run import Run

    mode = one_of(a.mode, MODES, "--mode", hint="decode is what generation does, prefill is faster")
    candidates = _candidates(a)
    opened = open_model(a, default_ctx=DEFAULT_CTX)
    facts = _resolve(opened, candidates)
    loaded, step = opened.load()
    print(f"engine: {step.name}", file=sys.stderr)
    corpus = _corpus(a, loaded, opened.n_ctx)
    identity = {
        "model": loaded.description.name,
        "tokens": corpus.digest,
        "context": corpus.n_ctx,
        "mode": mode,
        "reference": label(candidates[0].policy.types),
        "engine": step.name,
    }
    journal = Journal(output.with_suffix(".npz"), identity)
    if a.resume:
        journal.load()
    evaluator = Evaluator(loaded.model, step, facts, corpus.n_ctx)
    run = Run(evaluator, corpus, candidates, mode, journal, n_greedy=a.greedy)
    complete = _measure(run)
    conditions = replace(_conditions(a, loaded, step, corpus, candidates), complete=complete)
    results = run.results(facts, _snippet(loaded, corpus))
    _show(conditions, results)
    _write(output, conditions, results)
    return 0 if complete else _EXIT_INTERRUPTED
