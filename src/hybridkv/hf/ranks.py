"""Tensor parallelism: what one rank of a model holds that Transformers has spread over several processes.

Transformers' own plans say which projections are sharded; `hybridkv.model.ranks` says what follows for the cache.

Processes are torchrun's: it says in the environment how many there are.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hybridkv.errors import ModelError, UsageError
from hybridkv.model.protocols import Config
from hybridkv.model.ranks import ranks_of

_FIRST_DIM = {"colwise", "colwise_gather_output", "colwise_rep", "packed_colwise", "embedding_rowwise"}
_LAST_DIM = {"rowwise", "rowwise_split_input", "rowwise_rep", "packed_rowwise", "embedding_colwise"}


def n_ranks() -> int:
    """Count the processes that torchrun has started; 1 without it."""
    started = "RANK" in os.environ and "LOCAL_RANK" in os.environ
    return int(os.environ.get("WORLD_SIZE", "1")) if started else 1


def rank() -> int:
    """Return the number of this rank."""
    return int(os.environ["RANK"]) if n_ranks() > 1 else 0


def local_rank() -> int:
    """Return the number of this rank on its machine, and so of its accelerator."""
    return int(os.environ["LOCAL_RANK"]) if n_ranks() > 1 else 0


def exit_rank(code: int = 0) -> int:
    """End what ranks talk through, once all of them are done, and on several ranks this process with `code`.

    torch's threads run for as long as anything refers to a group, as a model's device mesh does. One that lets go
    of a tensor while the interpreter is taken down is ended in the middle of it, and the process with it, by SIGABRT.
    So a rank whose work is done does not take the interpreter down: what stands in `atexit` is not called.

    Returns
    -------
    int
        `code`, where there is one rank.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another still waits for it
        torch.distributed.destroy_process_group()
    if n_ranks() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def check_plan(config: Config) -> None:
    """Refuse a model that Transformers cannot shard.

    Raises
    ------
    ModelError
        If it has no plan for the family.
    """
    text = config.get_text_config(decoder=True)
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(
            f"Transformers has no tensor-parallel plan for {text.model_type!r} models",
            hint="run it in one process; `hybridkv plan` counts what that takes",
        )


def check_packages() -> None:
    """Refuse to load without the package with which Transformers places sharded weights.

    Raises
    ------
    UsageError
        Saying how to install it.
    """
    if find_spec("accelerate") is None:
        raise UsageError(
            "a model on several ranks needs a package that is not installed: accelerate",
            hint='pip install "hybridkv[tp]"',
        )


def distributed_config(n: int) -> Any:
    """Build the `distributed_config` with which `from_pretrained` shards a model over `n` ranks."""
    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_size=n)


def same_everywhere(tokens: Tensor, model: Any) -> Tensor:
    """Broadcast the tokens that rank 0 has drawn, int64 `[B]`: ranks must not continue from their own last bits."""
    if ranks_of(model.config) == 1:
        return tokens
    shared = tokens.to(next(model.parameters()).device)
    torch.distributed.broadcast(shared, src=0)
    return shared.to(tokens.device)


def parameters_of_rank(model: nn.Module, n: int) -> int:
    """Count the weights in the largest of `n` shards of a model without memory; tied ones once.

    Raises
    ------
    ModelError
        If the model's plan has a rule that is not known here.
    """
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    return sum(_part(name, parameter, plan, n) for name, parameter in model.named_parameters())


def _part(name: str, parameter: Tensor, plan: Mapping[str, str], n: int) -> int:
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    module, _, leaf = generic.rpartition(".")
    style = plan.get(generic, plan.get(module, ""))
    if style in _FIRST_DIM:
        cut = parameter.shape[max(0, parameter.dim() - 2)]  # of experts `[n, out, in]`, each one's outputs
    elif style in _LAST_DIM:
        if leaf == "bias":
            return parameter.numel()
        cut = parameter.shape[-1]
    else:
        return parameter.numel()  # whole on every rank: no rule, or one for activations or gradients alone
    return parameter.numel() // cut * -(-cut // n)
