"""Options that divide a model between a card and main memory, llama.cpp's: read, planned, and chosen for a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybridkv.cli.llama_cpp import given_values
from hybridkv.cli.show import notice, simple_table, size, stderr_console, stdout_console
from hybridkv.errors import ContextError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from hybridkv.cache import KVSpec
    from hybridkv.cli.fits import Demand
    from hybridkv.cli.model_options import Opened
    from hybridkv.engine.describe import Description
    from hybridkv.engine.placed import Split
    from hybridkv.held import WeightKind
    from hybridkv.native.choice import BackendKind
    from hybridkv.placement import Needs, Placement, PlacementLine


def add_split_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options of a model on a card."""
    parser.add_argument(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        metavar="N",
        help="on a CUDA device: layers on the card, the head being one, or all (default auto: what fits)",
    )
    parser.add_argument(
        "-ot",
        "--override-tensor",
        action="append",
        default=[],
        metavar="REGEX=CPU|CUDA0,...",
        help="where tensors lie whose name the pattern finds; the first pattern decides. Routed experts, and an "
        "embedding that is not the head, can lie in main memory",
    )
    parser.add_argument("-cmoe", "--cpu-moe", action="store_true", help="keep routed experts in main memory")
    parser.add_argument(
        "-ncmoe", "--n-cpu-moe", type=int, metavar="N", help="keep those of the first N layers in main memory"
    )
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="limit of a CUDA device's memory, such as 8GiB, CUDA's own part included (default: what is free)",
    )


def split_from(a: argparse.Namespace) -> Split:
    """Read the options.

    Raises
    ------
    UsageError
        For values that are out of range.
    """
    from hybridkv.engine.placed import Split
    from hybridkv.planner import parse_bytes

    cap = None if getattr(a, "device_memory", None) is None else parse_bytes(a.device_memory, "--device-memory")
    found = Split(
        getattr(a, "gpu_layers", None),
        tuple(getattr(a, "override_tensor", ())),
        bool(getattr(a, "cpu_moe", False)),
        getattr(a, "n_cpu_moe", None),
        cap,
    )
    found.check()
    return found


def split_on(
    split: Split, description: Description, device: str, kind: WeightKind, backend: BackendKind
) -> Split | None:
    """Return what is to be divided; None for another device, or for weights that do not stay packed.

    Parameters
    ----------
    kind, backend
        How weights are to be held, and what is to run them.

    Raises
    ------
    UsageError
        If a division is asked for of a model that is not divided.
    """
    given = (*split.given, *(("--device-memory",) if split.device_memory is not None else ()))
    if device != "cuda":
        if given:
            notice(f"{', '.join(given)}: no effect on {device}")
        return None
    reason = description.rejects_packed("cuda", kind, backend)
    if kind in ("int8", "int4"):
        reason = f"weights that --weights {kind} converts are all on the card"
    if reason is None:
        return split
    if given and _divides(split, len(description.facts)):
        raise UsageError(f"{', '.join(given)}: {reason}; allowed: models whose weights stay packed on the card")
    return None


def _divides(split: Split, n_layers: int) -> bool:
    """Check whether options ask for anything but all of a model on the card."""
    from hybridkv.placement import parse_gpu_layers

    whole = split.n_gpu_layers is None or parse_gpu_layers(split.n_gpu_layers, n_layers) > n_layers
    moves = any(not override.on_card for override in split.check())
    return not whole or moves or split.cpu_moe or bool(split.n_cpu_moe) or split.device_memory is not None


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
        places = {
            line.name: {"card_bytes": line.card_bytes, "host_bytes": line.host_bytes, "host_layers": line.host_layers}
            for line in self.placement.lines()
        }
        return {
            "free_bytes": self.free_bytes,
            "card_bytes": self.placement.card_bytes,
            "host_bytes": self.placement.host_bytes,
            "n_cpu_moe": self.placement.n_cpu_moe,
            "parts": places,
        }


def placed(
    split: Split, description: Description, specs: Sequence[KVSpec], n_ctx: int, n_seqs: int, free_bytes: int | None
) -> Placed | None:
    """Place a model with these cache types; None if nothing is asked and no card is known."""
    from hybridkv.engine.placed import checked, needs_of

    if not split.given and free_bytes is None:
        return None
    needs = needs_of(description, specs, n_ctx=n_ctx, n_seqs=n_seqs)
    found = split.placed(needs, free_bytes)
    if found is not None:
        found = checked(found, needs, None, split)
    return Placed(needs, found, free_bytes, _types(specs), split.given)


