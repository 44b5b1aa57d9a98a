"""Compare a run with the memory there is before weights are read; refuse it with the numbers and what would fit.

A run that does not fit swaps, and takes the machine with it. On a card the plan counts what packed weights take there
(`split_options.py`); of other weights an allocation that fails is an error of its own, at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hybridkv.cli.guess_memory import NO_GUESSES, Guesses
from hybridkv.cli.show import notice, size, weights_words
from hybridkv.cli.split_options import place_run
from hybridkv.errors import ContextError

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec
    from hybridkv.cli.model_options import Opened
    from hybridkv.held import Held
    from hybridkv.policy import AnyPolicy, Guard


_SMALLER = ("q8_0", "q4_0")
"""Cache types that are tried for what would fit."""


_LEAST_CONTEXT = 256
"""Tokens that `-c 0` goes down to, and in steps of which."""


@dataclass(frozen=True, slots=True)
class Demand:
    """The bytes that a run takes at its full context.

    Attributes
    ----------
    specs
        Every KV layer of every cache that is alive at once.
    n_caches
        How many of these there are, with their own states.
    n_ctx, n_seqs
        Tokens of a sequence, and sequences of a cache.
    more
        Other bytes, by what they are.
    budget_bytes
        What KV and states may take at most; None for no limit.
    guarded
        Whether the guard measures the first prompt.
    guesses
        What guessing tokens takes, of all sequences.
    """

    specs: Sequence[KVSpec]
    n_ctx: int
    n_seqs: int = 1
    n_caches: int = 1
    more: Mapping[str, int] = field(default_factory=dict)
    budget_bytes: int | None = None
    guarded: bool = True
    guesses: Guesses = NO_GUESSES


def check_memory(opened: Opened, demand: Demand) -> Opened:
    """Refuse what does not fit; on a card that does not hold a whole model, choose what lies there.

    Raises
    ------
    ContextError
        With the numbers, and what would fit.
    """
    if opened.device_type != "cpu":
        return place_run(opened, demand)
    _check_main_memory(opened, demand)
    return opened


def _check_main_memory(opened: Opened, demand: Demand) -> None:
    from hybridkv.memory import Available, available_memory

    limit, option = opened.memory_limit, opened.limit_option
    available = available_memory() if limit is None else Available(limit, f"allowed by {option}")
    if available is None:
        notice(f"cannot find out how much memory is free, so the plan was not checked; {option} SIZE sets a limit")
        return
    held = opened.held()
    parts = _parts(opened, demand)
    kept = sum(parts.values())
    needed = max(held.peak_bytes, held.n_bytes + kept)
    if needed <= available.n_bytes:
        return
    shown = [f"{name} {size(n_bytes)}" for name, n_bytes in parts.items() if n_bytes]
    loading = f"; {size(held.peak_bytes)} while they are loaded" if held.peak_bytes > 1.1 * held.n_bytes else ""
    raise ContextError(
        f"not enough memory: this takes {size(needed)}, and {size(available.n_bytes)} are {available.source}\n"
        f"weights {size(held.n_bytes)} ({weights_words(held.parts)}{loading}); {', '.join(shown)}",
        hint=f"{_hint(opened, demand, held, parts, available.n_bytes)}; {option} SIZE replaces what is free",
    )


def fit_context(
    opened: Opened,
    asked: int | None,
    policy: AnyPolicy,
    guard: Guard,
    *,
    n_seqs: int,
    more: int | None = None,
    guesses: Guesses = NO_GUESSES,
) -> Opened:
    """Shorten the context that `-c 0` asks for to what memory allows, and say so; any other stays.

    Parameters
    ----------
    asked
        `-c` as it was given.
    more
        Bytes that are taken beside weights and caches; None where that is decided once the context is known.
    guesses
        What guessing tokens takes, at the whole context.
    """
    from hybridkv.memory import Available, available_memory
    from hybridkv.model import is_hybrid, kv_facts
    from hybridkv.planner import largest_context

    if asked != 0 or opened.device_type != "cpu":
        return opened
    limit = opened.memory_limit
    available = available_memory() if limit is None else Available(limit, f"allowed by {opened.limit_option}")
    if available is None:
        return opened
    facts = opened.description.facts
    specs, _ = guard.before(policy.resolve(kv_facts(facts)), hybrid=is_hybrid(facts), n_ctx=opened.n_ctx)
    demand = Demand(specs, opened.n_ctx, n_seqs, guarded=guard.measures, more={"more": more or 0}, guesses=guesses)
    parts = _parts(opened, demand)
    kv = next(iter(parts.values()))
    free = available.n_bytes - opened.held().n_bytes - (sum(parts.values()) - kv)
    most = largest_context(specs, free, n_seqs=n_seqs) if free > 0 else None
    if most is None or most >= opened.n_ctx or most < _LEAST_CONTEXT:
        return opened  # `check_memory` refuses what does not fit
    most -= most % _LEAST_CONTEXT
    notice(f"-c 0: {most} tokens fit in memory, not the {opened.n_ctx} of training; {size(available.n_bytes)} are free")
    return replace(opened, n_ctx=most)


def bytes_beside(opened: Opened, demand: Demand) -> int:
    """Sum the most bytes that weights and a run take together."""
    held = opened.held()
    return max(held.peak_bytes, held.n_bytes + sum(_parts(opened, demand).values()))


def _kv_bytes(specs: Sequence[KVSpec], demand: Demand) -> int:
    return sum(spec.bytes_at(demand.n_ctx, demand.n_seqs) for spec in specs)


def _state_bytes(opened: Opened, n_seqs: int) -> int:
    """Count the bytes of the states of `n_seqs` sequences."""
    from hybridkv.planner import plan

    return plan((), opened.description.facts, n_ctx=0, n_seqs=n_seqs).state_bytes


def _parts(opened: Opened, demand: Demand) -> dict[str, int]:
    """Count the bytes beside the weights, by what they are."""
    from hybridkv.planner import guard_bytes, work_bytes

    states = _state_bytes(opened, demand.n_seqs) * demand.n_caches
    kv, g, n_seqs = _kv_bytes(demand.specs, demand), demand.guesses, demand.n_seqs
    within = states + g.of_sequences(n_seqs)
    if demand.budget_bytes is not None and kv + within > demand.budget_bytes:
        kv = max(0, demand.budget_bytes - within)
    types = ", ".join(dict.fromkeys(spec.types.label for spec in demand.specs)) if demand.n_caches == 1 else ""
    caches = f"at {types}" if types else f"in {demand.n_caches} caches"
    return {
        f"KV of {demand.n_seqs} x {demand.n_ctx} tokens {caches}": kv,
        "states": states,
        "states behind guesses": g.state_bytes * n_seqs,
        "caches of what guesses": g.sequence_bytes * n_seqs,
        "the draft model": g.weight_bytes,
        **demand.more,
        "activations about": work_bytes(opened.description.config),
        "the guard's copies": guard_bytes(demand.specs) if demand.guarded else 0,
    }


def _hint(opened: Opened, demand: Demand, held: Held, parts: Mapping[str, int], n_available: int) -> str:
    """Suggest what would fit: other weights, a smaller type, a smaller context."""
    from hybridkv.planner import largest_context

    kv = next(iter(parts.values()))
    rest = sum(parts.values()) - kv
    free = n_available - held.n_bytes - rest
    of_guesses = demand.guesses.total(demand.n_seqs)
    if demand.guesses.weight_bytes and max(held.peak_bytes, held.n_bytes + rest + kv - of_guesses) <= n_available:
        return f"without the draft model (-md) it takes {size(of_guesses)} less, and fits"
    if held.peak_bytes > n_available or free < 0:
        own = opened.description.held("auto", "cpu", "f32")
        if opened.weights == "plain" and max(own.peak_bytes, own.n_bytes + rest + kv) <= n_available:
            return f"without --weights and --backend they are held as they are, in {size(own.n_bytes)}, and fit"
        for kind in ("int8", "int4"):
            smaller = opened.description.held(kind, "cpu", "f32", backend=opened.asked)
            if (
                opened.weights in ("auto", "f32", "bf16", "plain")
                and max(smaller.peak_bytes, smaller.n_bytes + rest + kv) <= n_available
            ):
                return f"--weights {kind} holds the weights in {size(smaller.n_bytes)} and fits"
        if held.peak_bytes <= n_available:
            return f"{size(held.n_bytes + rest)} do not depend on the context: take a smaller model"
        return "the weights do not fit: take a smaller model, or a machine with more memory"
    within = parts["states"] + demand.guesses.of_sequences(demand.n_seqs)
    if demand.budget_bytes is not None and kv + within == demand.budget_bytes:
        return f"--memory {(free + within) // 2**20}MiB for running sequences fits"
    found = []
    for name in _SMALLER:
        specs = [replace(s, types=replace(s.types, type_k=name, type_v=name)) for s in demand.specs]
        if demand.n_caches == 1 and _kv_bytes(specs, demand) <= min(free, kv - 1):
            found.append(f"-ctk {name} -ctv {name}")
            break
    most = largest_context(demand.specs, free, n_seqs=demand.n_seqs)
    if most and most < demand.n_ctx:
        found.append(f"-c {most}")
    one = _state_bytes(opened, 1) + _kv_bytes(demand.specs, replace(demand, n_seqs=1)) + demand.guesses.of_sequences(1)
    n_seqs = (free + within) // one if demand.n_seqs > 1 and one else 0
    if n_seqs:
        found.append(f"-np {n_seqs}")
    return f"{' or '.join(found)} fits" if found else "take fewer or smaller caches"
