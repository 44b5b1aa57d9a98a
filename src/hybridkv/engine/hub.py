"""Models by name: from a hub, through huggingface_hub's cache.

Owns: which file of a repository is meant, and errors in our words. Downloads resume, and what is in the cache is used
without a network; both are huggingface_hub's.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridkv.errors import ModelFileError, UsageError

DEFAULT_QUANT = "Q4_K_M"
"""The quantization that llama.cpp takes of a repository by default."""

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ADDRESS = re.compile(r"^(?:https?://)?(?:hf\.co|huggingface\.co)/")
_SHARD = re.compile(r"-00001-of-(\d{5})\.gguf$")
_DIRECTORY = ("*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "merges.txt", "vocab*")


@dataclass(frozen=True, slots=True)
class HubModel:
    """The files to take from a hub.

    Attributes
    ----------
    repository
        `owner/name`.
    quant
        Part of a file's name, such as `Q8_0`; None for the default.
    file
        The file itself; None to choose one.
    token
        Lets one into repositories that are not open; None for the environment's.
    network
        Whether a hub may be asked.
    """

    repository: str
    quant: str | None = None
    file: str | None = None
    token: str | None = None
    network: bool = True


def parse_model(text: str, *, file: str | None = None, token: str | None = None, network: bool = True) -> HubModel:
    """Read `owner/name[:quant]`, also behind the hub's own address, as ollama's users write it.

    Raises
    ------
    UsageError
        For anything else.
    """
    repository, _, quant = _ADDRESS.sub("", text).rstrip("/").partition(":")
    if not _NAME.fullmatch(repository):
        raise UsageError(
            f"-hf {text!r}; allowed: owner/name or owner/name:quant", hint="try -hf Qwen/Qwen3-0.6B-GGUF:Q8_0"
        )
    return HubModel(repository, quant or None, file, token, network)


def is_repository(text: str) -> bool:
    """Check whether a text may name a repository: `owner/name`, and a type behind a colon."""
    name = _ADDRESS.sub("", text).partition(":")[0]
    return _NAME.fullmatch(name) is not None and not name.startswith(".") and not name.endswith(".gguf")


def is_default(name: str) -> bool:
    """Check whether a file is of the type that is taken if none is named."""
    return _of_quant(DEFAULT_QUANT).search(name) is not None


def _of_quant(quant: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|[-_./]){re.escape(quant)}(?:[-./]|$)", re.IGNORECASE)


def fetch_model(model: HubModel) -> Path:
    """Return the file or directory of a model, downloaded if it is not in the cache.

    Raises
    ------
    UsageError
        For a repository or file that is not there.
    ModelFileError
        For a hub that cannot be reached while the cache lacks the model.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    unreached: tuple[type[BaseException], ...] = (getattr(errors, "HTTPError", OSError), OSError)
    try:
        return _fetch(model)
    except errors.GatedRepoError as error:
        raise UsageError(
            f"-hf {model.repository}: its owner requires consent first",
            hint="agree on the model's page, and give a token with -hft or HF_TOKEN",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"-hf {model.repository}: no such repository on the hub, or this token has no access",
            hint="check the name; private repositories need HF_TOKEN or -hft",
        ) from error
    except unreached as error:
        return _cached(model, error)


def _fetch(model: HubModel) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, snapshot_download

    if not model.network or is_offline_mode():
        return _cached(model, None)
    where = os.environ.get("HF_ENDPOINT") or None
    # Not list_repo_files, which tries for 23 s to reach a hub that is not there before the cache is asked.
    info = HfApi(endpoint=where, token=model.token).model_info(model.repository)
    names = [each.rfilename for each in info.siblings or ()]
    files = choose_files(names, model)
    if not files:
        return Path(
            snapshot_download(model.repository, allow_patterns=list(_DIRECTORY), endpoint=where, token=model.token)
        )
    paths = [hf_hub_download(model.repository, name, endpoint=where, token=model.token) for name in files]
    return Path(paths[0])


def _cached(model: HubModel, why: BaseException | None) -> Path:
    """Look up a model in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason = "no network is to be used" if why is None else f"the hub cannot be asked ({_line(why)})"
    missing = f"-hf {model.repository}: {reason}, and the cache has no such model"
    hint = "`hybridkv models` lists what is there"
    try:
        directory = Path(snapshot_download(model.repository, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise ModelFileError(missing, hint=hint) from error
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    try:
        files = choose_files(names, model)
    except UsageError as error:
        raise ModelFileError(f"{missing}: {error.message}", hint=hint) from error
    if not files and not (directory / "config.json").is_file():
        raise ModelFileError(missing, hint=hint)
    return directory / files[0] if files else directory


def choose_files(names: Sequence[str], model: HubModel) -> list[str]:
    """Return the GGUF file that is meant, all its shards; none for a directory of safetensors.

    Raises
    ------
    UsageError
        With what there is.
    """
    found = sorted(name for name in names if name.endswith(".gguf") and not _is_other(name))
    first = [name for name in found if not re.search(r"-\d{5}-of-\d{5}\.gguf$", name) or _SHARD.search(name)]
    if model.file is not None:
        if model.file not in names:
            raise UsageError(
                f"-hff {model.file!r}; {model.repository} has: {', '.join(found) or 'no GGUF file'}",
                hint="name one of these" if found else "leave -hff out",
            )
        chosen = model.file
    elif not first and model.quant is None:
        return []
    else:
        quant = model.quant or DEFAULT_QUANT
        fitting = [name for name in first if _of_quant(quant).search(name)]
        if not fitting and model.quant is not None:
            raise UsageError(
                f"-hf {model.repository}:{quant}; it has: {', '.join(first) or 'no GGUF file'}",
                hint="name one of these with -hff, or by its type behind the colon" if first else "leave the type out",
            )
        chosen = (fitting or first)[0]
    if (match := _SHARD.search(chosen)) is None:
        return [chosen]
    return [f"{chosen[: match.start()]}-{n:05d}-of-{match[1]}.gguf" for n in range(1, int(match[1]) + 1)]


def _is_other(name: str) -> bool:
    """Check whether a file is a part for images or an importance matrix."""
    base = name.rpartition("/")[2].lower()
    return base.startswith(("mmproj", "mtp-")) or "imatrix" in base


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
