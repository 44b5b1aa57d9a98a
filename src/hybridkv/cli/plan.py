"""`hybridkv plan`: what a model will hold in memory, per pair of cache types, from its header alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv.cli.cache_options import add_exact_arguments
from hybridkv.cli.show import MAX_CONTEXT, model_path, notice, simple_table, size, stdout_console, summary
from hybridkv.errors import NoKernelError, UsageError

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec
    from hybridkv.engine.load import Description
    from hybridkv.policy import AnyPolicy

NAME = "plan"
HELP = "print KV, state and weight bytes for cache types, and the largest context that fits"

_WEIGHT_BITS = {"f32": 32.0, "bf16": 16.0, "f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}

_DEFAULT_TYPES = "f16,q8_0,q6_0,q5_0,q4_0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv plan`."""
    parser.add_argument(
        "-m",
        "--model",
        metavar="PATH",
        help="GGUF file, model directory or config.json (default: the bundled model)",
    )
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        default=0,
        metavar="N",
        help="tokens per sequence (default: what the model was trained for)",
    )
    parser.add_argument("-np", "--parallel", type=int, default=1, metavar="N", help="sequences (default 1)")
    parser.add_argument(
        "--types",
        default=_DEFAULT_TYPES,
        metavar="T,K/V,...",
        help=f"types, or pairs K/V, or `all` (default {_DEFAULT_TYPES})",
    )
    add_exact_arguments(parser)
    parser.add_argument(
        "--kv-config", metavar="FILE", help="count types for each layer, as `hybridkv tune` writes them, too"
    )
    parser.add_argument("--memory", metavar="SIZE", help="a budget such as 24GiB: prints the largest context that fits")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *_WEIGHT_BITS),
        help="of the loaded weights, all alike; auto: bf16 with a GPU and f32 without; on the CPU, `run` holds "
        "what is q8_0 or q4_0 in a file as such, and --weights int4 keeps embedding and head at q8_0 (default auto)",
    )
    parser.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="count what each of N ranks holds of a model that Transformers cuts (default 1: not cut)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(arguments: argparse.Namespace) -> int:
    """Describe, count, print."""
    import torch

    from hybridkv.cache import KVTypes
    from hybridkv.engine.load import bundled_model, describe
    from hybridkv.hf.ranks import cuts_heads
    from hybridkv.plan import parse_bytes, unknown_states
    from hybridkv.policy import Policy, read_config

    a = arguments
    if a.dtype == "auto":
        a.dtype = "bf16" if torch.cuda.is_available() else "f32"
    for option, value, least in (("-c", a.ctx_size, 0), ("-np", a.parallel, 1), ("--tp", a.tp, 1)):
        if not least <= value <= MAX_CONTEXT:
            raise UsageError(f"{option} {value}; allowed: {least} to {MAX_CONTEXT}")
    if a.tp > 1 and a.dtype not in ("f32", "bf16", "f16"):
        raise UsageError(
            f"--tp {a.tp} with --dtype {a.dtype}; allowed: f32, bf16, f16", hint="ranks hold plain weights"
        )
    pairs = _pairs(a.types)
    budget = None if a.memory is None else parse_bytes(a.memory)
    description = describe(bundled_model() if a.model is None else model_path(a.model), n_ranks=a.tp)
    n_ctx = a.ctx_size or description.n_ctx_train
    if not n_ctx:
        raise UsageError("this model does not say what context it was trained for", hint="give -c N")
    exact = {"tail": a.kv_tail or 0, "sink": a.kv_sink or 0, "center": a.kv_center}
    policies: list[AnyPolicy] = [Policy(KVTypes(k, v, **exact)) for k, v in pairs]
    if a.kv_config is not None:
        policies.append(read_config(Path(a.kv_config)))
    rows = _rows(description, policies, n_ctx, a.parallel, a.dtype, budget)
    for line in _notices(description, policies, n_ctx) if a.kv_tail or a.kv_sink or a.kv_center or a.kv_config else ():
        notice(line)
    for reason in dict.fromkeys(row["refused"] for row in rows if row["refused"]):
        notice(f"left out, no kernel: {reason}")
    if a.tp > 1 and not cuts_heads(description.config):
        notice(f"the plan for {description.config.model_type!r} gathers the KV heads: each rank holds all of them")
    if unknown_states(description.facts):
        notice(f"the state shapes of {description.config.model_type!r} are not known: states are not counted")
    if a.json:
        counted = {"model": description.name, "n_ctx": n_ctx, "n_seqs": a.parallel, "n_ranks": a.tp, "plans": rows}
        print(json.dumps(counted))
    else:
        _print(description, rows, n_ctx, a.parallel, a.dtype, a.memory)
    return 0


