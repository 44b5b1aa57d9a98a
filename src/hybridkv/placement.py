"""The division of a model between a card and main memory, from sizes alone.

Arithmetic over bytes; reads no files and asks no device. The options are llama.cpp's: whole layers (`-ngl N`: the
last ones), tensors by name (`-ot REGEX=CPU`), routed experts (`--cpu-moe`, `--n-cpu-moe N`: those of the first layers).
`fit` chooses without them. Does not own what runs such a split (`hybridkv.native.cuda`), or which splits run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from hybridkv.errors import UsageError

Group = Literal["embedding", "attention", "recurrent", "feed-forward", "shared experts", "routed experts", "head"]
GROUPS: Final[tuple[Group, ...]] = (
    "embedding",
    "attention",
    "recurrent",
    "feed-forward",
    "shared experts",
    "routed experts",
    "head",
)

BESIDE_BYTES: Final = 400 << 20
"""What a step takes on a card beside weights, KV and states: windows of decoded weights, activations, recordings."""

SPLIT_BYTES: Final = 256 << 20
"""What it takes more where experts of a prompt are sent to a card: a window of theirs, and what converts it."""

EXPERTS_PATTERN: Final = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""llama.cpp's, of what `--cpu-moe` keeps in main memory."""


@dataclass(frozen=True, slots=True)
class Portion:
    """A tensor to be placed.

    Attributes
    ----------
    layer
        None for what belongs to no layer.
    card_bytes, host_bytes
        What it takes in the layout of the card's kernels, and in main memory.
    """

    name: str
    layer: int | None
    group: Group
    card_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Needs:
    """All that a run holds.

    Attributes
    ----------
    portions
        The weights.
    kv_bytes, state_bytes
        Of each layer, at the full context.
    beside_bytes
        What else is taken on the card.
    tied
        Whether the embedding is the head too, so that every token reads all of it.
    """

    portions: Sequence[Portion]
    kv_bytes: Sequence[int]
    state_bytes: Sequence[int]
    beside_bytes: int = BESIDE_BYTES
    tied: bool = False

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self.kv_bytes)

    @property
    def has_no_experts(self) -> bool:
        """Whether no tensor is of routed experts."""
        return all(portion.group != "routed experts" for portion in self.portions)


@dataclass(frozen=True, slots=True)
class PlacementLine:
    """A line of the table: a group, in how many layers it lies where, and bytes."""

    name: str
    card_bytes: int
    host_bytes: int
    card_layers: int = 0
    host_layers: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of every part of a model.

    Attributes
    ----------
    on_card
        Of each portion.
    layers
        Of each layer, whether its KV rows and states lie on the card.
    """

    needs: Needs
    on_card: tuple[bool, ...]
    layers: tuple[bool, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing lies in main memory."""
        return all(self.on_card) and all(self.layers)

    @property
    def card_bytes(self) -> int:
        """Bytes on the card."""
        return sum(line.card_bytes for line in self.lines())

    @property
    def host_bytes(self) -> int:
        """Bytes in main memory."""
        return sum(line.host_bytes for line in self.lines())

    @property
    def n_cpu_moe(self) -> int:
        """Layers any of whose routed experts lie in main memory."""
        return len({p.layer for p, on in self._placed() if p.group == "routed experts" and not on})

    def _placed(self) -> list[tuple[Portion, bool]]:
        return list(zip(self.needs.portions, self.on_card, strict=True))

    def lines(self) -> list[PlacementLine]:
        """Return the table: groups that the model has, KV rows, states, and what is taken beside them."""
        found = []
        for group in GROUPS:
            mine = [(p, on) for p, on in self._placed() if p.group == group]
            if mine:
                moved = {p.layer for p, on in mine if not on}
                stays = {p.layer for p, _ in mine} - moved
                on_card = sum(p.card_bytes for p, on in mine if on)
                on_host = sum(p.host_bytes for p, on in mine if not on)
                found.append(PlacementLine(group, on_card, on_host, len(stays - {None}), len(moved - {None})))
        for name, each in (("KV", self.needs.kv_bytes), ("states", self.needs.state_bytes)):
            card, host = (
                [n for n, on in zip(each, self.layers, strict=True) if on is place] for place in (True, False)
            )
            found.append(PlacementLine(name, sum(card), sum(host), sum(map(bool, card)), sum(map(bool, host))))
        beside = self.needs.beside_bytes + (SPLIT_BYTES if self.n_cpu_moe else 0) if any(self.on_card) else 0
        found.append(PlacementLine("beside them", beside, 0))
        return [line for line in found if line.card_bytes or line.host_bytes or line is found[-1]]


@dataclass(frozen=True, slots=True)
class Override:
    """Tensors whose name a pattern finds, and where they are to lie."""

    pattern: re.Pattern[str]
    on_card: bool


