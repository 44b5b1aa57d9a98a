"""The placement of a GGUF model on a card and in main memory: counted from its header, chosen, and checked.

Arithmetic and its bounds are `hybridkv.placement`'s; what runs the result is `hybridkv.native.cuda`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybridkv.cache import KVSpec
from hybridkv.engine.describe import Description
from hybridkv.errors import ContextError, UsageError
from hybridkv.gguf.saved import named_tensors
from hybridkv.held import card_bytes
from hybridkv.placement import (
    BESIDE_BYTES,
    Needs,
    Override,
    Placement,
    Portion,
    expert_overrides,
    fit,
    group_of,
    least,
    parse_gpu_layers,
    parse_overrides,
    place,
    whole_experts,
)

CONTEXT_BYTES = 512 << 20
"""Bytes that CUDA itself takes of a card, its context and kernels' code; a cap on the card's memory includes them."""


@dataclass(frozen=True, slots=True)
class Split:
    """A division that is asked for, in llama.cpp's words; the default is what fits.

    Attributes
    ----------
    n_gpu_layers
        `-ngl`: a number, `all` or `auto`.
    overrides
        `-ot`: `REGEX=CPU` or `REGEX=CUDA0`, several separated by commas.
    cpu_moe, n_cpu_moe
        Routed experts in main memory, of all layers or of the first ones.
    device_memory
        Bytes of the card that may be used; None for what is free.
    """

    n_gpu_layers: str | None = None
    overrides: tuple[str, ...] = ()
    cpu_moe: bool = False
    n_cpu_moe: int | None = None
    device_memory: int | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The options that say what lies where."""
        asked = {
            "-ngl": self.n_gpu_layers not in (None, "auto", "-1"),
            "-ot": bool(self.overrides),
            "-cmoe": self.cpu_moe,
            "-ncmoe": self.n_cpu_moe is not None,
        }
        return tuple(name for name, value in asked.items() if value)

    def check(self) -> tuple[Override, ...]:
        """Read the patterns; what is out of range is an error.

        Raises
        ------
        UsageError
            Saying what is allowed.
        """
        if self.n_cpu_moe is not None and self.n_cpu_moe < 0:
            raise UsageError(f"-ncmoe {self.n_cpu_moe}; allowed: 0 or more layers")
        return tuple(override for text in self.overrides for override in parse_overrides(text))

    def placed(self, needs: Needs, free_bytes: int | None) -> Placement | None:
        """Place a model; None if it does not fit, or nobody says what there is to fit in.

        Raises
        ------
        UsageError
            For a pattern that finds nothing, or a number that is none.
        """
        patterns = self.check()
        for pattern in patterns:
            if not any(pattern.pattern.search(portion.name) for portion in needs.portions):
                matrices = sorted((p for p in needs.portions if p.layer == 0), key=lambda p: -p.card_bytes)
                raise UsageError(
                    f"-ot {pattern.pattern.pattern!r}: no tensor of this model has such a name",
                    hint=f"names are like {', '.join(p.name for p in matrices[:3])}",
                )
        if not self.given:
            return None if free_bytes is None else fit(needs, free_bytes)
        n = None if self.n_gpu_layers is None else parse_gpu_layers(self.n_gpu_layers, needs.n_layers)
        moved = needs.n_layers if self.cpu_moe else min(self.n_cpu_moe or 0, needs.n_layers)
        return place(needs, n, (*patterns, *expert_overrides(moved)))


def needs_of(
    description: Description, specs: Sequence[KVSpec], *, n_ctx: int, n_seqs: int, n_caches: int = 1, more: int = 0
) -> Needs:
    """Count what a run holds; its weights stay packed on the card.

    Parameters
    ----------
    specs
        KV layers of all caches that are alive at once.
    n_caches
        How many of these there are, with states of their own.
    more
        Bytes beside weights, KV and states.

    Raises
    ------
    ModelFileError
        For a damaged file.
    """
    assert description.header is not None
    facts = description.facts
    kv = [0] * len(facts)
    for spec in specs:
        kv[spec.facts.layer] += spec.bytes_at(n_ctx, n_seqs)
    portions = []
    for name, tensor, n_bytes in named_tensors(description.header):
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        has_kv = layer is not None and facts[layer].attention is not None
        on_card = sum(card_bytes(tensor).values()) or 4 * tensor.n_values  # vectors are float32
        portions.append(Portion(name, layer, group_of(name, has_kv), on_card, n_bytes))
    return Needs(
        portions,
        kv,
        [0 if f.state is None else n_caches * f.state.nbytes(n_seqs, 4) for f in facts],
        beside_bytes=BESIDE_BYTES + more,
        tied=all(portion.name != "output.weight" for portion in portions),
    )


