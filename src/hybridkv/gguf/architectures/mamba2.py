"""Tables of Mamba-2 mixers, which several architectures share.

How files differ from Transformers: `ssm_a` holds `-exp(A_log)`; `ssm_a` and `ssm_d` are columns; `ssm_norm` is
folded by group; the convolution lacks its unit dimension. Projections have the same row order: gate, x, B, C, dt.
Source: llama.cpp conversion/mamba.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hybridkv.gguf.architectures.record import LOG_DECAY, Config, Fields, Keys, TensorRule
from hybridkv.gguf.metadata import Metadata

Shape = Callable[[Config], tuple[int, ...]]


def mixer(module: str, heads: str, groups: str, inner: Callable[[Config], int]) -> tuple[TensorRule, ...]:
    """Return the rules of a mixer.

    Parameters
    ----------
    module
        Its name in a layer.
    heads, groups
        The config's names for the number of heads and of groups.
    inner
        Values of all heads together.
    """

    def column(config: Config) -> tuple[int, ...]:
        return getattr(config, heads), 1

    def folded(config: Config) -> tuple[int, ...]:
        n_groups = getattr(config, groups)
        return n_groups, inner(config) // n_groups

    return (
        TensorRule("ssm_in.weight", f"{module}.in_proj.weight"),
        TensorRule("ssm_conv1d.weight", f"{module}.conv1d.weight"),
        TensorRule("ssm_conv1d.bias", f"{module}.conv1d.bias"),
        TensorRule("ssm_dt.bias", f"{module}.dt_bias"),
        TensorRule("ssm_dt", f"{module}.dt_bias"),  # ollama's name
        TensorRule("ssm_a", f"{module}.A_log", values=LOG_DECAY, shape=column),
        TensorRule("ssm_d", f"{module}.D", shape=column),
        TensorRule("ssm_norm.weight", f"{module}.norm.weight", shape=folded),
        TensorRule("ssm_out.weight", f"{module}.out_proj.weight"),
    )


def mixer_fields(meta: Metadata) -> dict[str, int]:
    """Return a mixer's sizes by short names, checked: `inner`, `heads`, `head_dim`, `groups`."""
    inner, heads = meta.integer("ssm.inner_size"), meta.integer("ssm.time_step_rank")
    groups = meta.integer("ssm.group_count")
    if inner % heads or inner % groups or heads % groups:
        meta.fail(f"{inner} values do not divide into {heads} heads in {groups} groups")
    return {"inner": inner, "heads": heads, "head_dim": inner // heads, "groups": groups}


SIZES = {
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_d_state": "ssm.state_size",
    "mamba_n_heads": "ssm.time_step_rank",
    "mamba_n_groups": "ssm.group_count",
}
"""Under the names that most configs use."""


def bamba_fields(meta: Metadata) -> Fields:
    """Return what `SIZES` cannot say of these mixers."""
    return {
        "mamba_d_head": mixer_fields(meta)["head_dim"],
        "mamba_conv_bias": any(info.name.endswith("ssm_conv1d.bias") for info in meta.header.tensors),
        "mamba_proj_bias": False,
    }


def limited(config: Config) -> bool:
    """Check whether a config bounds its time steps, which this format has no place for."""
    low, high = config.time_step_limit
    return bool(low > 0 or high < math.inf)


def inner_keys(inner: int) -> Keys:
    """Return the key of a mixer's width."""
    return {"ssm.inner_size": inner}
