"""Every metadata key, added to, changed in or removed from a small file of each architecture.

`measured()` gives what is made of each such file here and in llama.cpp. The keys are gguf-py's, and a few that it does
not list. `test_keys_differential.py` asserts on the outcome, and `bench/gguf_keys.py` writes it down.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader
from gguf.constants import Keys

from hybridkv.engine.convert import convert
from hybridkv.errors import ModelFileError
from hybridkv.gguf.architectures import ARCHITECTURES
from hybridkv.gguf.load import load_gguf
from tests.gguf.test_architectures import VARIANTS, stirred
from tests.gguf.write_qwen35 import Draft, Key
from tests.oracles.llama_cpp_many import Server

IDS = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(0)).tolist()

MORE = (
    "rope.scale_linear",
    "attention.recurrent_layers",
    "attention.value_scale",
    "attention.rope_pattern",
    "norm_top_k_prob",
    "ssm.v_head_reordered",
)
"""Keys that gguf-py does not list: llama.cpp's and ollama's."""

DEVIATIONS: Mapping[tuple[str, str], str] = {
    **{
        (
            architecture,
            f"rope.scaling.yarn_{key}",
        ): "llama.cpp passes over it; here it is what it is in a model's config"
        for architecture in ARCHITECTURES
        for key in ("attn_factor", "beta_fast", "beta_slow")
    },
    **{
        (
            architecture,
            "attention.layer_norm_rms_epsilon",
        ): "llama.cpp takes it for the delta rule's norm of queries and "
        "keys as well, which is fixed at 1e-6 in Transformers"
        for architecture in ("qwen35", "qwen35moe", "qwen3next")
    },
    ("gemma3", "attention.scale"): "llama.cpp passes over it and knows the 27B model by its layers",
    ("gemma3", "rope.freq_base"): "without it llama.cpp takes 10000, and here it is what all of Gemma 3's models have",
}
"""Where the logits differ from llama.cpp's on purpose."""

_VARIANT = {"granitehybrid": 2}  # the one with RoPE

_TRUE = (
    "use_parallel_residual",
    "swin_norm",
    "rope.scaling.finetuned",
    "expert_weights_norm",
    "norm_top_k_prob",
    "ssm.dt_b_c_rms",
    "ssm.v_head_reordered",
)
_REALS: Mapping[str, float] = {
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 0.5,
    "attention.layer_norm_epsilon": 0.1,
    "attention.layer_norm_rms_epsilon": 0.1,
    "attention.group_norm_epsilon": 0.1,
    "attention.scale": 0.25,
    "attention.output_scale": 2.0,
    "attention.value_scale": 2.0,
    "attention.temperature_scale": 0.5,
    "expert_weights_scale": 2.0,
    "logit_scale": 2.0,
    "residual_scale": 2.0,
    "embedding_scale": 2.0,
    "attn_logit_softcapping": 2.0,
    "router_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
    "rope.freq_base": 500.0,
    "rope.freq_base_swa": 500.0,
    "rope.scale_linear": 4.0,
    "rope.scaling.factor": 4.0,
    "rope.scaling.alpha": 4.0,
    "rope.scaling.attn_factor": 4.0,
}
_YARN: Mapping[str, Key] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 1024,
}
_TOGETHER: Mapping[str, list[Mapping[str, Key]]] = {
    "rope.scaling.type": [
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "yarn"},
    ],
    "rope.scaling.factor": [
        {"rope.scaling.factor": 0.0, "rope.scale_linear": 4.0},
        {"rope.scaling.factor": 4.0, "rope.scale_linear": 8.0},
    ],
    "rope.scaling.attn_factor": [
        {"rope.scaling.attn_factor": 1.5, "rope.scaling.factor": 4.0},
        {**_YARN, "rope.scaling.attn_factor": 1.5},
        {"rope.scaling.type": "none", "rope.scaling.attn_factor": 1.5},
    ],
    "rope.scaling.original_context_length": [_YARN, {"rope.scaling.original_context_length": 16}],
    "rope.scaling.yarn_log_multiplier": [
        {**_YARN, "rope.scaling.yarn_log_multiplier": 0.5},
        {"rope.scaling.yarn_log_multiplier": 0.5},
    ],
    "rope.scaling.yarn_ext_factor": [
        {**_YARN, "rope.scaling.yarn_ext_factor": 0.5},
        {"rope.scaling.yarn_ext_factor": 0.5},
    ],
    "rope.scaling.yarn_attn_factor": [
        {**_YARN, "rope.scaling.yarn_attn_factor": 1.7},
        {"rope.scaling.yarn_attn_factor": 1.7},
    ],
    "rope.scaling.yarn_beta_fast": [
        {**_YARN, "rope.scaling.yarn_beta_fast": 64.0},
        {"rope.scaling.yarn_beta_fast": 64.0},
    ],
    "rope.scaling.yarn_beta_slow": [
        {**_YARN, "rope.scaling.yarn_beta_slow": 4.0},
        {"rope.scaling.yarn_beta_slow": 4.0},
    ],
    "attention.causal": [{"attention.causal": False}],
    "pooling_type": [{"pooling_type": 1}, {"pooling_type": 0}],
    "tensor_data_layout": [{"tensor_data_layout": "reference"}],
    "classifier.output_labels": [{"classifier.output_labels": ["yes", "no"]}],
    "rope.dimension_sections": [{"rope.dimension_sections": [2, 1, 1, 0]}],
    "expert_used_count": [{"expert_used_count": 5}],
    "expert_gating_func": [{"expert_gating_func": number} for number in (1, 2, 3)],
    "expert_group_count": [{"expert_group_count": 2, "expert_group_used_count": 1}],
    "attention.sliding_window": [{"attention.sliding_window": 6}, {"attention.sliding_window": 4096}],
}
_FLAGS_PER_LAYER = ("attention.recurrent_layers", "attention.rope_pattern")
_REALS_PER_LAYER = ("swiglu_clamp_exp", "swiglu_clamp_shexp", "activation_sparsity_scale")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file.

    Parameters
    ----------
    key
        The key it is about, without the architecture's prefix.
    change
        What was done to the file.
    verdict
        `read`: the config is another; `harmless`: it is the same; `noticed`: the same, and a notice names the key;
        `refused`.
    error
        What was said of a refused file.
    spread
        Standard deviation of the logits of the file without the change.
    moved
        Largest change of a logit in llama.cpp, None where it takes no such file.
    apart
        Largest difference between the logits here and in llama.cpp.
    """

    key: str
    change: str
    verdict: str
    error: str
    spread: float
    moved: float | None
    apart: float | None


def names() -> list[str]:
    """The keys that belong to an architecture, without its prefix."""
    found = set(MORE)

    def walk(group: type) -> None:
        for value in vars(group).values():
            if isinstance(value, type):
                walk(value)
            elif isinstance(value, str) and value.startswith("{arch}."):
                name = value.removeprefix("{arch}.")
                found.update(name.format(dense=dense) for dense in ("dense_2", "dense_3"))

    walk(Keys)
    return sorted(found)


@cache
def draft(architecture: str) -> Draft:
    """The file of a random model, keys without prefix where they are the architecture's."""
    family, changes = VARIANTS[architecture][_VARIANT.get(architecture, 0)]
    with TemporaryDirectory() as name:
        stirred(family, **changes).save_pretrained(name)
        read = GGUFReader(convert(Path(name), Path(name) / "x.gguf", weights="f32").path)
        keys = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
        del keys["general.architecture"]
        tensors = {tensor.name: tensor.data.copy() for tensor in read.tensors}
    return Draft(architecture, {k.removeprefix(f"{architecture}."): v for k, v in keys.items()}, tensors)


