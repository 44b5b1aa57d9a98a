"""Find a model, say what it is from its header alone, and load it: GGUF files and Hugging Face directories.

The one place that knows both kinds. `describe` reads no weights, so that types are resolved to kernels and
memory is planned before anything large is touched; `load` then loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from hybridkv.cache import LayerFacts
from hybridkv.errors import ModelError, ModelFileError
from hybridkv.gguf.load import describe_gguf, load_gguf
from hybridkv.gguf.tokenizer import TURN_ENDS
from hybridkv.hf import IMPLEMENTATION, WeightKind, layer_facts, pack_model, packed_parameter, vocabulary_rows
from hybridkv.hf.control_words import ControlWords
from hybridkv.hf.load import RemoteCode, count_parameters, load_config, load_tokenizer, load_weights
from hybridkv.hf.ranks import check_plan
from hybridkv.hf.step import save_unpacked
from hybridkv.hf.torchao_weights import quantize_weights

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
        Over how many processes it is cut; `facts` are those of one.
    """

    path: Path
    name: str
    config: Any
    facts: tuple[LayerFacts, ...]
    n_ctx_train: int | None
    remote_code: RemoteCode = "refused"
    n_ranks: int = 1

    def weight_bytes(self, bits: float) -> int:
        """Bytes of the loaded weights at `bits` a parameter; those of one rank."""
        return int(count_parameters(self.config, remote_code=self.remote_code, n_ranks=self.n_ranks) * bits / 8)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run; `tokenizer` is None if it has none."""

    description: Description
    model: Any
    tokenizer: Any | None
    notices: tuple[str, ...] = ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        end = self.model.generation_config.eos_token_id
        if end is None:
            end = self.model.config.get_text_config(decoder=True).eos_token_id
        return () if end is None else (end,) if isinstance(end, int) else tuple(end)


def bundled_model() -> Path:
    """The reference model that comes with the package: 29 M parameters, 3 attention and 9 recurrent layers."""
    return Path(str(resources.files("hybridkv") / "models" / BUNDLED))


def bundled_text() -> Path:
    """Held-out English technical prose, 1.7 million characters, that the bundled model was not trained on."""
    return Path(str(resources.files("hybridkv") / "models" / "heldout_long.txt"))


def describe(path: Path, *, remote_code: RemoteCode = "refused", n_ranks: int = 1) -> Description:
    """What a model is, from its header or config alone.

    Parameters
    ----------
    n_ranks
        Over how many processes it is to be cut.

    Raises
    ------
    ModelFileError
        If there is no model, or it is damaged or not understood.
    ModelError
        If its layers cannot be cached, or it cannot be cut so.
    """
    if not path.exists():
        raise ModelFileError(f"no model at {path}", hint="leave -m out to run the bundled model")
    if path.suffix == ".safetensors":
        raise ModelFileError(f"{path} is a part of a model", hint=f"give its directory: -m {path.parent}")
    if path.is_dir() or path.name == "config.json":
        directory = path if path.is_dir() else path.parent
        config, name = load_config(directory, remote_code=remote_code), directory.resolve().name
        path = directory
    elif n_ranks > 1:
        raise ModelError(
            f"{path}: a GGUF model runs in one process, not on {n_ranks} ranks",
            hint="a Hugging Face model directory can be cut; Transformers does it",
        )
    else:
        name, config = describe_gguf(path)
    if n_ranks > 1:
        check_plan(config)
    text = config.get_text_config(decoder=True)
    n_ctx_train = getattr(text, "max_position_embeddings", None)
    printable = "".join(c if c.isprintable() else "?" for c in name)  # a file's word, shown on a terminal
    return Description(path, printable, config, _facts(config, n_ranks), n_ctx_train, remote_code, n_ranks)


def _facts(config: Any, n_ranks: int) -> tuple[LayerFacts, ...]:
    try:
        return layer_facts(config, n_ranks=n_ranks)
    except (ArithmeticError, AttributeError, TypeError) as error:
        raise ModelError(f"the config of {config.model_type!r} describes no model: {error}") from error


def load(description: Description, *, dtype: torch.dtype, device: str, weights: WeightKind = "plain") -> Loaded:
    """The model and its tokenizer.

    Parameters
    ----------
    weights
        How matrices are held. On the CPU they are packed one by one as they are read, so that no more than one is ever
        held twice; on other devices, int8 and int4 are torchao's, made once the model is loaded.

    Raises
    ------
    UsageError
        If that needs torchao and it is not installed.
    ModelFileError, ModelError
        For whatever is wrong with the files.
    """
    pack = weights != "plain" and torch.device(device).type == "cpu"
    if description.path.is_dir():
        code = description.remote_code
        model = load_weights(
            description.path,
            dtype=dtype,
            device=device,
            attn_implementation=IMPLEMENTATION,
            remote_code=code,
            n_ranks=description.n_ranks,
        )
        if pack:
            pack_model(model, weights)
        loaded = Loaded(description, model, load_tokenizer(description.path, remote_code=code))
        _add_turn_ends(loaded)
    else:
        replace = partial(packed_parameter, kind=weights, n_vocab=vocabulary_rows(description.config)) if pack else None
        gguf = load_gguf(
            description.path, dtype=dtype, device=device, attn_implementation=IMPLEMENTATION, replace=replace
        )
        loaded = Loaded(description, gguf.model, gguf.tokenizer, gguf.notices)
    if not pack and (weights == "int8" or weights == "int4"):
        quantize_weights(loaded.model, weights)
    if pack:
        save_unpacked(loaded.model)
    return loaded


def _add_turn_ends(loaded: Loaded) -> None:
    """Have every turn end of the vocabulary end a generation, as in GGUF files: configs often name the end of text."""
    tokenizer = loaded.tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        return
    words, n_vocab = ControlWords(tokenizer).ids, vocabulary_rows(loaded.model.config)
    found = [*loaded.end_ids, tokenizer.eos_token_id, *(words.get(word) for word in TURN_ENDS)]
    ends = [index for index in dict.fromkeys(found) if index is not None and index < n_vocab]
    if ends:
        loaded.model.generation_config.eos_token_id = ends
