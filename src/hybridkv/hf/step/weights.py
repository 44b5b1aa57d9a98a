"""Matrices of a Transformers model held as weights that the native products read: in a mapped file, or encoded.

A `PackedTensor` stands in a model where its parameter stood. `linear` and `embedding` run natively on it; whatever else
is done with it is done with its values, decoded for the moment. So Transformers' own classes run on quantized weights
without being changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from hybridkv.errors import one_of
from hybridkv.kernels import cpu_native
from hybridkv.kernels.weights import Weight, decode, encode, matmul, rows

WeightKind = Literal["auto", "plain", "f32", "bf16", "int8", "int4"]
"""`auto`: as a file has them, or the smallest float type that holds them; `plain`: Transformers' own tensors.

`int8`: q8_0, 8.5 bits. `int4`: q4_0, 4.5 bits; the embedding and the output head, one row per token of the vocabulary,
stay at q8_0, as in other engines: few of their rows are read, and an error in the head is one in the logits. Matrices
whose rows are no whole blocks of 32 are held as under `auto`.
"""

_TYPES = {"f32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
_CHUNK_VALUES = 1 << 24


def parse_weights(text: str) -> WeightKind:
    """Check a kind of weights.

    Raises
    ------
    UsageError
        Listing the kinds there are.
    """
    kinds: tuple[WeightKind, ...] = get_args(WeightKind)
    return one_of(text, kinds, "no weights", hint="auto keeps every weight as it is in the file")


def weight_type(kind: WeightKind, n_in: int, *, in_vocabulary: bool) -> str | None:
    """The type that a matrix is encoded in; None if it stays what it is.

    Parameters
    ----------
    in_vocabulary
        Whether its rows are the vocabulary's: the embedding or the head.
    """
    name = _TYPES.get(kind)
    if name in ("q8_0", "q4_0"):
        return None if n_in % 32 else "q8_0" if in_vocabulary else name
    return name


def reencoded(weight: Weight, name: str) -> Weight:
    """The same matrices in another type, a few rows at a time."""
    ids = torch.split(torch.arange(weight.n_out), max(1, _CHUNK_VALUES // weight.n_in))
    parts = [encode(rows(weight, part, expert=e), name) for e in range(weight.n_stack) for part in ids]
    data = torch.cat([part.data for part in parts], dim=1).view(weight.n_stack, weight.n_out, -1)
    return Weight(parts[0].format, data, weight.n_in)


class PackedTensor(Tensor):
    """A matrix `[n_out, n_in]` of any float dtype, held as a `Weight`."""

    packed: Weight

    @staticmethod
    def __new__(cls, packed: Weight, dtype: torch.dtype) -> PackedTensor:
        """Shape and dtype of what is held, without its memory."""
        shape = (packed.n_out, packed.n_in)
        made: PackedTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        made.packed = packed
        return made

    def unpacked(self) -> Tensor:
        """The values, in the tensor's dtype."""
        return decode(self.packed).to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `linear` and `embedding` natively."""
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], PackedTensor):
            return _linear(*args, **kwargs)
        if func is F.embedding and isinstance(args[1], PackedTensor) and args[0].device.type == "cpu":
            packed = args[1]
            return rows(packed.packed, args[0].flatten()).view(*args[0].shape, -1).to(packed.dtype)
        # Not Tensor's own, which makes every result one of this class.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do anything else with the values."""
        del types
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return PackedTensor(args[0].packed, args[0].dtype)
        args, kwargs = tree_map_only(PackedTensor, PackedTensor.unpacked, (args, kwargs or {}))
        return func(*args, **kwargs)


def _linear(x: Tensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` for x `[..., n_in]`, computed in float32, in the dtype of x."""
    out = matmul(x.reshape(-1, x.shape[-1]), weight.packed).view(*x.shape[:-1], weight.packed.n_out)
    return (out if bias is None else out + bias).to(x.dtype)


def holder(kind: WeightKind, n_vocab: int) -> Callable[[Weight, torch.dtype], Tensor]:
    """What gives the parameter that stands for a matrix of a file, held as asked.

    Parameters
    ----------
    n_vocab
        Rows of the model's embedding and head, by which `int4` knows them.
    """
    return partial(_held, kind, n_vocab)


def _held(kind: WeightKind, n_vocab: int, weight: Weight, dtype: torch.dtype) -> Tensor:
    name = weight_type(kind, weight.n_in, in_vocabulary=weight.n_out == n_vocab)
    if name is not None and name != weight.format.name:
        weight = reencoded(weight, name)
    return nn.Parameter(PackedTensor(weight, dtype), requires_grad=False)


def packed_parameter(parameter: Tensor, kind: WeightKind, *, n_vocab: int | None = None) -> Tensor:
    """The parameter that takes a matrix's place; vectors, stacks of experts and convolutions stay what they are."""
    if parameter.dim() != 2 or kind == "plain":
        return parameter
    name = weight_type(kind, parameter.shape[1], in_vocabulary=parameter.shape[0] == n_vocab)
    held = encode(parameter.detach(), _exact_type(parameter) if name is None else name)
    return nn.Parameter(PackedTensor(held, parameter.dtype), requires_grad=False)


def packed_of(parameter: Tensor) -> Weight | None:
    """What a parameter holds packed; None if it is a plain tensor."""
    return parameter.packed if isinstance(parameter, PackedTensor) else None


def pack_model(model: Any, kind: WeightKind = "auto") -> None:
    """Pack a Transformers model's matrices in place, one after the other; tied ones stay tied."""
    n_vocab = vocabulary_rows(model.config)
    done: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:
                done[id(parameter)] = packed_parameter(parameter, kind, n_vocab=n_vocab)
            setattr(module, name, done[id(parameter)])


def vocabulary_rows(config: Any) -> int:
    """Rows of the embedding and of the output head of a config's model."""
    n_rows: int = config.get_text_config(decoder=True).vocab_size
    return n_rows


def packed_types(model: nn.Module) -> tuple[str, ...]:
    """Types of a model's packed matrices; empty if there are none."""
    return tuple(dict.fromkeys(p.packed.format.name for p in model.parameters() if isinstance(p, PackedTensor)))


def packing_rejects(device: str) -> str | None:
    """Why weights cannot be held packed on a type of device; None if they can."""
    return cpu_native.available() if device == "cpu" else f"packed weights are for the cpu, not {device}"


def _exact_type(x: Tensor) -> str:
    """bf16 if it holds all values as they are, else f32."""
    held = x.dtype == torch.bfloat16 or torch.equal(x.bfloat16().float(), x.float())
    return "bf16" if held else "f32"
