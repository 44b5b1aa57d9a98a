"""llama.cpp's options that divide a model between a card and main memory: `plan` prints the split, `run` refuses it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridkv.cli.llama_cpp import given_values
from hybridkv.cli.show import notice, simple_table, size, stdout_console
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec
    from hybridkv.engine.describe import Description
    from hybridkv.held import WeightKind
    from hybridkv.native.choice import EngineKind
    from hybridkv.placement import Needs, Override, Placement

_NOT_RUN = "a split between card and main memory is planned, not run"


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to the parser of `plan`."""
    parser.add_argument(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        metavar="N",
        help="on a CUDA device: layers on the card, the last ones and the head, or all (default: what fits)",
    )
    parser.add_argument(
        "-ot",
        "--override-tensor",
        action="append",
        default=[],
        metavar="REGEX=CPU|CUDA0,...",
        help="where tensors lie whose name the pattern finds; the first pattern decides",
    )
    parser.add_argument("-cmoe", "--cpu-moe", action="store_true", help="keep routed experts in main memory")
    parser.add_argument(
        "-ncmoe", "--n-cpu-moe", type=int, metavar="N", help="keep those of the first N layers in main memory"
    )


@dataclass(frozen=True, slots=True)
class Split:
    """What the options of `plan` ask for.

    Attributes
    ----------
    given
        Their names; none if the planner is to choose.
    """

    given: tuple[str, ...]
    n_gpu_layers: str | None
    patterns: tuple[Override, ...]
    n_cpu_moe: int | None

    def placed(self, needs: Needs, free_bytes: int | None) -> Placement | None:
        """Place a model; None if it does not fit, or nobody says what there is to fit in."""
        from hybridkv.placement import expert_overrides, fit, parse_gpu_layers, place

        if not self.given:
            return None if free_bytes is None else fit(needs, free_bytes)
        n = None if self.n_gpu_layers is None else parse_gpu_layers(self.n_gpu_layers, needs.n_layers)
        experts = expert_overrides(needs.n_layers if self.n_cpu_moe is None else min(self.n_cpu_moe, needs.n_layers))
        return place(needs, n, (*self.patterns, *experts))


def split_of(
    a: argparse.Namespace, description: Description, device: str, kind: WeightKind, engine: EngineKind
) -> Split | None:
    """Read the options; None if a plan has no split: for another device, or weights that do not stay packed.

    Parameters
    ----------
    kind, engine
        How weights are to be held, and what is to run them.

    Raises
    ------
    UsageError
        For values that are out of range, or a model that is not divided.
    """
    from hybridkv.placement import parse_overrides

    asked = {"-ngl": a.gpu_layers, "-ot": a.override_tensor, "-cmoe": a.cpu_moe, "-ncmoe": a.n_cpu_moe}
    given = tuple(name for name, value in asked.items() if value not in (None, [], False))
    if a.n_cpu_moe is not None and a.n_cpu_moe < 0:
        raise UsageError(f"-ncmoe {a.n_cpu_moe}; allowed: 0 or more layers")
    patterns = tuple(override for text in a.override_tensor for override in parse_overrides(text))
    if device != "cuda":
        if given:
            notice(f"no effect on a plan for {device}: {', '.join(given)}")
        return None
    reason = description.rejects_packed("cuda", kind, engine)
    if reason is not None and given:
        raise UsageError(f"{', '.join(given)}: {reason}; allowed: models whose weights stay packed on the card")
    if reason is not None:
        return None
    n_cpu_moe = None if a.cpu_moe else a.n_cpu_moe or 0
    return Split(given, a.gpu_layers, patterns, n_cpu_moe)


def free_on_card(budget: int | None) -> int | None:
    """Count the bytes that a plan may use: those of --memory, or those free on the card; None if there is none."""
    import torch

    if budget is not None or not torch.cuda.is_available():
        return budget
    return int(torch.cuda.mem_get_info()[0])


