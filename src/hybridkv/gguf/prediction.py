"""A checkpoint's head of multi-token prediction, as the block that a file has behind the model's own.

Owns which of a checkpoint's tensors it is: Transformers' classes have no place for `mtp.*`, but its layer is one of the
model's own attention layers. Does not own the file, nor the tables (`architectures/`). Called by `convert.py`.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from hybridkv.errors import ModelError
from hybridkv.gguf.architectures.record import Architecture, Config
from hybridkv.gguf.checkpoint import Checkpoint
from hybridkv.gguf.pairing import Pairing, build_skeleton, pair, pairing_of

_LAYER, _PREFIX = "mtp.layers.0.", "mtp."
_OTHER_LAYERS = re.compile(r"(^|\.)layers\.\d+\.")


def find_head(
    directory: Path, architecture: Architecture, config: Config, unused: tuple[str, ...]
) -> tuple[list[Pairing], Checkpoint] | None:
    """Pair a checkpoint's first head with the tensors of a block behind the model's own; None without a whole one.

    Parameters
    ----------
    unused
        What the model itself has no place for, among which a head is.

    Raises
    ------
    ModelFileError
        For tensors that cannot be read.
    """
    import torch

    if not architecture.prediction or not any(name.startswith(_LAYER) for name in unused):
        return None
    own = deepcopy(config)
    own.num_hidden_layers, own.layer_types = 1, ["full_attention"]
    model = build_skeleton(own, torch.float32)
    block = [each for each in pair(architecture, own, model, ()) if each.names[0].startswith("blk.0.")]
    width, rules = config.hidden_size, architecture.prediction
    shapes = {rule.param: (width, 2 * width) if rule.values is None else (width,) for rule in rules}
    for name, shape in shapes.items():  # beside the layer, so that the checkpoint finds them
        if name not in dict(model.named_parameters()):
            owner = torch.nn.Module()
            owner.register_parameter("weight", torch.nn.Parameter(torch.empty(shape, device="meta")))
            model.add_module(name.removesuffix(".weight"), owner)
    try:
        checkpoint = Checkpoint(directory, model, named=_named)
    except ModelError:
        return None  # what is there of a head is left out, which is said
    behind = config.num_hidden_layers
    pairings = [*block, *(pairing_of(rule, own, shapes[rule.param]) for rule in rules)]
    return [replace(each, names=tuple(_behind(name, behind) for name in each.names)) for each in pairings], checkpoint


def _named(key: str) -> str | None:
    """Return what a checkpoint's tensor is called in the model of a head; None for the layers of the model itself."""
    if key.startswith(_LAYER):
        return f"model.layers.0.{key.removeprefix(_LAYER)}"
    if key == "mtp.norm.weight":
        return "model.norm.weight"
    if _OTHER_LAYERS.search(key) or key.endswith("model.norm.weight") or key == "norm.weight":
        return None
    return key.removeprefix(_PREFIX)


def _behind(name: str, n_layers: int) -> str:
    return f"blk.{n_layers}.{name.removeprefix('blk.0.')}"
