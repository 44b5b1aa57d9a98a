"""The words that people type who come from another program: commands, options, and words that need an option here."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

COMMANDS: Mapping[str, str] = {
    **dict.fromkeys(("list", "ls"), "`hybridkv models` lists the models on this machine"),
    **dict.fromkeys(("pull", "download", "get"), "-hf OWNER/NAME downloads a model and runs it"),
    "show": "`hybridkv plan -m MODEL` describes a model",
    **dict.fromkeys(("cli", "llama-cli", "main", "generate", "completion"), "`hybridkv run` is llama-cli's place"),
    **dict.fromkeys(("server", "llama-server", "api"), "`hybridkv serve` is llama-server's place"),
    **dict.fromkeys(("perplexity", "llama-perplexity"), "`hybridkv eval -m MODEL -f TEXT` measures perplexity"),
    **dict.fromkeys(("llama-bench", "batched-bench"), "`hybridkv bench decode -m MODEL` measures speed"),
    **dict.fromkeys(
        ("quantize", "llama-quantize"), "files run as they are; `run --weights int4` converts while loading"
    ),
    **dict.fromkeys(("rm", "cp", "create", "push"), "models are plain files: `hybridkv models` says where they lie"),
    **dict.fromkeys(("ps", "stop", "load", "unload"), "a server holds its one model until Ctrl-C; GET /metrics counts"),
}
"""Other programs' commands, and what to do here instead."""

OPTIONS: Mapping[str, str] = {
    "--format": "-j '{}' asks for JSON, -j SCHEMA for JSON of a schema",
    "--think": "--reasoning on, off or auto; --reasoning-effort LEVEL where the template reads it",
    "--hidethinking": "`hybridkv chat` folds thoughts with /fold; --reasoning off leaves them out",
    **dict.fromkeys(("--keepalive", "--nowordwrap", "--insecure"), "leave it out"),
}
"""Options of ollama's `run`."""


def stray_hint(words: Sequence[str], parsed: argparse.Namespace) -> str:
    """Say which option words need that stand alone, as `ollama run MODEL PROMPT` has them."""
    asks = [name for name in ("prompt", "file", "ids") if getattr(parsed, name, None) is not None]
    named = getattr(parsed, "model", None) is not None or getattr(parsed, "hf_repo", None) is not None
    takes_prompt, first, rest = hasattr(parsed, "prompt"), words[0], " ".join(words[1:])
    model = f"-m {shlex.quote(first)}"
    if named and takes_prompt:
        return f'a prompt needs its option: -p "{" ".join(words)}"'
    if not named and rest and takes_prompt and not asks and " " not in first:
        return f'a model and a prompt need their options: {model} --chat -p "{rest}"'
    if not named and (asks or not takes_prompt or _looks_like_a_model(first)):
        return f"a model needs its option: {model}" + "; `hybridkv chat` talks with it" * (takes_prompt and not asks)
    return f'a prompt needs its option: -p "{" ".join(words)}"; a model needs -m'


def _looks_like_a_model(word: str) -> bool:
    return " " not in word and (word.endswith(".gguf") or any(c in word for c in ":/") or Path(word).exists())
