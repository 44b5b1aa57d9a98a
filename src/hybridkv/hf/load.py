"""Load a Hugging Face directory: config, safetensors weights, tokenizer. Local files only.

Python code that a directory brings along runs only where `remote_code` is `trusted`. A directory that
brings code for a model type that Transformers has itself is loaded without it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hybridkv.errors import ModelError, ModelFileError
from hybridkv.hf.ranks import check_packages, check_plan, distributed_config, parameters_of_rank
from hybridkv.model.protocols import Config

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
    """Read the Transformers config of a model directory.

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
    change: Callable[[Any], None] | None = None,
    replace: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Load the model of a directory, in eval mode; with more than one rank, this rank's shard of it.

    Parameters
    ----------
    change
        Changes the config before the model is built.
    replace
        Gives what takes the place of a parameter of two dimensions. Called where the directory `widens`: the model is
        then loaded as bfloat16, and each parameter is replaced, or becomes `dtype`, by itself.

    Raises
    ------
    UsageError
        If several ranks need a package that is not installed.
    ModelFileError
        If the weights are missing, damaged, or not safetensors.
    ModelError
        If weights that the model needs are not in the files, or it cannot be sharded over several ranks.
    """
    from hybridkv.hf.attention import register  # imports Transformers' models, which a plan does not need

    register()
    config = load_config(directory, remote_code=remote_code)
    if change is not None:
        change(config)
    spread: dict[str, Any] = {}
    if n_ranks > 1:
        check_plan(config)
        check_packages()
        spread["distributed_config"] = distributed_config(n_ranks)
    if getattr(config, "quantization_config", None) is None:
        _check_dtypes(directory)
    try:
        bare = replace is not None and n_ranks == 1 and widens(directory, config, remote_code=remote_code)
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config.get_text_config(decoder=True),
            dtype=torch.bfloat16 if bare else dtype,
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
            hint += f"; or it cannot be sharded over {n_ranks} ranks: try another number, or one process"
        raise ModelFileError(f"the weights in {directory} cannot be loaded: {_one_line(error)}", hint=hint) from error
    mismatched = [f"{name} {list(found)} for {list(asked)}" for name, found, asked in report["mismatched_keys"]]
    for problem, names in (("are missing", report["missing_keys"]), ("have another shape", mismatched)):
        if names:
            named = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            raise ModelError(
                f"{len(names)} tensors {problem} in {directory}: {named}",
                hint="config.json and the weights are of different models",
            )
    if bare and replace is not None:
        model = _widened(model, dtype, attn_implementation, replace)
    return (model if spread else model.to(device)).eval()  # a rank's part is where it belongs


def widens(directory: Path, config: Config, *, remote_code: RemoteCode = "refused") -> bool:
    """Check whether a directory holds nothing but bfloat16, and so is loaded with parameters replaced one by one."""
    quantized = getattr(config, "quantization_config", None) is not None
    return not quantized and remote_code == "refused" and set(saved_types(directory)) == {"BF16"}


def saved_types(directory: Path) -> Counter[str]:
    """Count a directory's values by type; none without files that can be read."""
    counts: Counter[str] = Counter()
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    counts[part.get_dtype()] += prod(part.get_shape())
        except (OSError, SafetensorError):
            continue  # loading says what is wrong with it
    return counts


def _widened(loaded: Any, dtype: torch.dtype, attn_implementation: str, replace: Callable[[Tensor], Tensor]) -> Any:
    """Build a model of `dtype` with the parameters of a bfloat16 one, which loses them.

    Not the same model in place: what a class computes when it is built, such as rotary frequencies or an embedding's
    scale, would stay rounded to bfloat16.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=dtype, attn_implementation=attn_implementation)
    done: dict[str, Tensor] = {}  # by the name that a tied parameter has first
    first: dict[int, str] = {}
    persistent = loaded.state_dict(keep_vars=True).keys()
    places = [*loaded.named_parameters(remove_duplicate=False), *loaded.named_buffers(remove_duplicate=False)]
    for name, tensor in places:
        if name not in persistent:
            continue
        origin = first.setdefault(id(tensor), name)
        if origin == name:
            is_parameter = isinstance(tensor, nn.Parameter)
            value = replace(tensor) if is_parameter and tensor.dim() == 2 else tensor
            if value is tensor:
                value = tensor.detach().to(model.get_parameter_or_buffer(name).dtype)
            done[name] = nn.Parameter(value, requires_grad=False) if is_parameter else value
            done[name]._is_hf_initialized = True  # type: ignore[attr-defined]
            tensor.data = tensor.data.new_empty(0)  # free; the object stays, so that its id does
        _assign(model, name, done[origin])
    for name, buffer in list(model.named_non_persistent_buffers()):
        _assign(model, name, torch.empty_like(buffer, device="cpu"))
    # As in `from_pretrained`: this computes what was not loaded.
    model.tie_weights()
    model.initialize_weights()
    model.generation_config = loaded.generation_config
    return model


def _assign(model: Any, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


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
    """Load the tokenizer of a directory; None if it has none.

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
    """List the classes that a config or tokenizer_config takes from its directory; "" if none."""
    classes = _entry(file, "auto_map")
    names = classes.values() if isinstance(classes, dict) else [classes] if classes else []
    return ", ".join(str(name) for name in names)[:200]


def _entry(file: Path, key: str) -> Any:
    """Read one entry of a JSON file; None if there is no such entry, or if the file cannot be read."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content.get(key) if isinstance(content, dict) else None


def build_empty(config: Config, *, remote_code: RemoteCode = "refused") -> Any:
    """Build a model of this config without memory: all its tensors are on the meta device.

    Raises
    ------
    ModelError
        If the config describes no model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config.get_text_config(decoder=True), trust_remote_code=remote_code == "trusted"
            )
    except _NONSENSE as error:
        raise _no_model(config, error) from error


def count_parameters(config: Config, *, remote_code: RemoteCode = "refused", n_ranks: int = 1) -> int:
    """Count the weights of a model with this config, or of one of several ranks; tied ones count once.

    Raises
    ------
    ModelError
        If the config describes no model.
    """
    model = build_empty(config, remote_code=remote_code)
    return sum(p.numel() for p in model.parameters()) if n_ranks == 1 else parameters_of_rank(model, n_ranks)


def _no_model(config: Config, error: BaseException) -> ModelError:
    return ModelError(
        f"the config of {config.model_type!r} is not a valid model config: {_one_line(error)}",
        hint="a number in config.json is wrong or missing",
    )


def _one_line(error: BaseException) -> str:
    """Write an error's text without line breaks, cut where it becomes a report."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}" if not text else text if len(text) <= 300 else f"{text[:300]} ..."
