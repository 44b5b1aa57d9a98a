"""`hybridkv plan`: what a model will hold in memory, per pair of cache types, from its header alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from hybridkv.cli import run
from hybridkv.cli.cache_options import add_cache_arguments, given_options, given_types, policy_from
from hybridkv.cli.collector import import_torch
from hybridkv.cli.context import context_of, reach_of
from hybridkv.cli.devices import device_name
from hybridkv.cli.guess_memory import guesses_of
from hybridkv.cli.llama_cpp import accepted_options
from hybridkv.cli.model_options import DEFAULT_CTX
from hybridkv.cli.model_source import add_source_arguments, model_of
from hybridkv.cli.plan_lines import PlannedWeights, Question, plan_lines, print_plan
from hybridkv.cli.rope_options import add_rope_arguments, changes_of
from hybridkv.cli.show import (
    MAX_CONTEXT,
    expanded_words,
    notice,
)
from hybridkv.cli.spec_options import add_spec_arguments, check_spec
from hybridkv.cli.split_options import add_split_arguments, split_from, split_on
from hybridkv.errors import UsageError, one_of
from hybridkv.options import EXACT, kv_option

if TYPE_CHECKING:
    from hybridkv.engine.describe import Description
    from hybridkv.held import WeightKind
    from hybridkv.native.choice import BackendKind
    from hybridkv.policy import AnyPolicy

NAME = "plan"
HELP = "print KV, state and weight bytes for cache types, and the largest context that fits"

_KINDS: dict[str, WeightKind] = {"auto": "auto", "f32": "f32", "bf16": "bf16", "q8_0": "int8", "q4_0": "int4"}
"""Values of `--dtype`, in the words of `run --weights`."""

_DEFAULT_TYPES = "f16,q8_0,q6_0,q5_0,q4_0"

_IDLE = "idle_"
"""Destinations of options of `run` that change nothing here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv plan`, and those of `run`, so that its command line can be planned as it stands."""
    add_source_arguments(parser)
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        default=0,
        metavar="N",
        help="tokens per sequence (default: the trained length)",
    )
    parser.add_argument("-np", "--parallel", type=int, default=1, metavar="N", help="sequences (default 1)")
    parser.add_argument(
        "--types",
        metavar="T,K/V,...",
        help=f"types, pairs K/V, or `all` (default {_DEFAULT_TYPES}, or the types of -ctk and -ctv)",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="budget such as 24GiB: also print the largest context that fits"
    )
    parser.add_argument(
        "-dev",
        "--device",
        type=device_name,
        default="auto",
        metavar="DEVICE",
        help="auto, cpu or cuda; the device need not exist here (default auto)",
    )
    parser.add_argument(
        "--weights", metavar="auto|plain|f32|bf16|int8|int4", help="weight storage, as in `run` (default auto)"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(_KINDS),
        help="another name of --weights: q8_0 is int8, q4_0 is int4",
    )
    parser.add_argument(
        "--backend",
        "--engine",
        dest="backend",
        default="auto",
        metavar="auto|native|eager",
        help="as in `run`; eager stores plain weights",
    )
    parser.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="show memory per rank for N-way tensor parallelism (default 1)",
    )
    add_split_arguments(parser)
    add_spec_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_cache_arguments(parser)
    add_rope_arguments(parser)
    _accept_options_of_run(parser)


def _accept_options_of_run(parser: argparse.ArgumentParser) -> None:
    """Accept what else `run` takes; none of it is in the help, and `main` says what had no effect."""
    other = argparse.ArgumentParser(add_help=False)
    run.add_arguments(other)
    for action in other._actions:
        names = [name for name in action.option_strings if name not in parser._option_string_actions]
        if not names:
            continue
        parser.add_argument(
            *names, action=_NoEffect, nargs=action.nargs, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


class _NoEffect(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        del parser, values
        setattr(namespace, f"{_IDLE}{option_string}", True)  # as it was typed


def main(arguments: argparse.Namespace) -> int:
    """Describe, count, print."""
    a = arguments
    kind, device = _check(a)
    import_torch()
    from hybridkv.engine.describe import describe
    from hybridkv.engine.placed import free_on_card
    from hybridkv.model.ranks import shards_heads
    from hybridkv.planner import parse_bytes, unknown_states
    from hybridkv.policy import Guard, parse_mode

    budget = None if a.memory is None else parse_bytes(a.memory)
    guard = Guard(mode=parse_mode(a.kv_guard))
    policies = _policies(a)
    changes = changes_of(a)
    description = describe(
        model_of(a),
        remote_code="trusted" if hasattr(a, f"{_IDLE}--trust-remote-code") else "refused",
        n_ranks=a.tp,
        changes=changes,
    )
    trained = description.n_ctx_train
    reach = None if trained is None else reach_of(trained, changes.rope)
    n_ctx = a.ctx_size or reach
    if not n_ctx:
        raise UsageError("this model does not say what context it was trained for", hint="give -c N")
    if a.ctx_size and reach is not None and a.ctx_size > reach:
        context_of(a.ctx_size, trained, DEFAULT_CTX, changes.rope)  # says so
    if not a.ctx_size and n_ctx > DEFAULT_CTX and any(name.startswith(_IDLE) for name in vars(a)):
        of = "of training" if n_ctx == trained else "that RoPE is scaled for"
        notice(f"counted for the {n_ctx} tokens {of}; `run` without -c takes {DEFAULT_CTX}")
    weights = _held(description, kind, device, a.backend)
    guesses = guesses_of(a, description, device=device, backend=weights.backend, n_ctx=n_ctx)
    split = split_on(split_from(a), description, device, kind, cast("BackendKind", a.backend))
    free = None if split is None else budget if budget is not None else free_on_card(device, split.device_memory)
    question = Question(description, guard, n_ctx, a.parallel, weights, budget, split, free, guesses=guesses)
    lines = plan_lines(question, policies)
    if _says_types(a) or any(given_options(a, EXACT).values()) or a.kv_config:
        for line in _notices(description, policies, n_ctx):
            notice(line)
    for reason in dict.fromkeys(line["refused"] for line in lines if line["refused"]):
        notice(f"left out, no kernel: {reason}")
    if a.tp > 1 and not shards_heads(description.config):
        notice(f"the plan for {description.config.model_type!r} replicates the KV heads: each rank holds all of them")
    if unknown_states(description.facts):
        notice(f"the state shapes of {description.config.model_type!r} are not known: states are not counted")
    if a.json:
        counted = {"model": description.name, "n_ctx": n_ctx, "n_seqs": a.parallel, "n_ranks": a.tp}
        print(
            json.dumps(
                {
                    **counted,
                    "device": device,
                    "weights": weights.held.parts,
                    "guess_bytes": guesses.total(a.parallel),
                    "plans": lines,
                    **_expanded(weights),
                }
            )
        )
    else:
        print_plan(question, lines, device, a.memory)
    return 0


def _expanded(weights: PlannedWeights) -> dict[str, Any]:
    """Return the JSON entries on tensors that do not stay packed."""
    return {} if weights.expanded is None else {"expanded": asdict(weights.expanded)}


def _says_types(a: argparse.Namespace) -> bool:
    """Check whether `run`'s options set the stored types, so that these are planned."""
    return given_types(a) or a.kv_scale is not None


def _policies(a: argparse.Namespace) -> list[AnyPolicy]:
    """List what is planned: what `run`'s options say, the types of --types, a file."""
    from hybridkv.cache import KVTypes
    from hybridkv.policy import Policy, read_config

    policies: list[AnyPolicy] = []
    if _says_types(a):
        policies.append(policy_from(a))  # refuses them together with a file
    if not policies or a.types is not None:
        exact = given_options(a, EXACT)
        policies += [Policy(KVTypes(k, v, **exact)) for k, v in _pairs(_DEFAULT_TYPES if a.types is None else a.types)]
    if a.kv_config is not None:
        policies.append(read_config(Path(a.kv_config)))
    return policies


def _check(a: argparse.Namespace) -> tuple[WeightKind, str]:
    """Refuse what is out of range, say what changes nothing; how weights are asked to be held, and on which device."""
    check_spec(a)
    for option, value, least in (("-c", a.ctx_size, 0), ("-np", a.parallel, 1), ("--tp", a.tp, 1)):
        if not least <= value <= MAX_CONTEXT:
            raise UsageError(f"{option} {value}; allowed: {least} to {MAX_CONTEXT}")
    if a.dtype is not None and a.weights is not None and _KINDS[a.dtype] != a.weights:
        raise UsageError(f"--dtype {a.dtype} and --weights {a.weights} were given together", hint="one of them will do")
    if a.tp > 1 and (a.dtype in ("q8_0", "q4_0") or a.weights in ("int8", "int4")):
        raise UsageError(
            f"--tp {a.tp} with weights of {a.dtype or a.weights}; allowed: f32, bf16", hint="ranks hold plain weights"
        )
    idle = [name.removeprefix(_IDLE) for name in vars(a) if name.startswith(_IDLE)]
    idle += accepted_options(a)
    idle += [kv_option(name).flag for name in given_options(a) if kv_option(name).kind == "rotation"]
    if idle := [name for name in idle if name != "--trust-remote-code"]:
        notice(f"no effect on a plan: {', '.join(idle)}")
    import torch

    from hybridkv.held import WEIGHT_KINDS

    device = a.device.partition(":")[0]
    one_of(device, ("auto", "cpu", "cuda"), "--device", hint="auto is cuda where there is one")
    one_of(a.backend, ("auto", "native", "eager"), "--backend", hint="leave --backend out for auto")
    asked = one_of(a.weights or _KINDS[a.dtype or "auto"], WEIGHT_KINDS, "--weights", hint="auto is what `run` takes")
    return asked, ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _held(description: Description, asked: WeightKind, device: str, backend: str) -> PlannedWeights:
    """Describe the weights as `run` would store them under these options."""
    import torch

    if description.n_ranks > 1:
        wide = asked == "f32" or (asked in ("auto", "plain") and device == "cpu")
        return PlannedWeights(
            description.held("plain", device, "f32" if wide else "bf16"), 4 if wide else 2, backend="eager"
        )
    from hybridkv.engine.weights import backend_for, weights_on

    chosen = backend_for(device, asked, cast("BackendKind", backend))
    kind, dtype = weights_on(device, asked, chosen, description)
    wide = dtype == torch.float32
    plain: Literal["f32", "bf16"] = "f32" if wide else "bf16"
    held = description.held(kind, device, plain, backend=chosen)
    expanded = description.expanded(asked, device, plain, chosen)
    if expanded is not None:
        notice(expanded_words(expanded, plain))
    return PlannedWeights(held, 4 if wide else 2, expanded, chosen)


def _pairs(text: str) -> list[tuple[str, str]]:
    """Parse `q8_0,q8_0/q4_0` as pairs of K and V types; `all` as every pair.

    Raises
    ------
    UsageError
        For an unknown type or an empty list.
    """
    from hybridkv.formats import FORMATS, get_format

    if text == "all":
        return [(k, v) for k in FORMATS for v in FORMATS]
    pairs = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        k, _, v = item.partition("/")
        pairs.append((get_format(k).name, get_format(v or k).name))
    if not pairs:
        raise UsageError("--types is empty; allowed: types or pairs K/V, separated by commas, or all")
    return pairs


def _notices(description: Description, policies: Sequence[AnyPolicy], n_ctx: int) -> list[str]:
    """List options without effect, but not for an unquantized pair among others."""
    from hybridkv.model.facts import kv_facts

    resolved = [(policy, policy.resolve(kv_facts(description.facts))) for policy in policies]
    quantized = [pair for pair in resolved if any(spec.is_quantized for spec in pair[1])]
    return list(dict.fromkeys(line for policy, specs in quantized or resolved for line in policy.notices(specs, n_ctx)))