def _types(specs: Sequence[KVSpec]) -> str:
    return ", ".join(dict.fromkeys(spec.types.label for spec in specs))


def print_placed(found: Placed, console: Console | None = None) -> None:
    """Print the table of a placement, or what is missing; on stdout by default."""
    from hybridkv.placement import least

    console = stdout_console() if console is None else console
    free = "" if found.free_bytes is None else f", {size(found.free_bytes)} free"
    if found.placement is None:
        needed = least(found.needs).card_bytes
        console.print(f"on the card with KV {found.types}{free}: does not fit; {size(needed)} beside routed experts")
        return
    p = found.placement
    over = found.free_bytes is not None and p.card_bytes > found.free_bytes
    part = f"as {', '.join(found.asked)} say" if found.asked else f"as with --n-cpu-moe {p.n_cpu_moe}"
    how = "all of it" if p.whole else part
    console.print(f"on the card with KV {found.types}{free}: {'does not fit: ' if over else ''}{how}")
    table = simple_table("part", "on the card", "layers", "in main memory", "layers there", left=("part",))
    for line in p.lines():
        cells = [(size(n), str(layers or "-")) if n else ("-", "-") for n, layers in _halves(line)]
        table.add_row(line.name, *cells[0], *cells[1])
    table.add_row("total", size(p.card_bytes), "", size(p.host_bytes), "")
    console.print(table)


def _halves(line: PlacementLine) -> tuple[tuple[int, int], tuple[int, int]]:
    return (line.card_bytes, line.card_layers), (line.host_bytes, line.host_layers)


def place_run(opened: Opened, demand: Demand) -> Opened:
    """Choose what lies on the card for a run; print the table if something does not.

    Raises
    ------
    UsageError, ContextError
        For a split that does not run, or does not fit.
    """
    from hybridkv.engine.placed import free_on_card, hosted_names, place_on_card

    split = opened.split
    if split is None:
        return opened
    free = free_on_card(opened.device, split.device_memory)
    kv = sum(spec.bytes_at(demand.n_ctx, demand.n_seqs) for spec in demand.specs)
    found = place_on_card(
        opened.description,
        demand.specs,
        split,
        opened.device,
        n_ctx=demand.n_ctx,
        n_seqs=demand.n_seqs,
        n_caches=demand.n_caches,
        more=sum(demand.more.values()) - max(0, kv - (kv if demand.budget_bytes is None else demand.budget_bytes)),
    )
    if found.needs.has_no_experts and (split.cpu_moe or split.n_cpu_moe):
        notice(f"{', '.join(split.given)}: no effect, this model has no routed experts")
    if found.whole:
        return opened
    print_placed(Placed(found.needs, found, free, _types(demand.specs), split.given), stderr_console())
    _check_host(opened, found)
    return replace(opened, hosted=hosted_names(found))


def _check_host(opened: Opened, found: Placement) -> None:
    """Refuse what main memory does not hold: what stays there is read again and again."""
    from hybridkv.memory import Available, available_memory

    limit = opened.memory_limit
    available = available_memory() if limit is None else Available(limit, f"allowed by {opened.limit_option}")
    if available is None or found.host_bytes <= available.n_bytes:
        return
    raise ContextError(
        f"not enough memory: {size(found.host_bytes)} stay in main memory, and {size(available.n_bytes)} are "
        f"{available.source}",
        hint=f"take a smaller model, or a card that holds more; {opened.limit_option} SIZE replaces what is free",
    )


def refuse_cache_in_memory(a: argparse.Namespace, device_type: str) -> None:
    """Refuse `--no-kv-offload` on a CUDA device.

    Raises
    ------
    UsageError
        With the reason.
    """
    if device_type != "cuda":
        return
    for _, option, _ in given_values(a, ("-kvo",)):
        if option in ("-nkvo", "--no-kv-offload"):
            raise UsageError(
                f"{option} on cuda: KV rows lie where their layer does; allowed: on the card",
                hint="-ctk q4_0 -ctv q4_0 takes a quarter of f16, and --device cpu keeps all in main memory",
            )
