"""`hybridkv eval`: what each cache type changes in what a model says, token by token."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv import __version__
from hybridkv.cli.fits import Demand, check_memory
from hybridkv.cli.model_options import Opened, add_model_arguments, check_limits, limit_spinning, open_model
from hybridkv.cli.ray_options import LOCAL
from hybridkv.cli.show import notice, simple_table, stdout_console, summary
from hybridkv.errors import UsageError, one_of
from hybridkv.options import COMMON, KVOption
from hybridkv_lab.cli.bench_options import check_range, words
from hybridkv_lab.cli.eval_ray import prepare, spread
from hybridkv_lab.cli.outputs import output_path

if TYPE_CHECKING:
    from hybridkv.cache import AttentionFacts
    from hybridkv.engine.load import Loaded
    from hybridkv.runtime import Step
    from hybridkv_lab.candidates import Candidate
    from hybridkv_lab.corpus import Corpus
    from hybridkv_lab.results import Conditions, Result
    from hybridkv_lab.run import Evaluation

NAME = "eval"
DEFAULT_OUTPUT = "hybridkv-eval.jsonl"
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
        help="process the text in chunks (prefill), or token by token as in generation (decode) (default prefill)",
    )
    parser.add_argument(
        "--reference", default="f16", metavar="f16|f32", help="type of the reference cache (default f16)"
    )
    parser.add_argument(
        "-n",
        "--greedy",
        type=int,
        default=64,
        metavar="N",
        help="length of the greedy continuations; 0: none (default 64)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"results as JSON lines (default {DEFAULT_OUTPUT}, or the next free name)",
    )
    parser.add_argument("--resume", action="store_true", help="resume from -o: run only what is missing")
    parser.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="run each candidate as a Ray task with -t threads (default 1) on this machine, or on the cluster at "
        "ADDRESS (auto: the cluster that runs here)",
    )
    group = parser.add_argument_group("candidates", "every combination of the values below is one candidate")
    group.add_argument(
        "--types",
        default=_TYPES,
        metavar="T,K/V,...",
        help=f"types or pairs K/V, with options as in q4_0+kv+tail128+sink4+center (default {_TYPES})",
    )
    group.add_argument(
        "--kv-config",
        action="append",
        default=[],
        metavar="FILE",
        help="per-layer types from a `hybridkv tune` file, as one more candidate; repeatable",
    )
    group.add_argument("--rotate", metavar="none,k,v,kv", help="sides to rotate")
    for option in COMMON:
        if option.is_switch:
            group.add_argument(f"--{option.name}", action="store_true", help=option.help)
        else:
            group.add_argument(f"--{option.name}", metavar=f"{option.metavar},...", help=option.help)


def main(arguments: argparse.Namespace) -> int:
    """Check, resolve, load, measure, print, write."""
    limit_spinning()
    a = arguments
    output = _check(a)
    from hybridkv.policy.labels import label
    from hybridkv_lab.evaluate import MODES, Evaluator
    from hybridkv_lab.journal import Journal
    from hybridkv_lab.run import Evaluation

    mode = one_of(a.mode, MODES, "--mode", hint="decode is what generation does, prefill is faster")
    candidates = _candidates(a)
    if a.ray is not None:
        prepare(a)
    opened = open_model(a, default_ctx=DEFAULT_CTX)
    facts = _resolve(opened, candidates)
    opened = check_memory(opened, _demand(opened, candidates))
    loaded, step = opened.load()
    print(f"backend: {opened.backend_name(step)}", file=sys.stderr)
    corpus = _corpus(a, loaded, opened.n_ctx)
    identity: dict[str, str | int] = {
        "model": loaded.description.name,
        "tokens": corpus.digest,
        "context": corpus.n_ctx,
        "mode": mode,
        "reference": label(candidates[0].policy.types),
        "backend": step.name,
    }
    journal = Journal(output.with_suffix(".npz"), identity)
    if a.resume:
        journal.load()
    evaluator = Evaluator(loaded.model, step, facts, corpus.n_ctx)
    if a.ray is None:
        run = Evaluation(evaluator, corpus, candidates, mode, journal, n_greedy=a.greedy)
    else:
        run = spread(a, evaluator, corpus, candidates, mode, journal)
    complete = _measure(run)
    conditions = replace(_conditions(a, loaded, step, corpus, candidates), complete=complete)
    results = run.results(facts, _snippet(loaded, corpus))
    _show(conditions, results)
    _write(output, conditions, results)
    return 0 if complete else _EXIT_INTERRUPTED


def _check(a: argparse.Namespace) -> Path:
    """Refuse what can be refused before anything heavy is imported; where results go."""
    check_limits(a, ("--windows", "windows", 0, 10**6), ("-n", "greedy", 0, 4096))
    if a.ctx_size is not None and 0 < a.ctx_size < 2:
        raise UsageError(f"-c {a.ctx_size}; allowed: 2 or more", hint="8192 shows what long contexts do")
    if a.reference not in ("f16", "f32"):
        raise UsageError(f"--reference {a.reference!r}; allowed: f16, f32", hint="f16 is what others compare with")
    return output_path(a.output, DEFAULT_OUTPUT, (".npz",), resume=a.resume)


def _candidates(a: argparse.Namespace) -> list[Candidate]:
    """List the reference, the reference once more, and all that was asked for."""
    from hybridkv.cache import KVTypes
    from hybridkv.policy import Policy, read_config
    from hybridkv.policy.labels import label
    from hybridkv_lab.candidates import Candidate, expand

    asked = expand(
        words(a.types),
        rotations=words(a.rotate or ""),
        common={option.name: _values(option, getattr(a, option.name)) for option in COMMON},
    )
    configs = [read_config(Path(path)) for path in a.kv_config]
    asked += [Candidate(config.name, config, config=config.name) for config in configs]
    if len({config.name for config in configs}) < len(configs):
        raise UsageError("--kv-config: two files have the same name", hint="candidates are identified by the file name")
    if not asked:
        raise UsageError("--types is empty; allowed: KV cache types, separated by commas", hint="try --types q8_0,q4_0")
    reference = Policy(KVTypes(a.reference, a.reference))
    name = label(reference.types)
    return [
        Candidate(name, reference, "reference"),
        Candidate(f"{name} (again)", reference, "floor"),
        *(candidate for candidate in asked if candidate.label != name),
    ]


def _values(option: KVOption, given: Any) -> list[Any]:
    """Read the values of an option that combine with all types."""
    if option.kind == "count":
        return _counts(f"--{option.name}", given)
    return [True] * bool(given) if option.is_switch else words(given or "")


def _counts(option: str, text: str | None) -> list[int]:
    if text is None:
        return []
    parts = words(text)
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(f"{option} {text!r}; allowed: token counts, separated by commas", hint=f"try {option} 0,128")
    for part in parts:
        check_range(option, int(part), 0, 2**20)
    return [int(part) for part in parts]


def _resolve(opened: Opened, candidates: Sequence[Candidate]) -> Sequence[AttentionFacts]:
    """Return the model's KV layers, after checking that every candidate has kernels for them."""
    from hybridkv.cache import resolve
    from hybridkv.kernels import ENCODERS, KERNELS
    from hybridkv.model import kv_facts

    facts = kv_facts(opened.description.facts)
    print(summary(opened.description), file=sys.stderr)
    if not facts:
        raise UsageError(
            f"{opened.description.name} has no KV cache, so there is nothing to compare",
            hint="recurrent states are always float32",
        )
    for candidate in candidates:
        for spec in candidate.policy.resolve(facts):
            resolve(spec, opened.device_type, KERNELS, ENCODERS)
    return facts


