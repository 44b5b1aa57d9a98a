"""Models that lie on this machine: in huggingface's cache, in ollama's and LM Studio's folders, in llama.cpp's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LATER_SHARD = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_OLLAMA_MODEL = "application/vnd.ollama.image.model"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that is there.

    Attributes
    ----------
    name
        What `-m` takes.
    path
        Its file or directory.
    n_bytes
        Of all its files.
    owner
        Whose folder it is in.
    """

    name: str
    path: Path
    n_bytes: int
    owner: str


def local_models() -> list[LocalModel]:
    """Return all of them, by owner and name."""
    found = [*_huggingface(), *_ollama(), *_lm_studio(), *_llama_cpp()]
    return sorted(found, key=lambda model: (model.owner, model.name.lower()))


def model_named(name: str) -> Path | None:
    """Return the model of that name, None if there is none; ollama's newest needs no tag."""
    paths = {model.name: model.path for model in local_models()}
    return paths.get(name) or paths.get(f"{name}:latest")


def _huggingface() -> Iterator[LocalModel]:
    from huggingface_hub import constants

    for repository in _directories(Path(constants.HF_HUB_CACHE), "models--*"):
        name = repository.name.removeprefix("models--").replace("--", "/")
        for snapshot in _directories(repository / "snapshots", "*"):
            files = _ggufs(snapshot)
            for path in files:
                label = path.relative_to(snapshot).as_posix()
                yield LocalModel(f"{name}/{label}", path, _size(path), "huggingface")
            weights = [p for p in snapshot.glob("*.safetensors") if p.is_file()]
            if weights and (snapshot / "config.json").is_file():
                yield LocalModel(name, snapshot, sum(p.stat().st_size for p in weights), "huggingface")


def _ollama() -> Iterator[LocalModel]:
    own = os.environ.get("OLLAMA_MODELS")
    roots = [Path(own)] if own else [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]
    for root in roots:
        manifests = root / "manifests"
        for manifest in _files(manifests):
            *parts, model, tag = manifest.relative_to(manifests).parts
            digest = _model_of(manifest)
            if len(parts) < 2 or digest is None:
                continue
            path = root / "blobs" / digest.replace(":", "-")
            if path.is_file():
                space = "" if parts[-1] == "library" else f"{parts[-1]}/"
                yield LocalModel(f"{space}{model}:{tag}", path, path.stat().st_size, "ollama")


def _model_of(manifest: Path) -> str | None:
    """Read the digest of the model in one of ollama's manifests."""
    try:
        layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
        return next((str(layer["digest"]) for layer in layers if layer["mediaType"] == _OLLAMA_MODEL), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # another program's file, half written perhaps


def _lm_studio() -> Iterator[LocalModel]:
    for root in (Path.home() / ".lmstudio/models", Path.home() / ".cache/lm-studio/models"):
        for path in _ggufs(root):
            yield LocalModel(path.relative_to(root).as_posix(), path, _size(path), "LM Studio")


def _llama_cpp() -> Iterator[LocalModel]:
    root = Path(os.environ.get("LLAMA_CACHE") or Path.home() / ".cache/llama.cpp")
    for path in _ggufs(root):
        yield LocalModel(path.relative_to(root).as_posix(), path, _size(path), "llama.cpp")


def _ggufs(root: Path) -> list[Path]:
    """List the GGUF files of models below a directory; of a split model its first, and no parts for images."""
    return [
        path
        for path in _files(root)
        if path.suffix == ".gguf" and not _LATER_SHARD.search(path.name) and not path.name.startswith("mmproj")
    ]


def _size(path: Path) -> int:
    """Count the bytes of a file and of the split model's later parts."""
    match = re.search(r"-00001-of-(\d{5})\.gguf$", path.name)
    shards = path.parent.glob(f"{path.name[: match.start()]}-*-of-{match[1]}.gguf") if match else [path]
    return sum(shard.stat().st_size for shard in shards)


def _files(root: Path) -> list[Path]:
    """List all files below a directory; none where it cannot be read."""
    return sorted(Path(at) / name for at, _, names in os.walk(root) for name in names if (Path(at) / name).is_file())


def _directories(root: Path, pattern: str) -> list[Path]:
    return sorted(path for path in root.glob(pattern) if path.is_dir())
