"""One sequence in a file: its tokens, KV blocks in ggml's layout, states, and how they are stored.

A session is a safetensors file, so that anyone can look into it. It carries a format version, a fingerprint of the
model and a checksum over all else; what is torn, changed or another model's is refused. `whole_files.py` writes it: a
process killed at any moment leaves the old file or the new one, whole.

A state cannot go back, so a session may hold a second, earlier place to resume from, within its prompt, for the same
prompt again. Of packed rows it has those that the whole begins with, which are written once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hybridkv.cache import KVSpec, KVTypes, StateFacts
from hybridkv.cache.stored import StoredRows
from hybridkv.engine.ladder import labels_of
from hybridkv.engine.whole_files import write_whole
from hybridkv.errors import SessionError, UsageError
from hybridkv.formats import get_format
from hybridkv.model import kv_facts, layer_facts
from hybridkv.model.protocols import LanguageModel
from hybridkv.native import NativeModel
from hybridkv.runtime import ModelCache
from hybridkv.runtime.stored import StoredCache, StoredState

FORMAT, VERSION = "hybridkv session", "1"

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Session:
    """A sequence to resume.

    Attributes
    ----------
    tokens
        All of them.
    n_cached
        How many, from the first, `cache` holds; the last that was drawn was never processed.
    cache
        Rows and states, contiguous.
    messages
        The conversation that the tokens are, if it is one.
    earlier
        Another place to resume from: how many tokens, and their cache.
    asked
        The types of each KV layer as they were asked for, before the guard raised any; () if they are not known.
    """

    tokens: tuple[int, ...]
    n_cached: int
    cache: StoredCache
    messages: tuple[Message, ...] = ()
    earlier: tuple[int, StoredCache] | None = None
    asked: tuple[KVTypes, ...] = ()

    def rewound(self) -> Session | None:
        """Return the session as it was at its earlier place."""
        return None if self.earlier is None else Session(self.tokens, *self.earlier, asked=self.asked)


def fingerprint(model: LanguageModel) -> str:
    """Digest what tells models apart: the config, and the shapes and small parameters as float32."""
    config = {k: v for k, v in model.config.get_text_config(decoder=True).to_dict().items() if k not in _PASSING}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, shape, vector in _parameters(model):
        digest.update(f"{name} {shape}".encode())
        if vector is not None:
            digest.update(vector.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _parameters(model: LanguageModel) -> Iterator[tuple[str, tuple[int, ...], Tensor | None]]:
    """Iterate names, shapes and small values of a model's weights; a native model's are in the file's order."""
    if isinstance(model, NativeModel):
        for name, shape in model.source.shapes():
            yield name, shape, model.source.vector(name) if len(shape) == 1 else None
    else:
        assert isinstance(model, torch.nn.Module), model
        for name, parameter in model.named_parameters():
            yield name, tuple(parameter.shape), parameter if parameter.dim() == 1 else None


