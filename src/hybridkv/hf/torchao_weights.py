"""Weights of linear layers as torchao's int8 and int4, for devices that have no packed weights of our own.

The only importer of torchao, which is the optional extra `hybridkv[torchao]`; `engine/load.py` calls it. On the CPU,
weights are packed instead (`step/weights.py`): torchao has no int4 there, and its int8 is slower than bfloat16.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from torch import nn

from hybridkv.errors import UsageError

TorchaoKind = Literal["int8", "int4"]
"""`int8`: a scale per output; `int4`: scale and minimum per 64 inputs, the output head as int8."""


_GROUP = 64


def check_torchao() -> None:
    """Check that torchao is there, before a model is loaded for it.

    Raises
    ------
    UsageError
        With the extra's name.
    """
    _torchao()


def quantize_weights(model: Any, kind: TorchaoKind) -> None:
    """Quantize a model's linear layers in place; int4 takes bfloat16 ones on a CUDA device.

    Embeddings, convolutions and stacks of experts stay what they are, and so does an output head that is tied to its
    embedding: it would become a second copy.

    Raises
    ------
    UsageError
        If torchao is not installed.
    """
    torchao = _torchao()
    head, tied = model.get_output_embeddings(), model.get_input_embeddings().weight
    # Not torchao's defaults: the inductor's settings are global, and the plain packing of int4 needs another package.
    int8 = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    int4 = torchao.Int4WeightOnlyConfig(
        group_size=_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )

    def kind_of(module: nn.Module, name: str) -> TorchaoKind | None:
        # Mamba's first generation multiplies by dt_proj's weight without calling the layer.
        if type(module) is not nn.Linear or module.weight is tied or name.endswith("dt_proj"):
            return None
        return "int4" if kind == "int4" and module is not head and module.in_features % _GROUP == 0 else "int8"

    chosen = {id(module): kind_of(module, name) for name, module in model.named_modules()}
    for own, config in (("int8", int8), ("int4", int4)):
        torchao.quantize_(model, config, lambda module, _name, own=own: chosen.get(id(module)) == own)


def _torchao() -> Any:
    try:
        return import_module("torchao.quantization")
    except ImportError as error:
        raise UsageError(
            f"int8 and int4 weights on this device need torchao: {error}", hint='pip install "hybridkv[torchao]"'
        ) from error