@dataclass(frozen=True, slots=True)
class Placed:
    """A placement with what it was made for; `placement` is None if it does not fit."""

    needs: Needs
    placement: Placement | None
    free_bytes: int | None
    types: str
    asked: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any] | None:
        """Return what the JSON object says; None if it does not fit."""
        if self.placement is None:
            return None
        rows = {
            row.name: {"card_bytes": row.card_bytes, "host_bytes": row.host_bytes, "host_layers": row.host_layers}
            for row in self.placement.rows()
        }
        return {
            "free_bytes": self.free_bytes,
            "card_bytes": self.placement.card_bytes,
            "host_bytes": self.placement.host_bytes,
            "n_cpu_moe": self.placement.n_cpu_moe,
            "parts": rows,
        }


def placed(
    split: Split, description: Description, specs: Sequence[KVSpec], n_ctx: int, n_seqs: int, free_bytes: int | None
) -> Placed | None:
    """Place a model with these cache types; None if nothing is asked and no card is known."""
    from hybridkv.engine.placed import needs_of

    if not split.given and free_bytes is None:
        return None
    needs = needs_of(description, specs, n_ctx=n_ctx, n_seqs=n_seqs)
    types = ", ".join(dict.fromkeys(spec.types.label for spec in specs))
    return Placed(needs, split.placed(needs, free_bytes), free_bytes, types, split.given)


def print_placed(found: Placed) -> None:
    """Print the table of a placement, or what is missing."""
    from hybridkv.placement import expert_overrides, place

    console = stdout_console()
    free = "" if found.free_bytes is None else f", {size(found.free_bytes)} free"
    if found.placement is None:
        least = place(found.needs, None, expert_overrides(found.needs.n_layers)).card_bytes
        console.print(f"on the card with KV {found.types}{free}: does not fit; {size(least)} beside routed experts")
        return
    p = found.placement
    over = found.free_bytes is not None and p.card_bytes > found.free_bytes
    part = f"as {', '.join(found.asked)} say" if found.asked else f"as with --n-cpu-moe {p.n_cpu_moe}"
    how = "all of it" if p.whole else part
    console.print(f"on the card with KV {found.types}{free}: {'does not fit: ' if over else ''}{how}")
    table = simple_table("part", "on the card", "layers", "in main memory", "layers there", left=("part",))
    for row in p.rows():
        cells = [(size(n), str(layers or "-")) if n else ("-", "-") for n, layers in _halves(row)]
        table.add_row(row.name, *cells[0], *cells[1])
    table.add_row("total", size(p.card_bytes), "", size(p.host_bytes), "")
    console.print(table)
    if not p.whole:
        notice(f"{_NOT_RUN}: `hybridkv run` holds a model on one device")


def _halves(row: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (row.card_bytes, row.card_layers), (row.host_bytes, row.host_layers)


def refuse_split(a: argparse.Namespace, description: Description, device_type: str) -> None:
    """Refuse a split on a CUDA device, for commands that run a model.

    Raises
    ------
    UsageError
        If options ask for a part of the model, or for its cache, in main memory.
    """
    from hybridkv.placement import parse_gpu_layers, parse_overrides

    if device_type != "cuda":
        return
    n_layers = len(description.facts)
    for first, option, value in given_values(a, ("-ngl", "-ot", "-cmoe", "-ncmoe", "-kvo")):
        if first == "-ngl":
            divides = parse_gpu_layers(value, n_layers, option) <= n_layers
        elif first == "-ot":
            divides = any(not override.on_card for override in parse_overrides(value, option))
        elif first == "-ncmoe":
            divides = value != "0"
        else:
            divides = first == "-cmoe" or option in ("-nkvo", "--no-kv-offload")
        if not divides:
            continue
        if first == "-kvo":
            raise UsageError(
                f"{option} on cuda: KV rows lie where their layer does; allowed: on the card",
                hint="-ctk q4_0 -ctv q4_0 takes a quarter of f16, and --device cpu keeps all in main memory",
            )
        asked = " ".join(filter(None, (option, value)))
        raise UsageError(
            f"{asked} on cuda: {_NOT_RUN}; allowed: all of a model on the card, -ngl all",
            hint="`hybridkv plan` with the same options prints the split; --device cpu runs it in main memory",
        )
