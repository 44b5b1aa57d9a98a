"""Find a model and say what it is from its header alone: GGUF files and Hugging Face directories.

With `load.py`, the one place that knows both kinds. Reads no weights, so that types are resolved to kernels and memory
is planned before anything large is touched; imports none of Transformers' models, so that a plan is there at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hybridkv.cache import LayerFacts
from hybridkv.errors import ModelError, ModelFileError, UsageError
from hybridkv.gguf.changes import changed
from hybridkv.gguf.describe import describe_gguf
from hybridkv.gguf.pooling import Pooling, take_pooling
from hybridkv.gguf.reader import Header
from hybridkv.gguf.split import read_model
from hybridkv.held import Expanded, Held, Runner, WeightKind, encoded_tensor, held_weights
from hybridkv.hf.ranks import check_plan
from hybridkv.model.changes import NO_CHANGES, ModelChanges, change_rope
from hybridkv.model.facts import layer_facts
from hybridkv.model.protocols import Config
from hybridkv.native.choice import (
    BackendKind,
    multiplies,
    rejects_encoded,
    rejects_packed,
    rejects_types,
    runs_natively,
)

if TYPE_CHECKING:
    from hybridkv.hf.load import RemoteCode

PoolingAsked = Pooling | Literal["refused", "of the file", "none"]

BUNDLED = "reference-hybrid-q8_0.gguf"


@dataclass(frozen=True, slots=True)
class Description:
    """A model before its weights.

    Attributes
    ----------
    path
        The file or directory.
    name
        What to call it.
    config
        Its Transformers config.
    facts
        What its layers remember.
    n_ctx_train
        Tokens it was trained for, or None if it does not say.
    remote_code
        Whether Python code in its directory may run.
    n_ranks
        Over how many processes it is sharded; `facts` are those of one.
    changes
        What options change of it; `config` and `header` have them.
    header
        Of a GGUF file: read once, for all who ask. None for a directory.
    pooling
        Of an embedding model, where the command takes one.
    """

    path: Path
    name: str
    config: Config
    facts: tuple[LayerFacts, ...]
    n_ctx_train: int | None
    remote_code: RemoteCode = "refused"
    n_ranks: int = 1
    changes: ModelChanges = NO_CHANGES
    header: Header | None = field(default=None, repr=False, compare=False)
    pooling: Pooling | None = None

    def rejects_packed(self, device: str, kind: WeightKind, backend: BackendKind) -> str | None:
        """Explain why the weights are not packed on a device that is not the CPU; None if they are.

        Raises
        ------
        ModelFileError
            If the file is damaged.
        """
        if backend == "eager" or self.n_ranks > 1:
            return "packed weights are the native backend's, in one process"
        if kind not in ("auto", "int8", "int4") or (kind == "auto" and self.header is None):
            return "packed weights are those of a GGUF file, as they are, or int8 and int4"
        if (reason := rejects_packed(self.config, device)) is not None:
            return reason
        if kind != "auto":
            return rejects_encoded(self.config)
        assert self.header is not None
        from hybridkv.gguf.saved import saved_types

        return rejects_types(self.config, saved_types(self.header))

    def expanded(
        self, kind: WeightKind, device: str, plain: Literal["f32", "bf16"], backend: BackendKind
    ) -> Expanded | None:
        """Return what becomes plain values on a card though nobody asked for it; None if nothing does.

        Parameters
        ----------
        kind, backend
            As they were asked for.
        device
            torch's device type.
        plain
            Type of plain values.
        """
        if device == "cpu" or kind != "auto" or backend == "eager" or self.header is None or self.n_ranks > 1:
            return None
        if (reason := self.rejects_packed(device, kind, backend)) is None:
            return None
        from hybridkv.gguf.saved import expanded_tensors

        return expanded_tensors(self.header, reason, 4 if plain == "f32" else 2)

    def held(
        self, kind: WeightKind, device: str, plain: Literal["f32", "bf16"], *, backend: BackendKind = "auto"
    ) -> Held:
        """Count the bytes of the weights as `load` will hold them; those of one rank.

        Parameters
        ----------
        kind
            How matrices are held.
        device
            torch's device type.
        plain
            Type of what is not packed.
        backend
            What was asked to run it.
        """
        runner: Runner = "eager"
        if kind != "plain" and self.n_ranks == 1 and runs_natively(self.config, device, backend):
            runner = "native"
        elif device == "cuda" and self.rejects_packed(device, kind, backend) is None:
            runner = "packed"
        if self.n_ranks > 1:
            from hybridkv.hf.load import count_parameters

            n = count_parameters(self.config, remote_code=self.remote_code, n_ranks=self.n_ranks)
            n_bytes = n * (4 if plain == "f32" else 2)
            return Held({plain: n_bytes}, n_bytes)
        loading: Literal["by tensor", "at once"] = "by tensor"
        if self.path.is_dir():
            from hybridkv.hf.checkpoint import saved_tensors as saved_in_directory
            from hybridkv.hf.load import widens

            tensors = saved_in_directory(self.path, self.config, remote_code=self.remote_code)
            if not widens(self.path, self.config, remote_code=self.remote_code):
                loading = "at once"
            if runner == "native" and multiplies(self.config):
                tensors = tuple(replace(tensor, type="f32") for tensor in tensors)
        else:
            from hybridkv.gguf.saved import saved_tensors

            assert self.header is not None
            tensors = saved_tensors(self.header, runner)
        if runner == "packed" and kind != "auto":
            tensors = tuple(encoded_tensor(tensor, kind) for tensor in tensors)
        return held_weights(tensors, kind, device=device, plain=plain, loading=loading, runner=runner)


def bundled_model() -> Path:
    """Return the path of the bundled reference model: 29 M parameters, 3 attention and 9 recurrent layers."""
    return Path(str(resources.files("hybridkv") / "data" / BUNDLED))


def bundled_text() -> Path:
    """Return the path of held-out English technical prose, 1.7 million characters that the bundled model never saw."""
    return Path(str(resources.files("hybridkv") / "data" / "heldout_long.txt"))


def describe(
    path: Path,
    *,
    remote_code: RemoteCode = "refused",
    n_ranks: int = 1,
    changes: ModelChanges = NO_CHANGES,
    pooling: PoolingAsked = "refused",
) -> Description:
    """Describe a model from its header or config alone.

    Parameters
    ----------
    changes
        What options change of it.
    n_ranks
        Over how many processes to shard it.
    pooling
        Of an embedding model, which is an error otherwise: what its file says, or an override.

    Raises
    ------
    ModelFileError
        If there is no model, or it is damaged or not understood.
    ModelError
        If its layers cannot be cached, or it cannot be sharded so.
    """
    if not path.exists():
        raise ModelFileError(
            f"no model at {path}", hint="`hybridkv models` lists names; without -m the bundled model runs"
        )
    if path.suffix == ".safetensors":
        raise ModelFileError(f"{path} is a part of a model", hint=f"give its directory: -m {path.parent}")
    header, pooled = None, None
    if path.is_dir() or path.name == "config.json":
        from hybridkv.hf.load import load_config

        directory = path if path.is_dir() else path.parent
        config, name = load_config(directory, remote_code=remote_code), directory.resolve().name
        change_config(config, changes)
        path = directory
    elif n_ranks > 1:
        raise ModelError(
            f"{path}: a GGUF model runs in one process, not on {n_ranks} ranks",
            hint="Transformers can shard a Hugging Face model directory",
        )
    else:
        header = changed(read_model(path), changes)
        if pooling != "refused":
            pooled, header = take_pooling(header, None if pooling == "of the file" else pooling)
        name, config = describe_gguf(header)
    if n_ranks > 1:
        check_plan(config)
    text = config.get_text_config(decoder=True)
    n_ctx_train = getattr(text, "max_position_embeddings", None)
    printable = "".join(c if c.isprintable() else "?" for c in name)  # a file's word, shown on a terminal
    facts = _facts(config, n_ranks)
    return Description(path, printable, config, facts, n_ctx_train, remote_code, n_ranks, changes, header, pooled)


def change_config(config: Config, changes: ModelChanges) -> None:
    """Change the config of a directory in place.

    Raises
    ------
    UsageError
        For metadata of GGUF files, and for RoPE that the model's class does not compute.
    """
    if changes.keys:
        raise UsageError("--override-kv with a model directory; allowed: with a GGUF file", hint="edit its config.json")
    change_rope(config, changes.rope)


def _facts(config: Config, n_ranks: int) -> tuple[LayerFacts, ...]:
    try:
        return layer_facts(config, n_ranks=n_ranks)
    except (ArithmeticError, AttributeError, TypeError) as error:
        raise ModelError(f"the config of {config.model_type!r} is not a valid model config: {error}") from error
