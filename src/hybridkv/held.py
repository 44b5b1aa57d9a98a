"""Bytes of a model's weights as a run holds them, from what a header says of its tensors.

Arithmetic alone: `gguf/saved.py` and `hf/checkpoint.py` read headers; `plan` and the check before loading ask here.
The one place that knows what loading makes of a tensor; `hf/step/weights.py` counts what was made, and a test compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from hybridkv.errors import one_of
from hybridkv.formats.weights import WEIGHTS, get_weight_format
from hybridkv.kernels.cuda.packed_layout import PACKED, UNIT

WeightKind = Literal["auto", "plain", "f32", "bf16", "int8", "int4"]
"""`auto`: as a file has them, or the smallest float type that holds them; `plain`: Transformers' own tensors.

`int8`: q8_0, 8.5 bits. `int4`: q4_0, 4.5 bits; the embedding and the output head, one row per token of the vocabulary,
stay at q8_0, as in other programs: few of their rows are read, and an error in the head is one in the logits. Matrices
whose rows are no whole blocks of 32 are held as under `auto`.
"""

WEIGHT_KINDS: Final[tuple[WeightKind, ...]] = get_args(WeightKind)

Place = Literal["embedding", "layer", "head"]
Shape = Literal["matrix", "experts", "vector"]

EXPERTS = "experts"

ENCODED: Final[Mapping[WeightKind, str]] = {"f32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
"""The type that a kind encodes matrices in."""

Runner = Literal["native", "packed", "eager"]
"""What holds the weights: the native step takes stacks of experts too, and everything as it lies in a file; `packed` is
the same on a card, in the layouts of its kernels."""

_BLOCK = 32
_KNOWN: Final = frozenset(name.lower() for name in WEIGHTS)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of a checkpoint that becomes a weight.

    Attributes
    ----------
    type
        How it is stored, in ggml's spelling: q8_0, bf16, q4_k.
    n_stack, n_out, n_in
        A stack of `n_stack` matrices; vectors and convolutions are counted as one row.
    shape
        What it is: matrices can be held packed, the others are plain.
    place
        Where in the model.
    lies
        Whether the file has it row by row as the Transformers model does.
    """

    type: str
    n_stack: int
    n_out: int
    n_in: int
    shape: Shape
    place: Place = "layer"
    lies: bool = False

    @property
    def n_values(self) -> int:
        """Numbers in it."""
        return self.n_stack * self.n_out * self.n_in


@dataclass(frozen=True, slots=True)
class Held:
    """The bytes of weights as they are held.

    Attributes
    ----------
    parts
        Bytes by `q8_0`, `f32 (experts)` and so on, experts first; vectors are with the matrices.
    peak_bytes
        The most that is held while they are loaded.
    """

    parts: Mapping[str, int]
    peak_bytes: int

    @property
    def n_bytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Expanded:
    """The tensors that become plain values on a card, though their file has them quantized.

    Attributes
    ----------
    reason
        Why it does not stay packed.
    counts
        Tensors by type, the most frequent first.
    file_bytes, held_bytes
        What they take in the file, and on the card.
    """

    reason: str
    counts: Mapping[str, int]
    file_bytes: int
    held_bytes: int


def held_weights(
    tensors: Iterable[SavedTensor],
    kind: WeightKind,
    *,
    device: str = "cpu",
    plain: str = "f32",
    loading: Literal["by tensor", "at once"] = "by tensor",
    runner: Runner = "eager",
) -> Held:
    """Count what a run holds.

    Parameters
    ----------
    kind
        `run --weights`.
    device
        torch's device type.
    plain
        Type of what is not packed: float32 on the CPU.
    loading
        Whether each tensor is packed as it is read, or the whole model is plain first.
    runner
        What will run the model on the CPU.
    """
    order: tuple[Place, ...] = ("embedding", "layer", "head")
    parts: dict[str, int] = {}
    vectors = now = peak = n_plain = largest = 0
    for tensor in sorted(tensors, key=lambda one: order.index(one.place)):
        as_plain = tensor.n_values * _ITEMSIZE[plain]
        n_plain += as_plain
        if runner == "packed":
            held = card_bytes(tensor)
        else:
            held = _on_device(tensor, plain) if device != "cpu" else _on_cpu(tensor, kind, runner)
        for name, n_bytes in held.items():
            parts[name] = parts.get(name, 0) + n_bytes
        if not held:
            vectors += as_plain
        packed = sum(held.values()) if runner != "eager" or tensor.shape == "matrix" else 0
        now += packed or as_plain
        largest = max(largest, packed)
        made = packed and kind != "plain" and not (kind == "auto" and (runner != "eager" or tensor.lies))
        peak = max(peak, now + (as_plain if made else 0))
    if loading == "at once" and runner == "eager":
        peak = max(now, n_plain + (0 if kind == "plain" else largest))
    if vectors:  # with the matrices that are held alike, or else by themselves
        name = plain if plain in parts or not parts else f"{plain} (vectors)"
        parts[name] = parts.get(name, 0) + vectors
    ranked = sorted(parts.items(), key=lambda part: (EXPERTS not in part[0], -part[1]))
    return Held(dict(ranked), max(peak, sum(parts.values())))