def _demand(opened: Opened, candidates: Sequence[Candidate]) -> Demand:
    """Estimate the memory: all caches are alive at once, beside a chunk's logits and their distributions."""
    from hybridkv.model import kv_facts, vocab_size_of
    from hybridkv_lab.evaluate import LOGITS_BYTES, PIECE

    specs = [spec for c in candidates for spec in c.policy.resolve(kv_facts(opened.description.facts))]
    logits = 8 * min(LOGITS_BYTES, 4 * PIECE * vocab_size_of(opened.description.config))
    return Demand(specs, opened.n_ctx, n_caches=len(candidates), more={"logits": logits}, guarded=False)


def _corpus(a: argparse.Namespace, loaded: Loaded, n_ctx: int) -> Corpus:
    from hybridkv.engine.load import bundled_text
    from hybridkv_lab.corpus import cut, read_text

    path = bundled_text() if a.file is None else Path(a.file)
    text = read_text(path)
    if loaded.tokenizer is None:
        raise UsageError("this model has no tokenizer", hint="take a model directory with its tokenizer files")
    wanted = a.windows or None
    if wanted is not None:
        text = text[: 16 * (wanted * n_ctx + 1)]  # no tokenizer needs more characters, and a long text takes long
    return cut(path.name, loaded.tokenizer.encode(text), n_ctx, wanted)