def written(architecture: str, change: Mapping[str, Key | None], path: Path) -> Path:
    """Write the file with keys changed, or removed where the value is None."""
    base = draft(architecture)
    keys = {key: value for key, value in {**base.keys, **change}.items() if value is not None}
    shared = ("general.", "tokenizer.")
    named = {key if key.startswith(shared) else f"{architecture}.{key}": value for key, value in keys.items()}
    return Draft(architecture, named, base.tensors).write(path)


def changes(architecture: str, name: str) -> Iterator[dict[str, Key | None]]:
    """What to do to a file for a key: values that mean something, and the key's absence where the file has it."""
    keys, layers = draft(architecture).keys, draft(architecture).keys["block_count"]
    assert isinstance(layers, int)
    if name in keys:
        yield {name: None}
    yield from (dict(each) for each in _TOGETHER.get(name, ()))
    if name in _FLAGS_PER_LAYER:
        yield {name: [bool(layer % 2) for layer in range(layers)]}
    elif name in _REALS_PER_LAYER:
        yield {name: [0.5] * layers}
    elif name in _TRUE:
        yield from ({name: flag} for flag in (True, False) if keys.get(name) is not flag)
    elif name in _REALS:
        yield {name: _REALS[name]}
    elif name in keys:
        value = keys[name]
        if isinstance(value, int):
            yield from ({name: other} for other in (value // 2, 2 * value))
        elif isinstance(value, list):
            yield {name: value[::-1]}
    elif name not in _TOGETHER:
        yield {name: 2}


def measured(architecture: str, server: Server, directory: Path) -> Iterator[Outcome]:
    """Every case of an architecture."""
    path = directory / "x.gguf"
    plain = load_gguf(written(architecture, {}, path), attn_implementation="eager").model
    theirs = server.logits(path)
    assert theirs is not None, f"llama.cpp does not take the {architecture} file"
    apart = float(np.abs(_logits(plain) - theirs).max())
    spread = float(theirs.std())
    yield Outcome("", "nothing", "read", "", spread, 0.0, apart)
    for name in names():
        for change in changes(architecture, name):
            written(architecture, change, path)
            yield _outcome(name, change, path, plain.config.to_dict(), theirs, server.logits(path))


def as_close(outcome: Outcome, plain: Outcome) -> bool:
    """Whether the logits are as close to llama.cpp's as those of the file without the change, or nearly."""
    assert plain.apart is not None
    return outcome.apart is None or outcome.apart < max(10 * plain.apart, 1e-3 * plain.spread)


def _outcome(
    name: str,
    change: Mapping[str, Key | None],
    path: Path,
    plain: dict[str, Any],
    base: npt.NDArray[np.float32],
    theirs: npt.NDArray[np.float32] | None,
) -> Outcome:
    verdict, error, apart = "refused", "", None
    try:
        loaded = load_gguf(path, attn_implementation="eager")
    except ModelFileError as raised:
        error = raised.message.removeprefix(f"{path}: ")
    else:
        noticed = any(name in notice for notice in loaded.notices)
        verdict = "noticed" if noticed else "read" if loaded.model.config.to_dict() != plain else "harmless"
        apart = None if theirs is None else float(np.abs(_logits(loaded.model) - theirs).max())
    moved = None if theirs is None else float(np.abs(theirs - base).max())
    return Outcome(name, _shown(change), verdict, error, float(base.std()), moved, apart)


def _logits(model: Any) -> npt.NDArray[np.float32]:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows: npt.NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].numpy()
    return rows


def _shown(change: Mapping[str, Key | None]) -> str:
    return ", ".join(f"without {key}" if value is None else f"{key} = {value}" for key, value in change.items())
