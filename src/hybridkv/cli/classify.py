"""`hybridkv classify`: the likeliest label of every row of a file, or how cache types agree on it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv.cli.cache_options import add_cache_arguments, policy_from
from hybridkv.cli.classify_rows import DEFAULT_PROMPT, Row, encode, parse_labels, read_rows, read_template
from hybridkv.cli.fits import Demand, check_memory
from hybridkv.cli.model_options import (
    Opened,
    add_model_arguments,
    check_limits,
    limit_spinning,
    open_model,
)
from hybridkv.cli.show import (
    layer_table,
    notice,
    simple_table,
    size,
    stderr_console,
    stdout_console,
    summary,
    warning,
)
from hybridkv.errors import ContextError, UsageError, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from hybridkv.cache import KVSpec
    from hybridkv.engine.classify import Classifier, Figures
    from hybridkv.policy import AnyPolicy, Guard

NAME = "classify"
HELP = "score labels for every line of a JSONL file; shared prompt tokens are processed once"

REFERENCE = "f16"
"""What `--compare-types` compares with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv classify`."""
    parser.add_argument(
        "-f", "--file", metavar="FILE", help='JSONL file with lines {"text": ..., "label": ...}; the label is optional'
    )
    parser.add_argument("--labels", metavar="A,B,...", help="two or more labels, separated by commas")
    parser.add_argument(
        "-p",
        "--prompt",
        metavar="FILE|TEXT",
        help="prompt template that a label continues, with {text} and optionally {labels} "
        f"(default {DEFAULT_PROMPT!r})",
    )
    parser.add_argument("--chat", action="store_true", help="wrap each prompt in the model's chat template")
    parser.add_argument(
        "--normalize",
        default="none",
        metavar="none|length",
        help="divide a label's log probability by its number of tokens (length), or not (default none)",
    )
    parser.add_argument(
        "--compare-types",
        metavar="T,K/V,...",
        help=f"score every line with {REFERENCE} and then with each type or pair K/V, and compare; "
        "with options as in q4_0+kv",
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="prompts of equal length to process at once (default 8)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON lines: one per input line or type, and a summary"
    )
    add_model_arguments(parser)
    add_cache_arguments(parser)


@dataclass(frozen=True, slots=True)
class Scored:
    """All rows at one cache type.

    Attributes
    ----------
    name
        Of the type.
    bytes_per_token
        Of all KV layers, as they were stored.
    scores
        float32 `[rows, labels]`: log-likelihoods, divided by the labels' lengths if so asked.
    figures
        What it took.
    """

    name: str
    bytes_per_token: int
    scores: Tensor
    figures: Figures

    @property
    def probabilities(self) -> Tensor:
        """float32 `[rows, labels]`, rows sum to 1."""
        return self.scores.softmax(-1)


def main(arguments: argparse.Namespace) -> int:
    """Check, resolve, load, score with each type, print."""
    limit_spinning()
    from hybridkv.policy import Guard, parse_mode

    a = arguments
    _check(a)
    labels = parse_labels(a.labels)
    rows = read_rows(Path(a.file), labels)
    template = read_template(a.prompt, labels)
    guard = Guard(mode=parse_mode(a.kv_guard))
    policies = _policies(a)

    opened = open_model(a)
    specs = _resolve(opened, policies, guard)
    # Rows are as long as their texts. A card is divided before those are read: for the most that they may take.
    on_card = () if opened.device_type == "cpu" else max(specs, key=partial(_kv_bytes, opened.n_ctx, a.batch))
    opened = check_memory(opened, Demand(on_card, opened.n_ctx, a.batch, guarded=False))
    loaded, step = opened.load()
    print(f"backend: {opened.backend_name(step)}", file=sys.stderr)
    prompts, continuations = encode(template, rows, labels, loaded.tokenizer, chat=a.chat)

    from hybridkv.engine.classify import Classifier
    from hybridkv.policy.labels import label

    lengths = [len(ids) if a.normalize == "length" else 1 for ids in continuations]
    scored = []
    names = [label(policy.types) if a.kv_config is None else Path(a.kv_config).name for policy in policies]
    for name, layers in zip(names, specs, strict=True):
        classifier = Classifier(
            loaded.model,
            layers,
            continuations,
            n_ctx=opened.n_ctx,
            guard=guard,
            notify=warning,
            batch=a.batch,
            step=step,
        )
        scored.append(_score(name, classifier, prompts, lengths))
    if a.compare_types is None:
        _print_rows(scored[0], rows, labels, a.json)
    else:
        _print_comparison(scored, rows, labels, a.json)
    return 0


def _check(a: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read or imported."""
    for option, value, example in (
        ("-f", a.file, "-f rows.jsonl"),
        ("--labels", a.labels, "--labels positive,negative"),
    ):
        if not value:
            raise UsageError(f"no {option} was given", hint=f"for example {example}")
    one_of(a.normalize, ("none", "length"), "--normalize", hint="leave --normalize out for none")
    check_limits(a, ("--batch", "batch", 1, 1024))


def _policies(a: argparse.Namespace) -> list[AnyPolicy]:
    """List what each run stores: what the cache options say, or each of the types to compare."""
    from hybridkv.cache import KVTypes
    from hybridkv.policy import Policy
    from hybridkv.policy.labels import expand_types

    asked, reference = policy_from(a), Policy(types=KVTypes(REFERENCE, REFERENCE))
    if a.compare_types is None:
        return [asked]
    if asked != reference:
        raise UsageError(
            "--compare-types was given with other options of the cache's types",
            hint="a pair is K/V, and options follow a type: for example --compare-types q8_0/q4_0,q4_0+kv",
        )
    named = [part.strip() for part in a.compare_types.split(",") if part.strip()]
    if not named:
        raise UsageError("--compare-types is empty; allowed: types or pairs K/V, separated by commas")
    return [reference, *(Policy(types) for types in expand_types(named) if Policy(types) != reference)]


def _kv_bytes(n_ctx: int, n_seqs: int, specs: Sequence[KVSpec]) -> int:
    return sum(spec.bytes_at(n_ctx, n_seqs) for spec in specs)


def _resolve(opened: Opened, policies: Sequence[AnyPolicy], guard: Guard) -> list[tuple[KVSpec, ...]]:
    """Resolve and print every layer's types and kernels of each run, before any weight is loaded."""
    from hybridkv.cache import resolve
    from hybridkv.kernels import ENCODERS, KERNELS
    from hybridkv.model import is_hybrid, kv_facts

    facts = opened.description.facts
    print(summary(opened.description), file=sys.stderr)
    every = []
    for policy in policies:
        asked = policy.resolve(kv_facts(facts))
        specs, warnings = guard.before(asked, hybrid=is_hybrid(facts), n_ctx=opened.n_ctx)
        resolved = [(spec, resolve(spec, opened.device_type, KERNELS, ENCODERS)) for spec in specs]
        for line in policy.notices(asked):
            notice(line)
        for line in warnings:
            warning(line)
        if resolved and len(policies) == 1:
            stderr_console().print(layer_table(resolved))
        every.append(specs)
    return every


def _score(name: str, classifier: Classifier, prompts: list[list[int]], lengths: list[int]) -> Scored:
    """Score all rows at one policy's types."""
    import torch

    from hybridkv.engine.admission import is_out_of_memory

    try:
        scores = classifier.score(prompts)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ContextError(
            f"not enough memory for a batch at {name}", hint="take a smaller --batch, or smaller types (-ctk, -ctv)"
        ) from error
    n_bytes = sum(s.bytes_per_token for s in classifier.specs)
    return Scored(name, n_bytes, scores / torch.tensor(lengths), classifier.figures)


def _accuracy(scored: Scored, rows: Sequence[Row], labels: Sequence[str]) -> tuple[int, int]:
    """Count the rows that got the label they should get, and those that say which."""
    best = scored.scores.argmax(-1).tolist()
    known = [row.label == labels[choice] for row, choice in zip(rows, best, strict=True) if row.label is not None]
    return sum(known), len(known)


def _print_rows(scored: Scored, rows: Sequence[Row], labels: Sequence[str], as_json: bool) -> None:
    """Print a table, or JSON lines, and what it took."""
    correct, known = _accuracy(scored, rows, labels)
    table = simple_table("row", "label", "probability", "margin", *["correct"] * (known > 0), left=("label",))
    answers = zip(rows, scored.probabilities.tolist(), scored.scores.tolist(), strict=True)
    for number, (row, values, scores) in enumerate(answers, 1):
        ranked = sorted(range(len(labels)), key=values.__getitem__, reverse=True)
        best, margin = labels[ranked[0]], values[ranked[0]] - values[ranked[1]]
        verdict = None if row.label is None else row.label == best
        if as_json:
            line: dict[str, Any] = {"row": number, "label": best, "probability": values[ranked[0]], "margin": margin}
            if verdict is not None:
                line |= {"expected": row.label, "correct": verdict}
            for key, numbers in (("probabilities", values), ("log_likelihoods", scores)):
                line[key] = dict(zip(labels, numbers, strict=True))
            print(json.dumps(line))
        else:
            shown = {None: "-", True: "yes", False: "no"}[verdict]
            table.add_row(str(number), best, f"{values[ranked[0]]:.3f}", f"{margin:.3f}", *[shown] * (known > 0))
    figures = scored.figures
    if as_json:
        print(json.dumps({"summary": _summary(scored, correct, known)}))
    else:
        stdout_console().print(table)
    parts = [f"{figures.n_rows} rows"]
    if known:
        parts.append(f"accuracy {100 * correct / known:.1f} % ({correct} of {known})")
    parts += [
        f"{figures.rows_s:.1f} rows/s",
        f"memory: KV {size(figures.kv_bytes)}, states {size(figures.state_bytes)}",
        f"{figures.n_saved} prompt tokens saved ({figures.n_shared} that all rows begin with)",
    ]
    print("; ".join(parts), file=sys.stderr)


def _summary(scored: Scored, correct: int, known: int) -> dict[str, Any]:
    figures = scored.figures
    return {
        "type": scored.name,
        "bytes_per_token": scored.bytes_per_token,
        "accuracy": correct / known if known else None,
        "rows_s": figures.rows_s,
        "saved_tokens": figures.n_saved,
        **asdict(figures),
    }


def _print_comparison(scored: Sequence[Scored], rows: Sequence[Row], labels: Sequence[str], as_json: bool) -> None:
    """Print one line per type: memory, and how far its answers are from the reference's."""
    reference = scored[0].probabilities
    choice = reference.argmax(-1, keepdim=True)
    _, known = _accuracy(scored[0], rows, labels)
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("type", lambda line: line["type"]),
        ("bytes/token", lambda line: str(line["bytes_per_token"])),
        ("KV", lambda line: size(line["kv_bytes"])),
        ("states", lambda line: size(line["state_bytes"])),
        (f"same as {REFERENCE}", lambda line: f"{100 * line['agreement']:.1f} %"),
        ("mean |change of p|", lambda line: f"{line['mean_change']:.2g}"),
        ("rows/s", lambda line: f"{line['rows_s']:.1f}"),
    ]
    if known:
        columns.insert(4, ("accuracy", lambda line: f"{100 * line['accuracy']:.1f} %"))
    table = simple_table(*(name for name, _ in columns), left=("type",))
    for one in scored:
        line = _summary(one, *_accuracy(one, rows, labels))
        line["agreement"] = float((one.probabilities.argmax(-1, keepdim=True) == choice).float().mean())
        line["mean_change"] = float((one.probabilities - reference).gather(-1, choice).abs().mean())
        if as_json:
            print(json.dumps(line))
        table.add_row(*(cell(line) for _, cell in columns))
    if not as_json:
        stdout_console().print(table)
    figures = scored[0].figures
    print(
        f"{figures.n_rows} rows; {figures.n_saved} prompt tokens saved ({figures.n_shared} that all rows begin with)",
        file=sys.stderr,
    )
