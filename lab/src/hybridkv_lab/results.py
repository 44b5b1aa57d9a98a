"""The result of an evaluation: the conditions, one result per cache type, and the JSONL file that carries them.

The first line is `{"format": "hybridkv-eval", "version": 2, "conditions": {...}}`, every other line one result. JSON
has no NaN and no infinity: they are the strings "nan", "inf" and "-inf". Measures nothing and draws nothing: written
by `hybridkv eval`, read by `lab.report`.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from hybridkv.errors import UsageError

FORMAT = "hybridkv-eval"
VERSION = 2

Role = Literal["reference", "floor", "candidate"]

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_HINT = "name a file that `hybridkv eval` wrote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The conditions of an evaluation: what was measured, with what, and on which machine.

    Attributes
    ----------
    text
        File name of the text.
    n_windows, n_tokens
        Windows of `n_ctx` tokens, and predictions counted in all of them.
    reference
        Label of the reference cache.
    backend, kernel
        What ran the model's steps, and what attended.
    date
        ISO 8601.
    complete
        False when the run was stopped early.
    greedy_tokens
        Tokens generated for `Result.greedy_agreement`; 0 if none were.
    """

    model: str
    text: str
    n_ctx: int
    n_windows: int
    n_tokens: int
    mode: Literal["prefill", "decode"]
    reference: str
    backend: str
    kernel: str
    hybridkv: str
    torch: str
    transformers: str
    cpu: str
    threads: int
    commit: str | None = None
    date: str
    complete: bool = True
    greedy_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One cache type beside the reference.

    Attributes
    ----------
    label
        As the user knows it: `q4_0`, `q8_0/q4_0 rot kv tail 128`.
    config
        Name of a file with a type for each layer.
    role
        The `reference`, the noise `floor` (the reference measured against itself), or a `candidate`.
    ratio
        Perplexity over the reference's; `_se` is a standard error.
    kld_mean
        Kullback-Leibler divergence of the next token's distribution from the reference's, nats.
    same_top
        Fraction of positions at which both put the same token first.
    rms_delta_p
        Root mean square change of the right token's probability, 0..1.
    greedy_first_divergence
        Mean position, in tokens, at which greedy texts part.
    kv_bytes
        Allocated for `n_ctx` tokens.
    positions
        `(first position, mean KLD, predictions)` of buckets along the window.
    histogram
        `(log10 of the lower edge, predictions)` of the KLD.
    worst
        `(position, KLD, text before it)`, worst first.
    layers
        `(model layer, relative error of its attention output)`.
    """

    label: str
    type_k: str
    type_v: str
    rotate: Literal["none", "k", "v", "kv"]
    scale: str | None = None
    tail: int = 0
    sink: int = 0
    center: bool = False
    config: str | None = None
    role: Role
    bytes_per_token: float
    bits_per_value: float
    n_tokens: int
    perplexity: float
    perplexity_se: float
    ratio: float
    ratio_se: float
    kld_mean: float
    kld_mean_se: float
    kld_median: float
    kld_p95: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    same_top: float
    rms_delta_p: float
    n_non_finite: int
    greedy_agreement: float | None = None
    greedy_first_divergence: float | None = None
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    kv_bytes: int
    positions: tuple[tuple[int, float, int], ...] = ()
    histogram: tuple[tuple[float, int], ...] = ()
    worst: tuple[tuple[int, float, str], ...] = ()
    layers: tuple[tuple[int, float], ...] = ()


def candidates(results: Sequence[Result]) -> tuple[Result, ...]:
    """Select the results that are neither the reference nor the noise floor."""
    return tuple(r for r in results if r.role == "candidate")


def front(results: Sequence[Result]) -> tuple[Result, ...]:
    """Select the candidates that no other beats in both size and mean KLD, smallest first."""
    best = math.inf
    kept = []
    for r in sorted(candidates(results), key=lambda r: (r.bits_per_value, r.kld_mean)):
        if r.kld_mean < best:
            best = r.kld_mean
            kept.append(r)
    return tuple(kept)


T = TypeVar("T", Conditions, Result)


def write_jsonl(path: Path, conditions: Conditions, results: Sequence[Result]) -> None:
    """Write the file, whole or not at all.

    Raises
    ------
    UsageError
        If nothing can be written there.
    """
    head = {"format": FORMAT, "version": VERSION, "conditions": _plain(conditions)}
    lines = [json.dumps(line, allow_nan=False) for line in (head, *map(_plain, results))]
    write_text(path, "\n".join(lines) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, in UTF-8; lone surrogates become question marks.

    Raises
    ------
    UsageError
        If nothing can be written there.
    """
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises
    ------
    UsageError
        If nothing can be written there.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        try:
            os.fchmod(handle, 0o666 & ~_umask())  # mkstemp's own mode hides the file from everybody else
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", hint="name a place in a directory that exists"
        ) from error


def read_jsonl(path: Path) -> tuple[Conditions, tuple[Result, ...]]:
    """Read what `write_jsonl` wrote.

    Raises
    ------
    UsageError
        If the file is missing, damaged, or not one of ours.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=_HINT) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file", hint=_HINT) from error
    if not text.strip():
        raise UsageError(f"{path} is empty", hint=_HINT)
    lines = text.rstrip("\n").split("\n")
    head = _object(path, 1, lines[0])
    if head.get("format") != FORMAT:
        raise UsageError(f"{path} is not an evaluation: line 1 has no format {FORMAT!r}", hint=_HINT)
    if head.get("version") != VERSION:
        raise UsageError(
            f"{path} has version {head.get('version')!r}; allowed: {VERSION}", hint="run `hybridkv eval` once more"
        )
    conditions = _record(path, 1, Conditions, head.get("conditions"))
    numbered = enumerate(lines[1:], start=2)
    return conditions, tuple(_record(path, i, Result, _object(path, i, line)) for i, line in numbered)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(value: Any) -> Any:
    """Convert a record to JSON's own types."""
    if isinstance(value, (Conditions, Result)):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: line {number} is not JSON", hint=_HINT) from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged: line {number} is no JSON object", hint=_HINT)
    return value


def _record(path: Path, number: int, kind: type[T], values: object) -> T:
    """Read a record whose every field is there and of its declared type, and nothing else."""
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or values.keys() != hints.keys():
        odd = ", ".join(sorted(hints.keys() ^ values.keys())) if isinstance(values, dict) else "all of them"
        raise UsageError(f"{path} is damaged: line {number} has missing or unknown fields: {odd}", hint=_HINT)
    checked = {}
    for name, hint in hints.items():
        try:
            checked[name] = _typed(hint, values[name])
        except (ValueError, TypeError, OverflowError) as error:
            raise UsageError(f"{path} is damaged: line {number} has a wrong {name!r}", hint=_HINT) from error
    return kind(**checked)


def _typed(hint: Any, value: Any) -> Any:
    """Convert JSON's value to the declared type; `ValueError`, `TypeError` or `OverflowError` if it is none."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return arguments[arguments.index(value)]
    if isinstance(hint, UnionType):  # a type or None
        return None if value is None else _typed(arguments[0], value)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError(value)
        items = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_typed(item, v) for item, v in zip(items, value, strict=True))
    if hint is float and isinstance(value, str):
        if value not in _NOT_FINITE:
            raise ValueError(value)
        return _NOT_FINITE[value]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError(value)
    return value
