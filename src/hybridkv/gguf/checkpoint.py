"""The safetensors of a Hugging Face directory, one parameter at a time.

Owns finding which of a checkpoint's tensors make up a parameter: checkpoints name and stack them differently (one
matrix per expert, another prefix), and Transformers' own table of that is applied, so that what loads there
converts here. Does not own configs or models. Called by `convert.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from safetensors import SafetensorError, safe_open

from hybridkv.errors import ModelError, ModelFileError
from hybridkv.gguf.pairing import state

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = ("F64", "F32", "F16", "BF16")


class Checkpoint:
    """A directory's tensors as a model's parameters.

    Files are opened for one parameter at a time, so that the pages that were read do not stay in memory.

    Parameters
    ----------
    purpose
        What is to be done with them, as errors say it.
    named
        Says what a tensor is called where it is not what the files call it; None for one that is of no concern.

    Raises
    ------
    ModelFileError
        For files that are missing or damaged and tensors that are no floats.
    ModelError
        For parameters that the files do not have.
    """

    def __init__(
        self,
        directory: Path,
        model: PreTrainedModel,
        purpose: Literal["converted", "loaded"] = "converted",
        named: Callable[[str], str | None] = lambda key: key,
    ) -> None:
        self.directory = directory
        self._purpose = purpose
        self._model = model
        self._open: dict[Path, Any] = {}
        self._mappings: dict[str, Any] = {}
        self.unused: tuple[str, ...] = ()
        """Tensors that the model has no place for."""
        self.used: frozenset[str] = frozenset()
        """Tensors that it has one for."""
        self._assign(self._tensors(), named)

    @property
    def config(self) -> Any:
        """The model's config."""
        return self._model.config

    def parameter(self, name: str) -> torch.Tensor:
        """Read one parameter, once; memory is its own, and that of its pieces while they are joined."""
        mapping = self._mappings.pop(name)
        try:
            value: Any = mapping.convert(name, model=self._model, config=self._model.config)[name]
        except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
            self._fail(f"{name} cannot be read from {self.directory}: {error}", "a file is damaged")
        finally:
            self._open.clear()
        value = value[0] if isinstance(value, list) else value
        expected = self._model.get_parameter_or_buffer(name).shape
        if value.shape != expected:
            raise ModelError(
                f"{name} has shape {list(value.shape)} in {self.directory}; the config asks for {list(expected)}",
                hint="config.json and the weights are of different models",
            )
        tensor: torch.Tensor = value
        return tensor

    def read(self, path: Path, key: str) -> torch.Tensor:
        """Read one tensor of one file."""
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: torch.Tensor = self._open[path].get_tensor(key)
        return tensor

    def _tensors(self) -> dict[str, Path]:
        """Return every tensor's file, after checking that all can be read."""
        tensors = {}
        for path in self._paths():
            try:
                with safe_open(path, framework="pt") as file:
                    types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                self._fail(
                    f"the weights in {self.directory} cannot be {self._purpose}: {error}", f"{path.name} is damaged"
                )
            for key, dtype in types.items():
                if dtype not in DTYPES:
                    self._fail(
                        f"tensor {key!r} in {path} has dtype {dtype}; allowed: {', '.join(DTYPES)}",
                        f"quantized checkpoints cannot be {self._purpose}: use the one that they were made from",
                    )
                tensors[key] = path
        return tensors

    def _paths(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(
                    {Path(name).name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
                )
            except (ValueError, LookupError, AttributeError, TypeError) as error:
                self._fail(f"{index} is no index of weights: {error}", "the file is damaged")
            paths = [self.directory / name for name in names]
        else:
            paths = [self.directory / "model.safetensors"]
        for path in paths:
            if not path.is_file():
                self._fail(
                    f"the weights in {self.directory} cannot be {self._purpose}: {path} is missing",
                    "safetensors are read, other formats are not",
                )
        return paths

    def _assign(self, tensors: dict[str, Path], named: Callable[[str], str | None]) -> None:
        """Say for each parameter which tensors it is made of, as `from_pretrained` does."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        transforms = get_model_conversion_mapping(self._model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        names = dict(self._model.state_dict())
        prefix, unused, used = self._model.base_model_prefix, [], []
        for file_key in sorted(tensors, key=dot_natural_key):
            key = named(file_key)
            if key is None:
                continue
            name, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if name not in names and key in names:
                name, pattern = key, None
            if name not in names:
                unused.append(file_key)
                continue
            mapping = self._mappings.setdefault(
                name, WeightRenaming(key, name) if pattern is None else deepcopy(by_pattern[pattern])
            )
            mapping.add_tensor(name, key, pattern or key, _Lazy(self, tensors[file_key], file_key))
            used.append(file_key)
        self.unused = tuple(unused)
        self.used = frozenset(used)
        missing = sorted(state(self._model).keys() - self._mappings.keys())
        if missing:
            shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise ModelError(
                f"{len(missing)} tensors are missing in {self.directory}: {shown}",
                hint="config.json and the weights are of different models",
            )

    def _fail(self, message: str, hint: str) -> NoReturn:
        raise ModelFileError(message, hint=hint)


class _Lazy:
    """A tensor that is read when Transformers calls it, and not before."""

    __slots__ = ("_checkpoint", "_key", "_path")

    def __init__(self, checkpoint: Checkpoint, path: Path, key: str) -> None:
        self._checkpoint, self._path, self._key = checkpoint, path, key

    def __call__(self) -> torch.Tensor:
        return self._checkpoint.read(self._path, self._key)
