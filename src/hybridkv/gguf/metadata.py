"""Typed access to GGUF metadata: every key that is missing, mistyped or out of range is a `ModelFileError`.

Owns the ranges: a number that describes the model can exceed neither the largest tensor dimension nor
the number of tensors, so that a damaged value is refused before a model is built from it. Remembers which
keys were read, so that `keys.py` can judge the others. Does not own what keys an architecture has. Called by
`architectures/`, `tokenizer.py` and `load.py`.
"""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
from gguf import GGMLQuantizationType

from hybridkv.errors import ModelFileError
from hybridkv.gguf.reader import Header, TensorInfo, Value
from hybridkv.gguf.rows import open_model

_SHARED = ("general.", "tokenizer.", "split.")


class Metadata:
    """The keys of one header.

    Names that do not start with `general.`, `tokenizer.` or `split.` belong to the architecture: in a
    `qwen35` file, `block_count` is the key `qwen35.block_count`.
    """

    __slots__ = ("_read", "_tensors", "header", "largest_dim")

    def __init__(self, header: Header) -> None:
        self.header = header
        self._read: set[str] = set()
        self.largest_dim = max((dim for info in header.tensors for dim in info.shape), default=0)
        self._tensors = {info.name: info for info in header.tensors}

    def key(self, name: str) -> str:
        """Return the key as it stands in the file."""
        return name if name.startswith(_SHARED) else f"{self.header.architecture}.{name}"

    def has(self, name: str) -> bool:
        """Check whether the file has this key."""
        return self.key(name) in self.header.metadata

    def value(self, name: str) -> Value | None:
        """Return what the file has under a key, None where it has nothing; the key counts as read."""
        self._read.add(self.key(name))
        return self.header.metadata.get(self.key(name))

    def disregard(self, prefix: str) -> None:
        """Count the architecture's keys that start so as read: what they say does not concern this model."""
        self._read |= {key for key in self.header.metadata if key.startswith(self.key(prefix))}

    def unread(self) -> tuple[str, ...]:
        """Return the architecture's own keys that nothing has read, without their prefix."""
        prefix = f"{self.header.architecture}."
        unread = (key for key in self.header.metadata if key not in self._read)
        return tuple(key.removeprefix(prefix) for key in unread if key.startswith(prefix))

    def fail(self, message: str, *, hint: str | None = None) -> NoReturn:
        """Raise `ModelFileError` about this file."""
        raise ModelFileError(f"{self.header.path}: {message}", hint=hint)

    def expected(self, name: str, what: str) -> NoReturn:
        """Raise the error of a key that is not what was expected."""
        key = self.key(name)
        if not self.has(name):
            self.fail(f"metadata key {key!r} is missing; expected {what}")
        self.fail(f"metadata key {key!r} is {self.shown(name)}; expected {what}")

    def shown(self, name: str) -> str:
        """Return a key's value as an error can show it: the beginning of a long one."""
        value = self.header.metadata[self.key(name)]
        shown = value[:8].tolist() if isinstance(value, np.ndarray) else value
        return repr(shown[:8] if isinstance(shown, list) else shown)[:80]

    def integer(self, name: str, *, low: int = 1, high: int | None = None) -> int:
        """Return a whole number from `low` to `high` (the largest tensor dimension if not given)."""
        high = self.largest_dim if high is None else high
        value = self.value(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.expected(name, f"a whole number from {low} to {high}")
        return value

    def integers(self, name: str, length: int) -> list[int]:
        """Return an array of exactly `length` whole numbers, none negative."""
        value = self.value(name)
        is_whole = isinstance(value, np.ndarray) and value.dtype.kind in "iu"
        if not isinstance(value, np.ndarray) or not is_whole or len(value) != length or (value < 0).any():
            self.expected(name, f"{length} whole numbers")
        numbers: list[int] = value.tolist()
        return numbers

    def real(self, name: str) -> float:
        """Return a finite number above zero."""
        value = self.value(name)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            self.expected(name, "a number above zero")
        return value

    def real_or(self, name: str, default: float) -> float:
        """Return a finite number above zero, `default` where the file has none or zero, as llama.cpp reads it."""
        value = self.value(name)
        return default if value is None or (isinstance(value, float) and value == 0) else self.real(name)

    def reals(self, name: str, length: int) -> list[float]:
        """Return an array of exactly `length` numbers, none NaN."""
        value = self.value(name)
        if (
            not isinstance(value, np.ndarray)
            or value.dtype.kind != "f"
            or len(value) != length
            or np.isnan(value).any()
        ):
            self.expected(name, f"{length} numbers")
        numbers: list[float] = value.tolist()
        return numbers

    def flags(self, name: str, length: int) -> list[bool]:
        """Return an array of exactly `length` flags."""
        value = self.value(name)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biu" or len(value) != length:
            self.expected(name, f"{length} flags")
        return [bool(flag) for flag in value]

    def text(self, name: str) -> str:
        """Return a string."""
        value = self.value(name)
        if not isinstance(value, str):
            self.expected(name, "a text")
        return value

    def texts(self, name: str) -> list[str]:
        """Return an array of strings."""
        value = self.value(name)
        if not isinstance(value, list):
            self.expected(name, "an array of texts")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a flag, `default` where the file has none."""
        value = self.value(name) if self.has(name) else default
        if not isinstance(value, bool):
            self.expected(name, "true or false")
        return value

    def fixed(self, name: str, values: tuple[float, ...], what: str) -> None:
        """Refuse a key that is there with another value than these: the others are not computed.

        Parameters
        ----------
        what
            What is expected, and why.
        """
        value = self.value(name)
        if self.has(name) and (isinstance(value, np.ndarray) or value not in values):
            self.expected(name, what)

    def is_array(self, name: str) -> bool:
        """Check whether a key holds an array of numbers."""
        return isinstance(self.header.metadata.get(self.key(name)), np.ndarray)

    def length(self, name: str) -> int:
        """Return the number of elements of an array, zero for what is no array of numbers."""
        value = self.header.metadata.get(self.key(name))
        return len(value) if isinstance(value, np.ndarray) else 0

    def has_tensor(self, name: str) -> bool:
        """Check whether the file has this tensor."""
        return name in self._tensors

    def tensor(self, name: str) -> TensorInfo:
        """Return a tensor's place in the file."""
        if name not in self._tensors:
            self.fail(f"tensor {name!r} is missing")
        return self._tensors[name]

    def numbers_in(self, name: str, length: int) -> list[float]:
        """Return the values of a small float32 tensor, all above zero: settings that have no key."""
        info = self.tensor(name)
        if info.type != GGMLQuantizationType.F32 or math.prod(info.shape) != length:
            self.fail(f"tensor {name!r} has shape {list(info.shape)} and type {info.type.name}; expected {length} F32")
        with open_model(self.header) as files:
            values = np.frombuffer(files.rows(info)[:].tobytes(), "<f4")
        if not (np.isfinite(values) & (values > 0)).all():
            self.fail(f"tensor {name!r} holds {values.min()}; expected values above zero")
        return [float(value) for value in values]

    def token_id(self, role: str, n_tokens: int) -> int | None:
        """Return the id of the `bos`, `eos`, `eot`, `padding`, ... token, None where the file has none."""
        name = f"tokenizer.ggml.{role}_token_id"
        return self.integer(name, low=0, high=n_tokens - 1) if self.has(name) else None
