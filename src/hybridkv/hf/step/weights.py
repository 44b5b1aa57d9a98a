"""Matrices of a Transformers model held as weights that native products read: in a mapped file, or encoded.

A `PackedTensor` stands in a model where its parameter stood. `linear` and `embedding` run natively on it; whatever else
reads it reads its values, unpacked for the moment; changing it in place is an error. So Transformers' own classes run
on packed weights without being changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from hybridkv.errors import ModelError
from hybridkv.held import EXPERTS, WeightKind, weight_type
from hybridkv.kernels import cpu_native
from hybridkv.kernels.weights import Weight, decode, encode, matmul, reencoded, rows
from hybridkv.model import vocab_size_of

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class PackedTensor(Tensor):
    """A matrix `[n_out, n_in]` of any float dtype, held as a `Weight`."""

    packed: Weight

    @staticmethod
    def __new__(cls, packed: Weight, dtype: torch.dtype) -> PackedTensor:
        """Create a tensor with the shape and dtype of what is held, without its memory."""
        shape = (packed.n_out, packed.n_in)
        made: PackedTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        made.packed = packed
        return made

    def unpacked(self) -> Tensor:
        """Decode the values, in the tensor's dtype."""
        return decode(self.packed).to(self.dtype)

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
    """Compute `x W^T + b` for x `[..., n_in]` in float32; the result has the dtype of x."""
    out = matmul(x.reshape(-1, x.shape[-1]), weight.packed).view(*x.shape[:-1], weight.packed.n_out)
    return (out if bias is None else out + bias).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Holder:
    """Gives the parameter that stands for a matrix, held as asked.

    Parameters
    ----------
    n_vocab
        Rows of the model's embedding and head, by which `int4` knows them.
    dtype
        What a parameter is to other code; its own if None.
    """

    kind: WeightKind
    n_vocab: int | None = None
    dtype: torch.dtype | None = None

    def of_file(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Hold a matrix that lies in a file as the model has it."""
        name = weight_type(self.kind, weight.n_in, in_vocabulary=weight.n_out == self.n_vocab)
        if name is not None and name != weight.format.name:
            weight = reencoded(weight, name)
        return nn.Parameter(PackedTensor(weight, self.dtype or dtype), requires_grad=False)

    def of_values(self, parameter: Tensor) -> Tensor:
        """Hold a parameter's values; vectors, stacks of experts and convolutions stay what they are."""
        if parameter.dim() != 2 or self.kind == "plain" or isinstance(parameter, PackedTensor):
            return parameter
        value = parameter.detach()
        name = weight_type(self.kind, value.shape[1], in_vocabulary=value.shape[0] == self.n_vocab)
        held = PackedTensor(encode(value, _exact_type(value) if name is None else name), self.dtype or parameter.dtype)
        return nn.Parameter(held, requires_grad=False)


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
    holder = Holder(kind, vocab_size_of(model.config))
    done: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:
                done[id(parameter)] = holder.of_values(parameter)
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


def held_parts(model: nn.Module) -> dict[str, int]:
    """Count the bytes of a model's weights by how they are held, named as `hybridkv.held` names them ahead."""
    parts: dict[str, int] = {}
    vectors = 0
    for parameter in {id(value): value for value in model.state_dict(keep_vars=True).values()}.values():
        if isinstance(parameter, PackedTensor):
            held, n_bytes = parameter.packed.format.name, parameter.packed.nbytes
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
    return dict(sorted(parts.items(), key=lambda part: (EXPERTS not in part[0], -part[1])))


def types_held(model: nn.Module) -> str:
    """Name the types of a model's matrices and experts, as in `f32 (experts) + q8_0`; empty if nothing is packed."""
    if not any(isinstance(parameter, PackedTensor) for parameter in model.parameters()):
        return ""
    return " + ".join(name for name in held_parts(model) if "(vectors)" not in name)


def packing_rejects(device: str) -> str | None:
    """Explain why weights cannot be held packed on a type of device; None if they can."""
    return cpu_native.available() if device == "cpu" else f"packed weights are for the cpu, not {device}"


def _exact_type(x: Tensor) -> str:
    """Choose bf16 if it holds all values as they are, else f32."""
    held = x.dtype == torch.bfloat16 or torch.equal(x.bfloat16().float(), x.float())
    return "bf16" if held else "f32"