_ITEMSIZE: Final[Mapping[str, int]] = {"f32": 4, "bf16": 2}


def _on_cpu(tensor: SavedTensor, kind: WeightKind, runner: Runner) -> dict[str, int]:
    """Count the bytes of a tensor by how they are held; nothing for a vector."""
    if tensor.shape == "vector" or (runner == "native" and tensor.n_out == 1 and tensor.type == "f32"):
        return {}
    if tensor.shape == "experts" and runner == "eager":
        return {f"f32 ({EXPERTS})": 4 * tensor.n_values}
    if kind == "plain":
        return {"f32": 4 * tensor.n_values}
    name = None if runner == "native" and tensor.n_out == 1 else ENCODED.get(kind)  # a single row is not encoded
    if name in ("q8_0", "q4_0"):
        name = None if tensor.n_in % _BLOCK else name if tensor.place == "layer" else "q8_0"
    if name is None:
        name = tensor.type if runner == "native" or tensor.lies else "bf16" if tensor.type == "bf16" else "f32"
    if name not in _KNOWN:  # decoded: a type that no product reads
        name = "f32"
    fmt = get_weight_format(name)
    return {fmt.name: tensor.n_stack * tensor.n_out * fmt.row_bytes(tensor.n_in)}


def card_bytes(tensor: SavedTensor) -> dict[str, int]:
    """Count a tensor in a layout of the card's kernels; nothing for a vector."""
    if tensor.shape == "vector":
        return {}
    fmt = get_weight_format(tensor.type)
    rows = tensor.n_stack * tensor.n_out
    if not fmt.is_quantized:
        return {fmt.name: rows * fmt.row_bytes(tensor.n_in)}
    return {fmt.name: rows * -(-tensor.n_in // UNIT) * sum(PACKED[fmt.name].plane_bytes)}


def encoded_tensor(tensor: SavedTensor, kind: WeightKind) -> SavedTensor:
    """Return a tensor in the type that `kind` encodes it in."""
    encoded = weight_type(kind, tensor.n_in, in_vocabulary=tensor.place != "layer")
    if encoded is None or tensor.shape == "vector" or tensor.n_out == 1:
        return tensor
    return replace(tensor, type=encoded)


def _on_device(tensor: SavedTensor, plain: str) -> dict[str, int]:
    """Count the bytes of a plain tensor on another device; nothing for a vector."""
    return {} if tensor.shape == "vector" else {plain: tensor.n_values * _ITEMSIZE[plain]}


def parse_weights(text: str) -> WeightKind:
    """Check a kind of weights.

    Raises
    ------
    UsageError
        Listing the kinds there are.
    """
    return one_of(text, WEIGHT_KINDS, "--weights", hint="auto keeps every weight as in the file")


def weight_type(kind: WeightKind, n_in: int, *, in_vocabulary: bool) -> str | None:
    """Choose the type that a matrix is encoded in; None if it stays what it is.

    Parameters
    ----------
    in_vocabulary
        Whether its rows are the vocabulary's: the embedding or the head.
    """
    name = ENCODED.get(kind)
    if name in ("q8_0", "q4_0"):
        return None if n_in % 32 else "q8_0" if in_vocabulary else name
    return name