_PASSING = frozenset({"transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "use_cache"})


def save_session(path: Path, session: Session, model: LanguageModel) -> int:
    """Write a session; its bytes.

    Raises
    ------
    SessionError
        If it cannot be written there; what was there before is untouched.
    """
    tensors = {"tokens": torch.tensor(session.tokens, dtype=torch.int64), **_tensors(session.cache)}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": fingerprint(model),
        "n_cached": str(session.n_cached),
        "types": json.dumps([asdict(spec.types) for spec in session.cache.specs]),
        **{name: json.dumps(value) for name, value in _record(session.cache).items()},
        "messages": json.dumps([dict(m) for m in session.messages]),
    }
    if session.asked:
        metadata["asked"] = json.dumps([asdict(types) for types in session.asked])
    if session.earlier is not None:
        n_earlier, earlier = session.earlier
        tensors |= _tensors(earlier, _EARLIER)
        n_packed = [rows.n_packed for rows in earlier.rows]
        metadata[_EARLIER] = json.dumps({"n_cached": n_earlier, "n_packed": n_packed, **_record(earlier)})
    metadata["sha256"] = _checksum(tensors, metadata)
    data = save(tensors, metadata)
    try:
        write_whole(path, data)
    except OSError as error:
        raise SessionError(f"the session cannot be written to {path}: {error.strerror}") from error
    return len(data)


def load_session(path: Path, model: LanguageModel) -> Session:
    """Read a session of this model.

    Raises
    ------
    SessionError
        If the file is missing, torn, changed, of another version or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except FileNotFoundError as error:
        raise SessionError(f"no session at {path}") from error
    except (OSError, SafetensorError) as error:
        raise SessionError(f"{path} is no session, or is torn: {error}", hint=_DELETE) from error
    if metadata.get("format") != FORMAT:
        raise SessionError(f"{path} is no session of hybridkv", hint="give another file")
    if metadata.get("version") != VERSION:
        raise SessionError(f"{path} is of version {metadata.get('version')}; this hybridkv reads {VERSION}")
    if metadata.pop("sha256", None) != _checksum(tensors, metadata):
        raise SessionError(f"{path} is damaged: its checksum is not that of its contents", hint=_DELETE)
    if metadata["model"] != fingerprint(model):
        raise SessionError(
            f"{path} is of another model, or of this one loaded in another dtype",
            hint="give the model that it was saved with (-m)",
        )
    try:
        return _session(tensors, metadata, model)
    except (IndexError, KeyError, TypeError, UsageError, ValueError) as error:
        raise SessionError(f"{path} contradicts itself: {error}", hint=_DELETE) from error


_DELETE = "delete it, or give another file"


def resume(
    session: Session, specs: Sequence[KVSpec], make_cache: Callable[[Sequence[KVSpec]], ModelCache]
) -> tuple[ModelCache, str | None]:
    """Build a cache to resume with, stored as `specs` say; what the guard had raised from the same types stays raised.

    Returns
    -------
    tuple
        The cache, and what was done to its rows, if anything.
    """
    held = session.cache
    if session.asked:
        layers = zip(specs, held.specs, session.asked, strict=True)
        specs = [has if spec == replace(has, types=asked) else spec for spec, has, asked in layers]
    if held.specs == tuple(specs):
        cache = make_cache(specs)
        cache.load([held])
        return cache, None
    before = make_cache(held.specs)
    before.load([held])
    cache = make_cache(specs)
    cache.load_converted(before)
    asked, saved = labels_of(specs), labels_of(held.specs)
    change = f"{saved} -> {asked}" if asked != saved else f"{asked}, other options"
    return cache, f"the session's rows were decoded and encoded again ({change}); they keep the error of both"


def stays_raised(asked: Sequence[KVSpec], cache: ModelCache) -> str | None:
    """Say how many layers of a resumed cache have the larger types that the guard gave them; None if none has."""
    n_raised = sum(has != spec for has, spec in zip(cache.specs, asked, strict=True))
    return f"{n_raised} KV layers stay at the larger types that the guard gave them" if n_raised else None


_EARLIER = "earlier."
"""Before the names of the tensors of the earlier place, and the name of its metadata."""


def _record(cache: StoredCache) -> dict[str, Any]:
    """Collect what is neither a tensor nor a type."""
    fed = [[state.fed for state in layer] for layer in cache.states]
    return {"pending": cache.pending, "errors": cache.errors, "fed": fed}


def _tensors(cache: StoredCache, mark: str = "") -> dict[str, Tensor]:
    """Name a cache's tensors: `kv.N` by KV layer, `state.N` by layer with states; rows uint8 `[B, Hkv, n, row bytes]`.

    Behind a mark, packed rows are left out unless a window lets them go: the whole has them.
    """
    found: dict[str, Tensor | None] = {}
    for n, (spec, rows) in enumerate(zip(cache.specs, cache.rows, strict=True)):
        types, facts, name = spec.types, spec.facts, f"{mark}kv.{n}"
        if not mark or facts.window is not None:
            found[f"{name}.k"] = get_format(types.type_k).to_ggml(rows.packed_k, facts.head_dim_k)
            found[f"{name}.v"] = get_format(types.type_v).to_ggml(rows.packed_v, facts.head_dim_v)
        found |= {f"{name}.exact_k": rows.exact_k, f"{name}.exact_v": rows.exact_v, f"{name}.center": rows.center}
    for n, layer in enumerate(cache.states):
        for i, state in enumerate(layer):
            name = f"{mark}state.{n}.{i}"
            found |= {f"{name}.conv": state.conv, f"{name}.recurrent": state.recurrent}
    return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}


def _session(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: LanguageModel) -> Session:
    """Put together and check against the model: native code trusts these shapes."""
    facts = layer_facts(model.config)
    tokens, n_cached = tuple(tensors["tokens"].tolist()), int(metadata["n_cached"])
    _demand(0 < n_cached <= len(tokens), f"{n_cached} of {len(tokens)} tokens")
    types = [KVTypes(**kv) for kv in json.loads(metadata["types"])]
    specs = tuple(KVSpec(kv, t) for kv, t in zip(kv_facts(facts), types, strict=True))
    shapes = tuple(f.state for f in facts if f.state is not None)
    record = {name: json.loads(metadata[name]) for name in ("pending", "errors", "fed")}
    cache = _cache(specs, shapes, tensors, n_cached, record)
    messages = tuple(json.loads(metadata["messages"]))
    asked = tuple(KVTypes(**kv) for kv in json.loads(metadata.get("asked", "[]")))
    _demand(len(asked) in (0, len(specs)), f"asked types of {len(asked)} layers")
    if _EARLIER not in metadata:
        return Session(tokens, n_cached, cache, messages, asked=asked)
    record = json.loads(metadata[_EARLIER])
    n_earlier = int(record["n_cached"])
    _demand(0 < n_earlier < n_cached, f"{n_earlier} earlier tokens of {n_cached}")
    held = {name.removeprefix(_EARLIER): tensor for name, tensor in tensors.items() if name.startswith(_EARLIER)}
    for n, (spec, n_packed) in enumerate(zip(specs, record["n_packed"], strict=True)):
        if spec.facts.window is None:
            _demand(0 <= n_packed <= cache.rows[n].n_packed, f"{n_packed} earlier rows")
            held |= {f"kv.{n}.{side}": tensors[f"kv.{n}.{side}"][:, :, :n_packed] for side in "kv"}
    earlier = _cache(specs, shapes, held, n_earlier, record)
    return Session(tokens, n_cached, cache, messages, (n_earlier, earlier), asked)


def _cache(
    specs: tuple[KVSpec, ...],
    shapes: Sequence[StateFacts],
    tensors: Mapping[str, Tensor],
    n_cached: int,
    record: Mapping[str, Any],
) -> StoredCache:
    rows = tuple(_rows(spec, n, tensors, n_cached) for n, spec in enumerate(specs))
    states = []
    for n, (shape, flags) in enumerate(zip(shapes, record["fed"], strict=True)):
        layer = [
            StoredState(tensors.get(f"state.{n}.{i}.conv"), tensors.get(f"state.{n}.{i}.recurrent"), bool(flag))
            for i, flag in enumerate(flags)
        ]
        if shape.known:
            _check_sizes([state.conv for state in layer], shape.conv)
            _check_sizes([state.recurrent for state in layer], shape.recurrent)
        states.append(tuple(layer))
    pending, errors = record["pending"], record["errors"]
    _demand(len(pending) == len(errors) == len(specs), "as many layers as the model")
    return StoredCache(specs, rows, tuple(pending), tuple(errors), tuple(states))


def _rows(spec: KVSpec, n: int, tensors: Mapping[str, Tensor], n_seen: int) -> StoredRows:
    facts, types = spec.facts, spec.types
    packed = []
    for side, name, dim in (("k", types.type_k, facts.head_dim_k), ("v", types.type_v, facts.head_dim_v)):
        blocks, fmt = tensors[f"kv.{n}.{side}"], get_format(name)
        _demand(blocks.dtype == torch.uint8, f"rows of {blocks.dtype}")
        _demand(
            (*blocks.shape[:2], blocks.shape[3]) == (1, facts.n_kv_heads, fmt.row_bytes(dim)),
            f"rows {tuple(blocks.shape)}",
        )
        packed.append(fmt.from_ggml(blocks, dim))
    exact_k, exact_v = (tensors.get(f"kv.{n}.exact_{side}") for side in "kv")
    center = tensors.get(f"kv.{n}.center")
    exact = bool(spec.tail or spec.sink)
    _demand((exact_k is None) == (exact_v is None) == (not exact), "exact rows that the types do not have")
    for rows, dim in ((exact_k, facts.head_dim_k), (exact_v, facts.head_dim_v)):
        _demand(rows is None or (rows.dtype == torch.uint8 and rows.shape[3] == 2 * dim), "exact rows")
    _demand(center is None or (spec.center and center.shape == (1, facts.n_kv_heads, facts.head_dim_k)), "a center")
    stored = StoredRows(n_seen, 0, packed[0], packed[1], exact_k, exact_v, center)
    held = stored.n_packed + stored.n_exact
    _demand(stored.packed_v[0].shape[2] == stored.n_packed, "as many rows of V as of K")
    _demand(held == n_seen if facts.window is None else min(n_seen, facts.window - 1) <= held <= n_seen, f"{held} rows")
    return stored


def _check_sizes(states: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]]) -> None:
    """Require states of one sequence with as many values as the model's; some families divide a state into several."""
    held = [state for state in states if state is not None]
    _demand(all(state.shape[:1] == (1,) and state.dtype.is_floating_point for state in held), "a state of no sequence")
    n_values, wanted = sum(state.numel() for state in held), sum(map(prod, shapes))
    _demand(n_values == wanted, f"a state of {n_values} values, not {wanted}")


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
