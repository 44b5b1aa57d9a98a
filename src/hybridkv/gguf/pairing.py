"""The tensors of a file for the parameters of a model, and their shapes: the tables, applied to one model.

Owns pairing, in both directions: `load.py` reads along it, `convert.py` writes along it. Does not own the
tables (`architectures/`), files, or memory: the model it looks at has none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hybridkv.gguf.architectures.record import Architecture, Config, Tables, TensorRule
from hybridkv.gguf.decode import Order

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pairing:
    """One parameter of one model and the tensors that hold it.

    Parameters
    ----------
    param
        The parameter's full name.
    names, shapes
        The tensors in the file, and each one's shape there.
    matrix
        The parameter as `[stack, rows, cols]`: a stack of experts' matrices, else a stack of one.
    rule
        Its conversions.
    rows
        Where each row of the tensors, one below the other, goes in the parameter; None for the same order.
    cols
        Where each column of the parameter lies in the tensors.
    shape
        The parameter's shape.
    """

    param: str
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    matrix: tuple[int, int, int]
    rule: TensorRule
    rows: Order | None
    cols: Order | None
    shape: Shape

    @property
    def is_plain(self) -> bool:
        """True if the parameter is one matrix that lies in the file as it is in the model."""
        matrix = len(self.shape) == 2 and min(self.shape) > 1
        return matrix and len(self.names) == 1 and self.rows is None and self.cols is None and self.rule.values is None

    def shown(self, shape: Shape) -> Shape:
        """Return a tensor's shape as a user should see it: the parameter's, where both hold the same."""
        return self.shape if same_shape(shape, self.shape) else shape


def build_skeleton(config: Config, dtype: torch.dtype, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """Build a config's model without memory: all its tensors are on the meta device, in the dtype they will have."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    if dtype != torch.float32:
        # What a class keeps in float32 whatever the rest is, as `from_pretrained` does.
        for name, tensor in model.state_dict(keep_vars=True).items():
            if any(part in name for part in model._keep_in_fp32_modules_strict or ()):
                tensor.data = tensor.data.float()
    return model


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what a checkpoint of this model holds, by name; tied tensors once."""
    unique = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: model.get_parameter_or_buffer(name) for name in unique.values()}


def pair(
    architecture: Architecture | Tables, config: Config, model: PreTrainedModel, present: Collection[str]
) -> list[Pairing]:
    """Pair every parameter of a model with tensors.

    Parameters
    ----------
    present
        Names of a file's tensors, which decide where the table has several layouts; none for a new file.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state(model).items()}
    chosen: dict[str, TensorRule] = {}
    for rule in _rules(architecture, config):
        if rule.param in shapes and (rule.param not in chosen or _fits_better(rule, chosen[rule.param], present)):
            chosen[rule.param] = rule
    assert shapes.keys() == chosen.keys(), f"the tables leave out {sorted(shapes.keys() - chosen.keys())}"
    return [pairing_of(rule, config, shapes[param]) for param, rule in chosen.items()]


def same_shape(one: Shape, two: Shape) -> bool:
    """Compare two shapes without their dimensions of one, which files leave out."""
    return [dim for dim in one if dim > 1] == [dim for dim in two if dim > 1]


def _fits_better(rule: TensorRule, other: TensorRule, present: Collection[str]) -> bool:
    return all(name in present for name in rule.names) and not all(name in present for name in other.names)


def _rules(architecture: Architecture | Tables, config: Config) -> Iterator[TensorRule]:
    """Yield all rules of a model with full names."""
    yield from architecture.tensors["model"]
    tensors = {**architecture.tensors, **(architecture.more(config) if isinstance(architecture, Tables) else {})}
    for layer, parts in enumerate(architecture.layers(config)):
        for rule in (rule for part in parts for rule in tensors[part]):
            names = tuple(f"blk.{layer}.{name}" for name in rule.names)
            param = f"{architecture.prefix}{layer}.{rule.param}"
            yield TensorRule(names, param, rule.values, rule.rows, rule.cols, rule.parts, rule.shape, rule.scale)


def pairing_of(rule: TensorRule, config: Config, shape: Shape) -> Pairing:
    """Pair a parameter of this shape with the tensors of its rule."""
    # Dimensions of one are left out, but where rows of several tensors must stay rows.
    bare = shape if len(rule.names) > 1 else tuple(dim for dim in shape if dim > 1)
    assert len(bare) <= 3, f"{rule.param} has shape {shape}"
    stack, n_rows, n_cols = (1,) * (3 - len(bare)) + bare
    if len(rule.names) == 1:
        shapes: tuple[Shape, ...] = (rule.shape(config) if rule.shape else bare or (1,),)
        assert math.prod(shapes[0]) == math.prod(shape), f"{rule.param}: {shapes[0]} for {shape}"
    else:
        parts = rule.parts(config) if rule.parts else (n_rows // len(rule.names),) * len(rule.names)
        assert sum(parts) == n_rows, f"{rule.param}: {parts} rows for {n_rows}"
        shapes = tuple((*bare[:-2], part, n_cols) for part in parts)
    rows = np.argsort(rule.rows(config)) if rule.rows else None
    cols = rule.cols(config) if rule.cols else None
    return Pairing(rule.param, rule.names, shapes, (stack, n_rows, n_cols), rule, rows, cols, shape)


def file_tensors(pairing: Pairing, config: Config, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Convert a parameter's value to the file's tensors, with their names: in its order, shapes and conventions.

    The dtype stays, but where values are converted: those become float32.
    """
    import torch

    rule, value = pairing.rule, value.reshape(pairing.matrix)
    if rule.scale is not None:
        scale = torch.as_tensor(np.asarray(rule.scale(config), np.float32))
        value = value.float() * (scale[:, None] if scale.dim() else scale)
    if rule.values is not None:
        value = torch.from_numpy(np.asarray(rule.values.write(value.float().numpy()), np.float32))
    if pairing.rows is not None:
        value = value[:, torch.from_numpy(pairing.rows)]
    if pairing.cols is not None:
        value = value[:, :, torch.from_numpy(np.argsort(pairing.cols))]
    tensors, start = [], 0
    for name, shape in zip(pairing.names, pairing.shapes, strict=True):
        n_rows = math.prod(shape) // (pairing.matrix[0] * pairing.matrix[2])
        tensors.append((name, value[:, start : start + n_rows].reshape(shape)))
        start += n_rows
    return tensors
