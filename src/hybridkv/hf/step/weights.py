"""Matrices of a model held packed: a tensor that the native kernels multiply, and that any other code may read.

A `PackedTensor` stands in a model where its parameter stood. `linear` and `embedding` run natively on it; whatever else
reads it reads its values, unpacked for the moment; changing it in place is an error. So Transformers' own classes run
on packed weights without being changed, and the native step finds what it needs in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from hybridkv.errors import ModelError, one_of
from hybridkv.held import EXPERTS, WEIGHT_KINDS, WeightKind
from hybridkv.kernels import cpu_native
from hybridkv.kernels.linear import PackedWeight, WeightType, exact_type, gather, linear, pack, unpack


def parse_weights(text: str) -> WeightKind:
    """Check a kind of weights.

    Raises
    ------
    UsageError
        Listing the kinds there are.
    """
    return one_of(text, WEIGHT_KINDS, "no weights", hint="auto keeps every weight as it is in the file")


_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class PackedTensor(Tensor):
    """A matrix `[n_out, n_in]` of any float dtype, held as a `PackedWeight`."""

    packed: PackedWeight

    @staticmethod
    def __new__(cls, packed: PackedWeight, dtype: torch.dtype) -> PackedTensor:
        """Shape and dtype of what is held, without its memory."""
        shape = (packed.n_out, packed.n_in)
        made: PackedTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        made.packed = packed
        return made

    def unpacked(self) -> Tensor:
        """The values, in the tensor's dtype."""
        return unpack(self.packed).to(self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Share what is held, which never changes."""
        copied: Tensor = PackedTensor(self.packed, self.dtype)
        copied = nn.Parameter(copied, requires_grad=False) if isinstance(self, nn.Parameter) else copied
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `linear` and `embedding` natively."""
        kwargs = kwargs or {}
        if func == _SET_DATA and isinstance(args[0], PackedTensor):
            _check_same_values(args[0], args[1])
        if func is Tensor.__setitem__ and isinstance(args[0], PackedTensor):
            raise ModelError(f"{_NO_WRITES}: an assignment to some of their values", hint=_WRITES_HINT)
        if func is F.linear and isinstance(args[1], PackedTensor):
            return _linear(*args, **kwargs)
        if func is F.embedding and isinstance(args[1], PackedTensor) and args[0].device.type == "cpu":
            packed = args[1]
            return gather(packed.packed, args[0].flatten()).view(*args[0].shape, -1).to(packed.dtype)
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
        _check_writes(func, args, kwargs or {})
        args, kwargs = tree_map_only(PackedTensor, PackedTensor.unpacked, (args, kwargs or {}))
        return func(*args, **kwargs)


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_NO_WRITES = "packed weights cannot be changed"
_WRITES_HINT = 'load the model with plain weights (weights="plain"), change it, and pack it afterwards'


def _check_writes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse operations in place: they would change unpacked values, which are for the moment."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if isinstance(value, PackedTensor) and argument.is_write:
            raise ModelError(f"{_NO_WRITES}: {func}", hint=_WRITES_HINT)
    if isinstance(kwargs.get("out"), PackedTensor):
        raise ModelError(f"{_NO_WRITES}: {func} with out=", hint=_WRITES_HINT)


def _check_same_values(held: PackedTensor, value: Tensor) -> None:
    """Let `data` be set to the same values in another dtype, as `model.to(dtype)` does, and to nothing else."""
    if value.shape != held.shape or not torch.equal(held.unpacked().to(value.dtype), value):
        raise ModelError(f"{_NO_WRITES}: data = a tensor of other values, {list(value.shape)}", hint=_WRITES_HINT)


def _linear(x: Tensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` for x `[..., n_in]`, computed in float32, in the dtype of x."""
    out = linear(x.reshape(-1, x.shape[-1]), weight.packed).view(*x.shape[:-1], weight.packed.n_out)
    return (out if bias is None else out + bias).to(x.dtype)


def packed_parameter(
    parameter: Tensor, kind: WeightKind, *, n_vocab: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The parameter that takes a matrix's place; vectors, stacks of experts and convolutions stay what they are.

    Parameters
    ----------
    n_vocab
        Rows of the model's embedding and head, by which `int4` knows them.
    dtype
        What it is to other code; the parameter's own if None.
    """
    if parameter.dim() != 2 or kind == "plain" or isinstance(parameter, PackedTensor):
        return parameter
    held = PackedTensor(pack(parameter.detach(), _type(parameter.detach(), kind, n_vocab)), dtype or parameter.dtype)
    return nn.Parameter(held, requires_grad=False)


def packed_of(parameter: Tensor) -> PackedWeight | None:
    """What a parameter holds packed; None if it is a plain tensor."""
    return parameter.packed if isinstance(parameter, PackedTensor) else None


def pack_model(model: Any, kind: WeightKind = "auto") -> None:
    """Pack a Transformers model's matrices in place, one after the other; tied ones stay tied.

    Raises
    ------
    ModelError
        For a model with matrices on the meta device; none has been packed then.
    """
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise ModelError(
            f"{empty} is on the meta device and has no values to pack; allowed: weights in memory",
            hint="load the model without layers on disk (device_map), or leave its weights plain",
        )
    n_vocab = vocabulary_rows(model.config)
    done: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:
                done[id(parameter)] = packed_parameter(parameter, kind, n_vocab=n_vocab)
            setattr(module, name, done[id(parameter)])
    save_unpacked(model)


def save_unpacked(model: nn.Module) -> None:
    """Have `state_dict` give plain tensors, so that `save_pretrained` writes a checkpoint that anything reads.

    All matrices are unpacked for it at once, in the model's dtype; tied ones stay one tensor.
    """
    for module in model.modules():
        if module is model or hasattr(module, "save_pretrained"):
            module.register_state_dict_post_hook(_unpack_state)  # type: ignore[no-untyped-call]


def _unpack_state(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    del local_metadata
    plain: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        value = state.get(prefix + name)
        if not isinstance(parameter, PackedTensor) or value is None or value is parameter:  # the last: keep_vars
            continue
        known = plain.get(id(parameter.packed), value)
        plain[id(parameter.packed)] = known.unpacked() if isinstance(known, PackedTensor) else known
        state[prefix + name] = plain[id(parameter.packed)]


def vocabulary_rows(config: Any) -> int:
    """Rows of the embedding and of the output head of a config's model."""
    rows: int = config.get_text_config(decoder=True).vocab_size
    return rows


def held_parts(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's weights by how they are held, named as `hybridkv.held` names them ahead."""
    parts: dict[str, int] = {}
    vectors = 0
    for parameter in model.parameters():
        if isinstance(parameter, PackedTensor):
            held, n_bytes = str(parameter.packed.type), parameter.packed.nbytes
        elif parameter.dim() < 2 or (parameter.dim() == 3 and parameter.shape[1] == 1):  # a convolution's one channel
            vectors += parameter.nbytes
            continue
        else:
            plain = _DTYPES.get(parameter.dtype, str(parameter.dtype).removeprefix("torch."))
            held, n_bytes = f"{plain} ({EXPERTS})" if parameter.dim() == 3 else plain, parameter.nbytes
        parts[held] = parts.get(held, 0) + n_bytes
    if vectors:
        name = "f32" if "f32" in parts or not parts else "f32 (vectors)"
        parts[name] = parts.get(name, 0) + vectors
    return dict(sorted(parts.items(), key=lambda part: EXPERTS not in part[0]))


def types_held(model: nn.Module) -> str:
    """The types of a model's matrices and experts, as in `f32 (experts) + q8_0`; empty if nothing is packed."""
    if not any(isinstance(parameter, PackedTensor) for parameter in model.parameters()):
        return ""
    return " + ".join(name for name in held_parts(model) if "(vectors)" not in name)


def packed_bytes(model: nn.Module, weight_type: WeightType) -> int:
    """Bytes of a model's matrices that are held as a type."""
    held = {id(p): p.packed for p in model.parameters() if isinstance(p, PackedTensor)}
    return sum(packed.nbytes for packed in held.values() if packed.type == weight_type)


def packing_rejects(device: str) -> str | None:
    """Why weights cannot be held packed on a type of device; None if they can."""
    return cpu_native.available() if device == "cpu" else f"packed weights are for the cpu, not {device}"


def _type(weight: Tensor, kind: WeightKind, n_vocab: int | None) -> WeightType:
    if kind in ("f32", "bf16"):
        return kind
    if kind == "auto" or weight.shape[1] % 32:
        return exact_type(weight)
    return "q4_0" if kind == "int4" and weight.shape[0] != n_vocab else "q8_0"