def _measure(run: Evaluation) -> bool:
    """Run with a progress bar on stderr; False if it was interrupted."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from hybridkv.cli.show import stderr_console

    columns = (TextColumn("tokens"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console()) as progress:
        task = progress.add_task("", total=run.n_ticks)
        complete = run.execute(lambda n_tokens: progress.advance(task, n_tokens))
    if not complete:
        notice("interrupted: the measurements are kept; --resume continues")
    return complete


def _conditions(
    a: argparse.Namespace, loaded: Loaded, step: Step, corpus: Corpus, candidates: Sequence[Candidate]
) -> Conditions:
    import torch
    import transformers

    from hybridkv.kernels import KERNELS
    from hybridkv_lab.machine import cpu_model
    from hybridkv_lab.results import Conditions

    return Conditions(
        model=loaded.description.name,
        text=corpus.name,
        n_ctx=corpus.n_ctx,
        n_windows=len(corpus.windows),
        n_tokens=len(corpus.windows) * corpus.n_ctx,
        mode=a.mode,
        reference=candidates[0].label,
        backend=step.name,
        kernel=KERNELS[0].name,
        hybridkv=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        cpu=cpu_model(),
        threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        greedy_tokens=a.greedy,
    )


def _snippet(loaded: Loaded, corpus: Corpus) -> Callable[[int, int], str]:
    from hybridkv_lab.corpus import snippet

    return lambda window, position: snippet(loaded.tokenizer, corpus.windows[window], position)


def _show(conditions: Conditions, results: Sequence[Result]) -> None:
    """Print the table to choose by on stdout; the files have all figures."""
    columns = ("bits", "bytes/token", "perplexity", "ratio", "mean KLD", "99.9 %", "same top", "greedy", "tokens/s")
    table = simple_table("types", *columns, left=("types",))
    for r in results:
        speed = r.prefill_tok_s if conditions.mode == "prefill" else r.decode_tok_s
        table.add_row(
            r.label if r.role != "reference" else f"{r.label} (reference)",
            f"{r.bits_per_value:.2f}",
            f"{r.bytes_per_token:.0f}",
            f"{r.perplexity:.4f} ±{r.perplexity_se:.2f}",
            f"{r.ratio:.5f} ±{r.ratio_se:.5f}",
            f"{r.kld_mean:.2e} ±{r.kld_mean_se:.0e}",
            f"{r.kld_p999:.1e}",
            f"{100 * r.same_top:.2f} %",
            "-" if r.greedy_agreement is None else f"{100 * r.greedy_agreement:.0f} %",
            "-" if speed is None else f"{speed:.0f}",
        )
    console = stdout_console()
    console.print(table)
    where = f"{conditions.n_windows} x {conditions.n_ctx} tokens of {conditions.text}"
    console.print(f"{conditions.model}, {where}, {conditions.mode}, {conditions.backend}, {conditions.threads} threads")
    for r in results:
        if r.n_non_finite:
            console.print(f"{r.label}: {r.n_non_finite} tokens whose logits are not finite are left out of its figures")


def _write(output: Path, conditions: Conditions, results: Sequence[Result]) -> None:
    from hybridkv_lab.report import write_report
    from hybridkv_lab.results import write_jsonl

    write_jsonl(output, conditions, results)
    notice(f"results: {output}; numbers per token: {output.with_suffix('.npz')}")
    try:
        markdown, page = write_report(conditions, results, output.parent, output.stem)
    except UsageError as error:
        notice(f"no page was drawn: {error.message}; {error.hint}; then `hybridkv report {output}`")
    else:
        notice(f"report: {page}, {markdown}")