def _pairs(text: str) -> list[tuple[str, str]]:
    """`q8_0,q8_0/q4_0` as pairs of K and V types; `all` as every pair.

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


def _rows(
    description: Description,
    policies: Sequence[AnyPolicy],
    n_ctx: int,
    n_seqs: int,
    dtype_name: str,
    budget: int | None,
) -> list[dict[str, Any]]:
    """One object per pair of types or file, bytes as integers."""
    from hybridkv.hf import kv_facts
    from hybridkv.plan import largest_context, plan
    from hybridkv.policy import KVConfig

    bits = _WEIGHT_BITS[dtype_name]
    weight_bytes = description.weight_bytes(bits)
    rows = []
    for policy in policies:
        specs = policy.resolve(kv_facts(description.facts))
        counted = plan(
            specs,
            description.facts,
            n_ctx=n_ctx,
            n_seqs=n_seqs,
            conv_itemsize=2 if bits == 16 else 4,
            weight_bytes=weight_bytes,
        )
        row: dict[str, Any] = {
            "type_k": policy.types.type_k,
            "type_v": policy.types.type_v,
            "config": policy.name if isinstance(policy, KVConfig) else None,
            "refused": _refusal(specs),
            "bytes_per_token": sum(spec.bytes_per_token for spec in specs),
            "kv_bytes": counted.kv_bytes,
            "state_bytes": counted.state_bytes,
            "weight_bytes": counted.weight_bytes,
            "total_bytes": counted.total_bytes,
        }
        if budget is not None:
            free = budget - counted.weight_bytes - counted.state_bytes
            row["fits"] = counted.total_bytes <= budget
            row["largest_n_ctx"] = largest_context(specs, free, n_seqs=n_seqs) if free >= 0 else 0
        rows.append(row)
    return rows


def _notices(description: Description, policies: Sequence[AnyPolicy], n_ctx: int) -> list[str]:
    """What has no effect; of an unquantized pair among others it goes without saying."""
    from hybridkv.hf import kv_facts

    resolved = [(policy, policy.resolve(kv_facts(description.facts))) for policy in policies]
    quantized = [pair for pair in resolved if any(spec.is_quantized for spec in pair[1])]
    return list(dict.fromkeys(line for policy, specs in quantized or resolved for line in policy.notices(specs, n_ctx)))


def _refusal(specs: Sequence[KVSpec]) -> str | None:
    """Why these types cannot run on this model; None if they can. The reference kernel's word: it takes most."""
    from hybridkv.cache import resolve
    from hybridkv.kernels import ENCODERS, KERNELS

    for spec in {(s.facts.head_dim_k, s.facts.head_dim_v): s for s in specs}.values():
        try:
            resolve(spec, "cpu", KERNELS, ENCODERS)
        except NoKernelError as error:
            return error.reasons[-1][1]  # the reference's, the last one asked: others may run on other devices
    return None


def _print(
    description: Description,
    rows: list[dict[str, Any]],
    n_ctx: int,
    n_seqs: int,
    dtype: str,
    memory: str | None,
) -> None:
    columns = ["K", "V", "bytes/token", "KV", "states", f"weights {dtype}", "total"]
    if memory is not None:
        columns.append(f"largest context in {memory}")
    table = simple_table(*columns, left=("K", "V"))
    for row in rows:
        if row["refused"]:
            continue
        names = [row["type_k"], row["type_v"]] if row["config"] is None else [row["config"], "per layer"]
        cells = [*names, str(row["bytes_per_token"])]
        cells += [size(row[key]) for key in ("kv_bytes", "state_bytes", "weight_bytes", "total_bytes")]
        if memory is not None:
            most = row["largest_n_ctx"]
            cells.append("no limit" if most is None else f"{most} tokens" if most else "does not fit")
        table.add_row(*cells)
    sequences = "1 sequence" if n_seqs == 1 else f"{n_seqs} sequences"
    part = f"; one of {description.n_ranks} ranks" if description.n_ranks > 1 else ""
    console = stdout_console()
    console.print(f"{summary(description)}; {sequences} of {n_ctx} tokens{part}")
    console.print(table)
