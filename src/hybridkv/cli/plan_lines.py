"""The lines of `hybridkv plan`: one per pair of cache types, and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybridkv.cli.guess_memory import Guesses
from hybridkv.cli.show import simple_table, size, stdout_console, summary, warning, weights_words
from hybridkv.cli.split_options import Placed, placed, print_placed
from hybridkv.errors import NoKernelError

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec
    from hybridkv.engine.describe import Description
    from hybridkv.engine.placed import Split
    from hybridkv.held import Expanded, Held
    from hybridkv.native.choice import BackendKind
    from hybridkv.policy import AnyPolicy, Guard


@dataclass(frozen=True, slots=True)
class PlannedWeights:
    """Weights as they are held, and bytes per value of convolution states."""

    held: Held
    conv_itemsize: int
    expanded: Expanded | None = None
    backend: BackendKind = "auto"


@dataclass(frozen=True, slots=True)
class Question:
    """The question that is answered for every pair of types."""

    description: Description
    guard: Guard
    n_ctx: int
    n_seqs: int
    weights: PlannedWeights
    budget: int | None
    split: Split | None = None
    free: int | None = None
    guesses: Guesses = field(kw_only=True)
    placed: list[Placed | None] = field(default_factory=list)


def plan_lines(question: Question, policies: Sequence[AnyPolicy]) -> list[dict[str, Any]]:
    """Compute one object per pair of types or file, bytes as integers."""
    from hybridkv.model.facts import is_hybrid, kv_facts
    from hybridkv.planner import largest_context, plan
    from hybridkv.policy import KVConfig

    q, facts = question, question.description.facts
    lines, messages = [], []
    for policy in policies:
        specs, warnings = q.guard.before(policy.resolve(kv_facts(facts)), hybrid=is_hybrid(facts), n_ctx=q.n_ctx)
        messages += warnings
        counted = plan(
            specs,
            facts,
            n_ctx=q.n_ctx,
            n_seqs=q.n_seqs,
            conv_itemsize=q.weights.conv_itemsize,
            weight_bytes=q.weights.held.n_bytes,
        )
        line: dict[str, Any] = {
            "type_k": policy.types.type_k,
            "type_v": policy.types.type_v,
            "types_k": _types([spec.types.type_k for spec in specs]) or policy.types.type_k,
            "types_v": _types([spec.types.type_v for spec in specs]) or policy.types.type_v,
            "config": policy.name if isinstance(policy, KVConfig) else None,
            "refused": _refusal(specs),
            "bytes_per_token": sum(spec.bytes_per_token for spec in specs),
            "kv_bytes": counted.kv_bytes,
            "state_bytes": counted.state_bytes,
            "weight_bytes": counted.weight_bytes,
            "total_bytes": counted.total_bytes,
        }
        if q.split is not None:
            found = placed(q.split, q.description, specs, q.n_ctx, q.n_seqs, q.free)
            line["placement"] = None if found is None else found.as_json()
            if not line["refused"]:
                q.placed.append(found)
        if q.budget is not None:
            more = q.guesses.total(q.n_seqs)
            free = q.budget - counted.weight_bytes - counted.state_bytes - more
            line["fits"] = counted.total_bytes + more <= q.budget
            line["largest_n_ctx"] = largest_context(specs, free, n_seqs=q.n_seqs) if free >= 0 else 0
        lines.append(line)
    for message in dict.fromkeys(messages):
        warning(message)
    return lines


def _types(names: Sequence[str]) -> str:
    """Name the types of layers: `q8_0+q4_0` where there are several."""
    return "+".join(dict.fromkeys(names))


def _refusal(specs: Sequence[KVSpec]) -> str | None:
    """Explain why these types cannot run on this model, as the reference kernel says; None if they can."""
    from hybridkv.cache import resolve
    from hybridkv.kernels import ENCODERS, KERNELS

    for spec in {(s.facts.head_dim_k, s.facts.head_dim_v): s for s in specs}.values():
        try:
            resolve(spec, "cpu", KERNELS, ENCODERS)
        except NoKernelError as error:
            return error.reasons[-1][1]  # the reference's, the last one asked: others may run on other devices
    return None


def _guesses_words(guesses: Guesses, n_seqs: int) -> str:
    """Say what guessed tokens take beside the table's total, and what for; nothing where none are guessed."""
    parts = {
        "states once more": n_seqs * guesses.state_bytes,
        "caches of what guesses": n_seqs * guesses.sequence_bytes,
        "a draft model": guesses.weight_bytes,
    }
    shown = [f"{name} {size(n_bytes)}" for name, n_bytes in parts.items() if n_bytes]
    return f"; for guessed tokens, beside the total: {', '.join(shown)}" if shown else ""


def print_plan(question: Question, lines: list[dict[str, Any]], device: str, memory: str | None) -> None:
    """Print the table of what runs, under the model and its weights; `memory` is the budget as it was typed."""
    q, description = question, question.description
    columns = ["K", "V", "bytes/token", "KV", "states", "weights", "total"]
    if memory is not None:
        columns.append(f"largest context in {memory}")
    table = simple_table(*columns, left=("K", "V"))
    for line in lines:
        if line["refused"]:
            continue
        names = [line["types_k"], line["types_v"]] if line["config"] is None else [line["config"], "per layer"]
        cells = [*names, str(line["bytes_per_token"])]
        cells += [size(line[key]) for key in ("kv_bytes", "state_bytes", "weight_bytes", "total_bytes")]
        if memory is not None:
            most = line["largest_n_ctx"]
            cells.append("no limit" if most is None else f"{most} tokens" if most else "does not fit")
        table.add_row(*cells)
    sequences = "1 sequence" if q.n_seqs == 1 else f"{q.n_seqs} sequences"
    part = f"; one of {description.n_ranks} ranks" if description.n_ranks > 1 else ""
    console = stdout_console()
    console.print(f"{summary(description)}; {sequences} of {q.n_ctx} tokens{part}")
    held = q.weights.held
    peak = f"; {size(held.peak_bytes)} while they are loaded" if held.peak_bytes > 1.1 * held.n_bytes else ""
    console.print(f"weights on {device}: {weights_words(held.parts)}{peak}{_guesses_words(q.guesses, q.n_seqs)}")
    console.print(table)
    if q.placed and q.placed[0] is not None:
        print_placed(q.placed[0])
