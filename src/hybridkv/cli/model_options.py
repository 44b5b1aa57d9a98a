"""The options that say which model runs, on what, and how: shared by every command that loads one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hybridkv.cli.collector import import_torch, resume_collector
from hybridkv.cli.compiler import compile_ahead
from hybridkv.cli.context import context_of, refuse_shift
from hybridkv.cli.devices import check_ranks, device_name, device_of_rank, find_device
from hybridkv.cli.model_source import add_source_arguments, model_of
from hybridkv.cli.rope_options import add_rope_arguments, changes_of, say_idle_keys
from hybridkv.cli.show import MAX_CONTEXT, expanded_words, notice, size, weights_words
from hybridkv.cli.split_options import add_split_arguments, refuse_cache_in_memory, split_from, split_on
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    import torch

    from hybridkv.cache import KVSpec
    from hybridkv.cli.progress import Loading
    from hybridkv.engine.describe import PoolingAsked
    from hybridkv.engine.load import Description, Loaded
    from hybridkv.engine.placed import Split
    from hybridkv.held import Held, WeightKind
    from hybridkv.kernels.cuda.ahead import Ahead
    from hybridkv.native import Memory
    from hybridkv.native.choice import BackendKind
    from hybridkv.runtime import Step

DEFAULT_CTX = 4096


def add_model_arguments(
    parser: argparse.ArgumentParser, *, default_ctx: int = DEFAULT_CTX, limit_option: str = "--memory"
) -> None:
    """Add what says which model runs and how: `-m`, `-hf`, `-c`, `-t`, `--device`, `--weights`, `--memory` and others.

    Parameters
    ----------
    limit_option
        Another name for the last one, where `--memory` is a budget of something else.
    """
    group = parser.add_argument_group("model")
    add_source_arguments(group)
    group.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        metavar="N",
        help=f"tokens in the context; 0: the trained length (default {default_ctx}, or the trained length if less)",
    )
    group.add_argument("-t", "--threads", type=int, metavar="N", help="CPU threads (default -1: torch's choice)")
    group.add_argument(
        "-dev",
        "--device",
        type=device_name,
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N (default auto)",
    )
    group.add_argument(
        "--backend",
        "--engine",
        dest="backend",
        default="auto",
        metavar="auto|native|eager",
        help="what computes the layers outside of attention: native (C++ on the CPU, Triton on CUDA) or eager "
        "(Transformers' forward pass); auto: native for every model that it can run (default auto)",
    )
    group.add_argument(
        "--graph",
        metavar="on|off",
        help="on CUDA, record decode steps as a CUDA graph and replay it, if the model allows it (default on)",
    )
    group.add_argument(
        "--weights",
        default="auto",
        metavar="auto|plain|f32|bf16|int8|int4",
        help="weight storage: auto (as in the file), plain (Transformers' float32 tensors, for --backend eager), or "
        "converted to f32, bf16, int8 (q8_0) or int4 (q4_0, embedding and output head q8_0); on CUDA int8 and int4 are "
        "for models that its kernels run with packed weights (default auto; plain under --backend eager, and on CUDA "
        "for GGUF files that its kernels lack)",
    )
    group.add_argument(
        "--activations",
        default="int16",
        metavar="int16|int8",
        help="what the native backend on the CPU rounds activations to before they meet quantized weights: int16 (15 "
        "bits, a relative error of 1e-4 in a product), or int8 (5e-3, as llama.cpp does), which is faster with "
        "q2_K to q6_K and q4_0 to q5_1; other types stay with int16 (default int16)",
    )
    group.add_argument(
        "--context-shift",
        nargs="?",
        const="on",
        metavar="on|off",
        help="refused: a full context ends the answer",
    )
    group.add_argument(
        "--no-context-shift",
        dest="context_shift",
        action="store_const",
        const="off",
        help="for compatibility: a context is never shifted",
    )
    group.add_argument(
        "--mmap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="map a GGUF file (default), or read it into memory once",
    )
    group.add_argument("--mlock", action="store_true", help="lock the weights of a GGUF file in memory")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code from the model directory")
    group.add_argument(
        limit_option,
        dest="memory_limit",
        metavar="SIZE",
        help="limit of main memory for weights, cache and everything else, such as 24GiB; a larger plan is refused "
        "before weights are read (default: what this machine and its container have free)",
    )
    add_split_arguments(parser.add_argument_group("card"))
    add_rope_arguments(parser)
    parser.set_defaults(limit_option=limit_option)


def quiet_transformers() -> None:
    """Keep Transformers' notes on missing speed packages and its progress bars out of a command's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def limit_spinning() -> None:
    """Bound how long torch's threads spin while they wait for each other; call it before torch is imported.

    By default it is so long that another program's load stalls them. Tokens/s on 2 cores, idle and beside two busy
    processes: 63 and 4-12 by default, 60 and 13-23 with this, 25 and 20-30 without any spinning (docs/log.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import_torch()


def check_limits(a: argparse.Namespace, *more: tuple[str, str, int, int]) -> None:
    """Refuse numbers out of range before anything heavy is imported; `more` names options as `-np`, `parallel`, 1, 9.

    Raises
    ------
    UsageError
        For the first one.
    """
    a.threads = None if a.threads == -1 else a.threads  # llama.cpp's word for its own choice
    for option, name, least, most in (("-t", "threads", 1, 1024), ("-c", "ctx_size", 0, MAX_CONTEXT), *more):
        value = getattr(a, name)
        if value is not None and not least <= value <= most:
            raise UsageError(f"{option} {value}; allowed: {least} to {most}")
    n_cores = os.cpu_count() or 1
    if a.threads is not None and a.threads > n_cores and not getattr(a, "ray", None):  # whose machines are others
        # They would wait for one another: 16 on 2 cores gave a twelfth of the speed of 2.
        notice(f"-t {a.threads}: this machine has {n_cores} cores, and {n_cores} threads are used")
        a.threads = n_cores


@dataclass(frozen=True, slots=True)
class Opened:
    """A model described, its options checked, nothing loaded yet.

    Attributes
    ----------
    description
        The model before its weights.
    device
        `cpu`, `cuda` or `cuda:N`.
    n_ctx
        Tokens in the context.
    weights, dtype
        How matrices are held, and the model's dtype.
    make_step
        Runs the loaded model.
    memory_limit
        Bytes of main memory that it may take; None for what there is.
    limit_option
        The option that says so.
    backend, asked
        What is to run it: with the weights that are held, and as it was asked for.
    memory
        Whether the weights of a GGUF file stay in the mapped file.
    lock
        Whether they are kept from being paged out.
    split
        What is asked of packed weights on a card; None for other weights.
    hosted
        Names of the tensors that stay in main memory beside a card.
    ahead
        What compiles kernels, once it loads.
    """

    description: Description
    device: str
    n_ctx: int
    weights: WeightKind
    dtype: torch.dtype
    make_step: Callable[[Any], Step]
    memory_limit: int | None = None
    limit_option: str = "--memory"
    backend: BackendKind = "auto"
    asked: BackendKind = "auto"
    memory: Memory = "mapped"
    lock: bool = False
    split: Split | None = None
    hosted: frozenset[str] = frozenset()
    ahead: list[Ahead | None] = field(default_factory=list, compare=False)

    @property
    def device_type(self) -> str:
        """`cpu` or `cuda`."""
        return self.device.partition(":")[0]

    def backend_name(self, step: Step) -> str:
        """Name what computes the layers outside of attention, with its weight storage."""
        return step.name

    def held(self) -> Held:
        """Count the bytes of the weights as `load` will hold them."""
        import torch

        plain: Literal["f32", "bf16"] = "f32" if self.dtype == torch.float32 else "bf16"
        return self.description.held(self.weights, self.device_type, plain, backend=self.backend)

    def load(self, specs: Sequence[KVSpec] = (), shown: Loading | None = None) -> tuple[Loaded, Step]:
        """Load the model and its step, and show how far that is; print what is worth knowing of them.

        Parameters
        ----------
        specs
            Of the cache it will run on, to have kernels compiled meanwhile.
        """
        if specs:
            self.ahead.append(compile_ahead(self, specs))
        from hybridkv.engine.load import load, lock_weights
        from hybridkv.native.choice import runs_natively

        if not runs_natively(self.description.config, self.device_type, self.backend):
            quiet_transformers()
        loaded = load(
            self.description,
            dtype=self.dtype,
            device=self.device,
            weights=self.weights,
            backend=self.backend,
            memory=self.memory,
            hosted=self.hosted,
        )
        for line in loaded.notices:
            notice(line)
        if shown is not None:
            shown.count(loaded.model, sum(self.held().parts.values()))
        step = self.make_step(loaded.model)
        _say_weights(loaded, self.weights)
        if self.lock:
            lock_weights(loaded)
        resume_collector()
        return loaded, step


def open_model(
    a: argparse.Namespace,
    *,
    default_ctx: int = DEFAULT_CTX,
    ranks: Literal["one", "many"] = "one",
    pooling: PoolingAsked = "refused",
) -> Opened:
    """Describe the model that the options name.

    Parameters
    ----------
    ranks
        Whether the command knows what to do when torchrun starts several of it.
    pooling
        Of embedding models, where the command takes them.

    Raises
    ------
    UsageError
        For a device, backend or kind of weights that is not there.
    ModelFileError, ModelError
        For a model that is damaged or not understood.
    """
    import torch

    from hybridkv.engine.describe import describe
    from hybridkv.engine.steps import parse_activations, parse_backend, parse_graphs, resolve_step
    from hybridkv.engine.weights import backend_for, weights_on
    from hybridkv.held import parse_weights
    from hybridkv.hf.ranks import n_ranks
    from hybridkv.planner import parse_bytes

    option = getattr(a, "limit_option", "--memory")  # tasks of `eval --ray` have neither
    limit = None if getattr(a, "memory_limit", None) is None else parse_bytes(a.memory_limit, option)
    graphs = parse_graphs(a.graph or "on")
    asked_kind, asked = parse_backend(a.backend), parse_weights(a.weights)
    activations = parse_activations(getattr(a, "activations", "int16"))
    n = n_ranks()
    if n > 1:
        check_ranks(a, n, ranks)
        asked_kind, graphs = "eager", "off"
    device = find_device(a.device) if n == 1 else device_of_rank(a.device, n)
    if a.threads is not None:
        torch.set_num_threads(a.threads)
    path = model_of(a)
    if path.is_dir() or path.name == "config.json":
        quiet_transformers()
    changes = changes_of(a)
    description = describe(
        path,
        remote_code="trusted" if a.trust_remote_code else "refused",
        n_ranks=n,
        changes=changes,
        pooling=pooling,
    )
    if description.header is not None:
        say_idle_keys(changes, description.header.architecture)
    refuse_shift(a, description)
    refuse_cache_in_memory(a, device.partition(":")[0])
    if a.trust_remote_code and path.is_file():
        notice("--trust-remote-code has no effect: this model has no Python code")
    n_ctx = context_of(a.ctx_size, description.n_ctx_train, default_ctx, changes.rope)
    device_type = device.partition(":")[0]
    if a.graph is not None and device_type != "cuda":
        notice(f"--graph {a.graph} has no effect: graphs exist on CUDA only, and this runs on {device_type}")
    kind = backend_for(device_type, asked, asked_kind)
    make_step = resolve_step(
        description.config, device_type, kind, graphs=graphs, activations=activations, notify=notice
    )
    weights, dtype = weights_on(device, asked, kind, description)
    plain: Literal["f32", "bf16"] = "f32" if dtype == torch.float32 else "bf16"
    if (expanded := description.expanded(asked, device_type, plain, kind)) is not None:
        notice(expanded_words(expanded, plain))
    memory: Memory = "mapped" if getattr(a, "mmap", True) else "copied"
    lock = bool(getattr(a, "mlock", False))
    split = split_on(split_from(a), description, device_type, asked, kind)
    return Opened(
        description, device, n_ctx, weights, dtype, make_step, limit, option, kind, asked_kind, memory, lock, split
    )


def _say_weights(loaded: Loaded, weights: WeightKind) -> None:
    """Print what the weights take, and say where experts are held as float32."""
    from hybridkv.held import EXPERTS
    from hybridkv.native import NativeModel, bytes_by_type

    model = loaded.model
    if model.device.type != "cpu" and not isinstance(model, NativeModel):
        return  # plain: what `plan` says
    if isinstance(model, NativeModel):
        parts = bytes_by_type(model.source)
    else:
        from hybridkv.hf.step.weights import held_parts

        parts = held_parts(model)
    print(f"weights: {weights_words(parts)}", file=sys.stderr)
    experts = sum(n_bytes for name, n_bytes in parts.items() if EXPERTS in name)
    if experts and weights not in ("plain", "f32"):
        notice(f"{size(experts)} of experts are held as f32, regardless of --weights")