def parse_overrides(text: str, option: str = "-ot") -> tuple[Override, ...]:
    r"""Read `REGEX=CPU,REGEX=CUDA0`; the first pattern that finds a name decides.

    Raises
    ------
    UsageError
        For a part without a place, a place that is not there, or a pattern that is none.
    """
    found = []
    for part in text.split(","):
        pattern, equals, place = part.rpartition("=")
        if not equals or not pattern or place.upper() not in ("CPU", "CUDA0"):
            raise UsageError(
                f"{option} {part!r}; allowed: REGEX=CPU or REGEX=CUDA0, several separated by commas",
                hint=f"for example {option} 'ffn_.*_exps=CPU'",
            )
        try:
            found.append(Override(re.compile(pattern), place.upper() == "CUDA0"))
        except re.error as error:
            raise UsageError(
                f"{option} {part!r}: {error}; allowed: a regular expression", hint="write \\. for a point"
            ) from error
    return tuple(found)


def parse_gpu_layers(text: str, n_layers: int, option: str = "-ngl") -> int:
    """Read how many layers lie on the card, the head counted as one: a number, or `all` or `auto`.

    Raises
    ------
    UsageError
        If it is none of these.
    """
    if text in ("all", "auto", "-1"):
        return n_layers + 1
    if not text.isdecimal():
        raise UsageError(
            f"{option} {text!r}; allowed: 0 or more layers, all, auto",
            hint=f"this model has {n_layers}, and its head is one more",
        )
    return min(int(text), n_layers + 1)


def expert_overrides(n_layers: int) -> tuple[Override, ...]:
    """Keep the routed experts of the first layers in main memory, as `--n-cpu-moe N` does."""
    return tuple(Override(re.compile(rf"blk\.{i}{EXPERTS_PATTERN}"), False) for i in range(n_layers))


def place(needs: Needs, n_gpu_layers: int | None = None, overrides: Sequence[Override] = ()) -> Placement:
    """Place by options: the last layers on the card, and tensors by name before that.

    Parameters
    ----------
    n_gpu_layers
        Layers on the card, the head being one; None for all.
    """
    most = needs.n_layers + 1
    first = most - (most if n_gpu_layers is None else min(n_gpu_layers, most))
    layers = tuple(i >= first for i in range(needs.n_layers))

    def on_card(portion: Portion) -> bool:
        found = next((o for o in overrides if o.pattern.search(portion.name)), None)
        if found is not None:
            return found.on_card
        if portion.layer is not None:
            return layers[portion.layer]
        return first <= needs.n_layers if portion.group == "head" or needs.tied else first == 0

    return Placement(needs, tuple(map(on_card, needs.portions)), layers)


def fit(needs: Needs, free_bytes: int) -> Placement | None:
    """Place as much on a card as its free memory holds; None if it does not hold what belongs there.

    All of it if that fits. Else attention, recurrent layers, shared experts, KV and states lie there first, with the
    head. An embedding that is no head goes to main memory, where a token reads a row of it. The routed experts of the
    last layers stay, as many as fit.
    """
    everything = place(needs)
    if everything.card_bytes <= free_bytes:
        return everything
    kept = least(needs).on_card
    experts: dict[int, int] = {}
    for portion in needs.portions:
        if portion.group == "routed experts" and portion.layer is not None:
            experts[portion.layer] = experts.get(portion.layer, 0) + portion.card_bytes
    taken = least(needs).card_bytes
    if taken > free_bytes:
        return None
    last: set[int | None] = set()
    for layer in sorted(experts, reverse=True):
        taken += experts[layer]
        if taken > free_bytes:
            break
        last.add(layer)
    on_card = [
        on or (p.group == "routed experts" and p.layer in last) for p, on in zip(needs.portions, kept, strict=True)
    ]
    return Placement(needs, tuple(on_card), everything.layers)


def least(needs: Needs) -> Placement:
    """Keep in main memory what can lie there: routed experts, and an embedding that is no head."""
    moved = {"routed experts"} if needs.tied else {"routed experts", "embedding"}
    return Placement(needs, tuple(p.group not in moved for p in needs.portions), (True,) * needs.n_layers)


def whole_experts(placement: Placement) -> Placement:
    """Move all routed experts of a layer to main memory where a part of them lies there: they are computed there."""
    portions = placement.needs.portions
    placed = list(zip(portions, placement.on_card, strict=True))
    moved = {p.layer for p, on in placed if p.group == "routed experts" and not on}
    on_card = tuple(on and not (p.group == "routed experts" and p.layer in moved) for p, on in placed)
    return replace(placement, on_card=on_card)


def group_of(name: str, has_kv: bool) -> Group:
    """Return the group of a tensor by its name in a GGUF file.

    Parameters
    ----------
    has_kv
        Whether its layer has KV rows.
    """
    if not name.startswith("blk."):
        return "embedding" if name.startswith("token_embd") else "head"
    own = name.split(".", 2)[2]
    if re.search(EXPERTS_PATTERN, name):
        return "routed experts"
    if re.match(r"ffn_(gate_inp|.*_shexp)", own):
        return "shared experts"
    if own.startswith("ffn_"):
        return "feed-forward"
    return "attention" if has_kv else "recurrent"
