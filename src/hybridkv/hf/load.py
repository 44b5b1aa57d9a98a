"""Load a Hugging Face directory: config, safetensors weights, tokenizer. Local files only.

Python code that a directory brings along runs only where `remote_code` is `trusted`. A directory that
brings code for a model type that Transformers has itself is loaded without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hybridkv.errors import ModelError, ModelFileError
from hybridkv.hf.attention import register
from hybridkv.hf.ranks import check_packages, check_plan, parameters_of_rank, share

RemoteCode = Literal["refused", "trusted"]
"""Whether Python code in a model directory may run."""

_TRUST_HINT = "read that code, and if you trust it, add --trust-remote-code"

_NO_MODEL = (ArithmeticError, AttributeError, LookupError, TypeError)
"""What Transformers stumbles over, here or there, while it builds what a senseless config asks for."""

_NONSENSE = (*_NO_MODEL, RuntimeError, ValueError)
"""These, and what it raises on purpose."""

_DTYPES = ("F64", "F32", "F16", "BF16")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_config(directory: Path, *, remote_code: RemoteCode = "refused") -> Any:
    """The Transformers config of a model directory.

    Raises
    ------
    ModelFileError
        If config.json is missing or not understood, or if only code from the directory could understand it.
    """
    if not (directory / "config.json").is_file():
        adapter = directory / "adapter_config.json"
        if adapter.is_file():
            base = str(_entry(adapter, "base_model_name_or_path"))[:100]
            raise ModelFileError(
                f"{directory} is an adapter of {base!r}; allowed: a whole model",
                hint="merge it into its base model first (peft: merge_and_unload), save that, and give its directory",
            )
        raise ModelFileError(
            f"{directory} holds no config.json", hint="give a .gguf file or a Hugging Face model directory"
        )
    trusted = remote_code == "trusted"
    code, model_type = _own_code(directory / "config.json"), _entry(directory / "config.json", "model_type")
    if code and not trusted and model_type not in CONFIG_MAPPING:
        raise ModelFileError(
            f"{directory}: its model type {str(model_type)[:60]!r} needs Python code from the directory: {code}",
            hint=_TRUST_HINT,
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
    except (OSError, StrictDataclassError, *_NONSENSE) as error:
        raise ModelFileError(f"{directory / 'config.json'} cannot be read: {_one_line(error)}") from error


def load_weights(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: str,
    attn_implementation: str,
    remote_code: RemoteCode = "refused",
    n_ranks: int = 1,
) -> Any:
    """The model of a directory, in eval mode; with more than one rank, this rank's part of it.

    Raises
    ------
    UsageError
        If several ranks need a package that is not installed.
    ModelFileError
        If the weights are missing, damaged, or not safetensors.
    ModelError
        If weights that the model needs are not in the files, or it cannot be cut for several ranks.
    """
    register()
    config = load_config(directory, remote_code=remote_code)
    spread: dict[str, Any] = {}
    if n_ranks > 1:
        check_plan(config)
        check_packages()
        spread["distributed_config"] = share(n_ranks)
    if getattr(config, "quantization_config", None) is None:
        _check_dtypes(directory)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config.get_text_config(decoder=True),
            dtype=dtype,
            attn_implementation=attn_implementation,
            local_files_only=True,
            trust_remote_code=remote_code == "trusted",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused below by name
            **spread,
        )
    except _NO_MODEL as error:
        raise _no_model(config, error) from error
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        hint = "a file is missing or damaged, or config.json is of another model"
        if n_ranks > 1:
            hint += f"; or it cannot be cut for {n_ranks} ranks: try another number, or one process"
        raise ModelFileError(f"the weights in {directory} cannot be loaded: {_one_line(error)}", hint=hint) from error
    mismatched = [f"{name} {list(found)} for {list(asked)}" for name, found, asked in report["mismatched_keys"]]
    for problem, names in (("are missing", report["missing_keys"]), ("have another shape", mismatched)):
        if names:
            named = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            raise ModelError(
                f"{len(names)} tensors {problem} in {directory}: {named}",
                hint="the config and the weights do not belong together",
            )
    return (model if spread else model.to(device)).eval()  # a rank's part is where it belongs


def _check_dtypes(directory: Path) -> None:
    """Refuse weights that are no floats: Transformers would cast them, scale or no scale.

    What cannot be read is left to the loading itself, which says so.
    """
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            continue
        for key, dtype in types.items():
            if dtype not in _DTYPES:
                raise ModelFileError(
                    f"tensor {key!r} in {path} has dtype {dtype}; allowed: {', '.join(_DTYPES)}",
                    hint="the checkpoint is quantized, and its config does not say how",
                )


def load_tokenizer(directory: Path, *, remote_code: RemoteCode = "refused") -> Any | None:
    """The tokenizer of a directory, or None if it has none.

    Raises
    ------
    ModelFileError
        If its files are damaged, or if only code from the directory could understand them.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        trusted = remote_code == "trusted"
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
    except (OSError, *_NONSENSE) as error:
        if remote_code == "refused" and (code := _own_code(directory / "tokenizer_config.json")):
            raise ModelFileError(
                f"{directory}: its tokenizer needs Python code from the directory: {code}", hint=_TRUST_HINT
            ) from error
        raise ModelFileError(
            f"the tokenizer in {directory} cannot be loaded: {_one_line(error)}",
            hint="tokenizer.json or tokenizer_config.json is damaged, or of a kind that Transformers cannot load",
        ) from error


def _own_code(file: Path) -> str:
    """The classes that a config or tokenizer_config takes from its directory; "" if none."""
    classes = _entry(file, "auto_map")
    names = classes.values() if isinstance(classes, dict) else [classes] if classes else []
    return ", ".join(str(name) for name in names)[:200]


def _entry(file: Path, key: str) -> Any:
    """One entry of a JSON file; None if there is no such entry, or if the file is for others to complain about."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content.get(key) if isinstance(content, dict) else None


def count_parameters(config: Any, *, remote_code: RemoteCode = "refused", n_ranks: int = 1) -> int:
    """Weights of a model with this config, tied ones once, or of one of several ranks. Builds it without memory.

    Raises
    ------
    ModelError
        If the config describes no model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config.get_text_config(decoder=True), trust_remote_code=remote_code == "trusted"
            )
    except _NONSENSE as error:
        raise _no_model(config, error) from error
    return sum(p.numel() for p in model.parameters()) if n_ranks == 1 else parameters_of_rank(model, n_ranks)


def _no_model(config: Any, error: BaseException) -> ModelError:
    return ModelError(
        f"the config of {config.model_type!r} describes no model: {_one_line(error)}",
        hint="a number in config.json is wrong or missing",
    )


def _one_line(error: BaseException) -> str:
    """An error's text without its line breaks, cut where it becomes a report."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}" if not text else text if len(text) <= 300 else f"{text[:300]} ..."