def free_on_card(device: str, cap: int | None = None) -> int | None:
    """Return the bytes that a run may use on a card, within a cap on its memory; None without a card and a cap."""
    allowed = None if cap is None else max(0, cap - CONTEXT_BYTES)
    if not torch.cuda.is_available():
        return allowed
    free = int(torch.cuda.mem_get_info(torch.device(device))[0])
    return free if allowed is None else min(free, allowed)


def limit_card(device: str, cap: int) -> None:
    """Have torch refuse what goes beyond a cap on the card's memory, CUDA's own part of it included."""
    place = torch.device(device)
    index = torch.cuda.current_device() if place.index is None else place.index  # torch takes no plain `cuda` here
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, cap - CONTEXT_BYTES) / total), index)


def checked(placement: Placement | None, needs: Needs, free_bytes: int | None, split: Split) -> Placement:
    """Refuse a placement that cannot run, and have a layer's experts lie in one place.

    Raises
    ------
    UsageError
        If something lies in main memory that is not computed there.
    ContextError
        If the card does not hold what is to lie there; it says what would fit.
    """
    if placement is not None:
        placement = whole_experts(placement)
        _check_parts(placement, split)
        if free_bytes is None or placement.card_bytes <= free_bytes:
            return placement
    assert free_bytes is not None
    smallest = least(needs)
    taken = smallest if placement is None else placement
    parts = ", ".join(f"{line.name} {_gib(line.card_bytes)}" for line in taken.lines() if line.card_bytes)
    what = "the least that a run needs there" if placement is None else f"what {', '.join(split.given)} put there"
    raise ContextError(
        f"not enough memory on the card: {what} takes {_gib(taken.card_bytes)}, and {_gib(free_bytes)} are free\n"
        f"{parts}",
        hint=_hint(needs, free_bytes, smallest),
    )


def _check_parts(placement: Placement, split: Split) -> None:
    names = [
        portion.name
        for portion, on_card in zip(placement.needs.portions, placement.on_card, strict=True)
        if not on_card and portion.group != "routed experts" and (portion.group != "embedding" or placement.needs.tied)
    ]
    if not all(placement.layers):
        n = placement.layers.count(False)
        raise UsageError(
            f"-ngl {split.n_gpu_layers}: {n} whole layers would be in main memory, with their KV rows and states; "
            "allowed on a card: all layers, their routed experts in main memory",
            hint="--n-cpu-moe N keeps the experts of the first N layers there, and --device cpu everything",
        )
    if names:
        raise UsageError(
            f"{', '.join(split.given)}: {names[0]} would be in main memory"
            + (f", and {len(names) - 1} more tensors" if len(names) > 1 else "")
            + "; allowed there: routed experts, and an embedding that is not the head too",
            hint="-ot '_exps=CPU' names the experts",
        )


def _hint(needs: Needs, free_bytes: int, smallest: Placement) -> str:
    found = fit(needs, free_bytes)
    if found is not None:
        return f"--n-cpu-moe {found.n_cpu_moe} fits, and is what is chosen without these options"
    kv = sum(needs.kv_bytes)
    if kv and smallest.card_bytes - kv <= free_bytes:
        share = (free_bytes - (smallest.card_bytes - kv)) / kv
        return f"{share:.0%} of this context fits: take a smaller -c, fewer sequences, or smaller types (-ctk, -ctv)"
    return "--device cpu keeps everything in main memory"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def hosted_names(placement: Placement) -> frozenset[str]:
    """List the tensors that stay in main memory."""
    placed = zip(placement.needs.portions, placement.on_card, strict=True)
    return frozenset(portion.name for portion, on_card in placed if not on_card)


def place_on_card(
    description: Description,
    specs: Sequence[KVSpec],
    split: Split,
    device: str,
    *,
    n_ctx: int,
    n_seqs: int = 1,
    n_caches: int = 1,
    more: int = 0,
) -> Placement:
    """Choose what of a model lies on a card, and keep torch within the cap.

    Raises
    ------
    UsageError, ContextError
        As `checked` does.
    """
    needs = needs_of(description, specs, n_ctx=n_ctx, n_seqs=n_seqs, n_caches=n_caches, more=more)
    free = free_on_card(device, split.device_memory)
    found = checked(split.placed(needs, free), needs, free, split)
    if split.device_memory is not None and torch.cuda.is_available():
        limit_card(device, split.device_memory)
    return found
