"""The weights of a model directory: shapes from its config, types from its files' headers.

For counting bytes before any is read. Does not own what a run makes of them (`hybridkv.held`).
"""

from __future__ import annotations

from math import prod
from pathlib import Path

from hybridkv.held import Place, SavedTensor, Shape
from hybridkv.hf.load import RemoteCode, build_empty, saved_types
from hybridkv.model.protocols import Config


def saved_tensors(directory: Path, config: Config, *, remote_code: RemoteCode = "refused") -> tuple[SavedTensor, ...]:
    """Return the weights that a model of this config has, tied ones once.

    Without files beside the config, what it says of their type is believed.

    Raises
    ------
    ModelError
        If the config describes no model.
    """
    most = saved_types(directory).most_common(1)
    type_ = most[0][0].lower() if most else str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    type_ = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}.get(type_, type_)
    model = build_empty(config, remote_code=remote_code)
    places: dict[int, Place] = {}
    for place, module in (("head", model.get_output_embeddings()), ("embedding", model.get_input_embeddings())):
        if module is not None:
            places[id(module.weight)] = place  # type: ignore[assignment]
    found = []
    # Buffers of a checkpoint too, such as experts' biases; tied tensors once.
    for parameter in {id(value): value for value in model.state_dict(keep_vars=True).values()}.values():
        dims = tuple(parameter.shape)
        is_vector = len(dims) < 2 or (len(dims) == 3 and dims[1] == 1)  # or a convolution's one channel
        shape: Shape = "vector" if is_vector else "matrix" if len(dims) == 2 else "experts"
        n_in, n_out = dims[-1] if dims else 1, dims[-2] if len(dims) > 1 else 1
        place = places.get(id(parameter), "layer")
        found.append(SavedTensor(type_, prod(dims[:-2]), n_out, n_in, shape, place))
    return tuple(found)
