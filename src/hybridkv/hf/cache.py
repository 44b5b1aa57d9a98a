"""`ModelCache`: the cache of a Transformers model, with packed KV layers and float32 states.

Owns the list of layers and what the whole can do, which is what all its parts can do. `quantized_cache` builds
one from a model in a line.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from transformers.cache_utils import Cache

from hybridkv import runtime
from hybridkv.cache import KVLayer, KVSpec, LayerFacts
from hybridkv.errors import ContextError, ModelError, UsageError
from hybridkv.formats import Scale
from hybridkv.hf.attention import IMPLEMENTATION, filled_cache, register
from hybridkv.hf.layers import EmptyLayer, QuantizedAndStateLayer, QuantizedLayer
from hybridkv.hf.states import StateLayer
from hybridkv.kernels import ENCODERS, KERNELS, Encoder, Kernel
from hybridkv.model.facts import is_hybrid, kv_facts, layer_facts, takes_chunks
from hybridkv.model.protocols import Config
from hybridkv.policy import Guard, GuardMode, KVConfig, parse_mode, policy_of, read_config
from hybridkv.runtime import LayerWatch, Notify
from hybridkv.runtime.cache import LOG, watched_parts

_TYPE = "q8_0"  # of K and V, unless another is asked for
_PLAN_CONTEXT = 4096  # what the guard's warnings count bytes at when no context was given


class ModelCache(Cache, runtime.ModelCache):  # type: ignore[misc]
    """Everything a model remembers of its sequences, as Transformers asks for it.

    Parameters
    ----------
    config
        The model's Transformers config. Its `_attn_implementation` is read at each update: `hybridkv` gets
        packed rows, any other gets dequantized tensors.
    specs
        One per KV layer, in order.
    n_ctx
        Tokens per sequence to reserve and not to exceed; None grows as needed.
    guard
        What is checked and what may be done about it.
    notify
        Where the guard reports; a logger's warning by default.
    kernels, encoders
        What may run; all that are built, by default.

    Raises
    ------
    NoKernelError
        If a layer has no kernel; nothing has been allocated then.
    """

    def __init__(
        self,
        config: Config,
        specs: Sequence[KVSpec],
        *,
        device: str = "cpu",
        n_ctx: int | None = None,
        guard: Guard | None = None,
        notify: Notify = LOG.warning,
        kernels: Sequence[Kernel] = KERNELS,
        encoders: Sequence[Encoder] = ENCODERS,
    ) -> None:
        text = config.get_text_config(decoder=True)
        facts = layer_facts(config)

        def packed() -> bool:
            return bool(text._attn_implementation == IMPLEMENTATION)

        states: dict[str, Any] = {
            "number_of_states": getattr(text, "number_of_conv_states", 1),
            "takes_chunks": takes_chunks(config),
        }

        def build(layer: LayerFacts, part: tuple[KVLayer, LayerWatch] | None) -> Any:
            if layer.state is None:
                return EmptyLayer() if part is None else QuantizedLayer(*part, packed)
            own = {**states, "recurs": bool(layer.state.recurrent)}
            return StateLayer(**own) if part is None else QuantizedAndStateLayer(*part, packed, **own)

        parts = watched_parts(facts, specs, device, n_ctx, guard or Guard(), notify, kernels, encoders)
        Cache.__init__(self, layers=[build(*layer) for layer in zip(facts, parts, strict=True)])
        self._sort()

    def _sort(self) -> None:
        """Tell the layers' kinds apart."""
        self._hold(
            [layer if isinstance(layer, QuantizedLayer) else None for layer in self.layers],
            [layer if isinstance(layer, StateLayer) else None for layer in self.layers],
        )

    def copy(self, *, n_ctx: int | None = None) -> Self:
        """Copy the cache, to continue from the same tokens independently; see `hybridkv.runtime.ModelCache`."""
        return self._with([layer.copy(n_ctx) for layer in self.layers])

    def empty(self, *, n_ctx: int | None = None) -> Self:
        """Build a cache of the same types and kernels that holds nothing and is not guarded."""
        return self._with([layer.empty(n_ctx) for layer in self.layers])

    def _with(self, layers: list[Any]) -> Self:
        twin = copy.copy(self)
        twin.layers = layers
        twin._sort()
        return twin

    @property
    def is_linear(self) -> list[bool]:
        """Per layer, True if it has a state and no KV cache."""
        return [isinstance(layer, StateLayer) and not isinstance(layer, QuantizedLayer) for layer in self.layers]

    @property
    def is_dummy(self) -> list[bool]:
        """Per layer, True if it remembers nothing."""
        return [isinstance(layer, EmptyLayer) for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the tokens seen; 0 for a model without any attention layer, which keeps no count."""
        return 0 if not self.kv_layers else int(super().get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of rows that the next call attends, and the position of the first.

        Raises
        ------
        ContextError
            For a call without new tokens, which `generate` makes of a prompt that is shorter than what is held.
        """
        if not query_length:
            raise filled_cache(self.get_seq_length())
        if not self.kv_layers:
            return query_length, 0
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return length, offset

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Check whether a state layer (the last by default) has seen tokens; False if there is none."""
        if layer_idx is None and not self.stateful:
            return False
        return bool(super().has_previous_state(layer_idx, state_idx))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest `-tokens_to_remove` tokens from every layer, or from none.

        Raises
        ------
        ContextError
            If a layer cannot go back (a state, or a window that has let rows go), or for a positive number.
        """
        if tokens_to_remove > 0:
            raise ContextError(
                f"crop({tokens_to_remove}); allowed: 0 or a negative number of tokens to drop",
                hint="crop(-n) drops the newest n tokens",
            )
        stuck = [i for i, layer in enumerate(self.layers) if not _can_drop(layer, -tokens_to_remove)]
        if stuck:
            raise ContextError(
                f"crop({tokens_to_remove}): layers {', '.join(map(str, stuck))} cannot go back to an earlier token",
                hint="reset() the cache and process the shorter prompt again",
            )
        super().crop(tokens_to_remove)


def _can_drop(layer: Any, n_tokens: int) -> bool:
    return layer.can_drop(n_tokens) if isinstance(layer, StateLayer) else not n_tokens or bool(layer.is_croppable)


def cache_argument(model: Any) -> str:
    """Name the argument under which a model's forward pass takes its cache.

    `cache` from Transformers 5.24 on, `past_key_values` before, `cache_params` in Mamba's own classes before. A wrong
    name would vanish among the keyword arguments, and every call would start over without an error.

    Raises
    ------
    ModelError
        If the model takes none.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in ("cache", "past_key_values", "cache_params"):
        if name in parameters:
            return name
    raise ModelError(f"{type(model).__name__} takes no cache", hint="hybridkv runs causal language models")


def quantized_cache(
    model: Any,
    *,
    config: str | Path | None = None,
    type_k: str | None = None,
    type_v: str | None = None,
    rotate_k: bool | None = None,
    rotate_v: bool | None = None,
    scale: Scale | str | None = None,
    k_first: str | None = None,
    k_last: str | None = None,
    v_first: str | None = None,
    v_last: str | None = None,
    tail: int | None = None,
    sink: int | None = None,
    center: bool | None = None,
    n_ctx: int | None = None,
    guard: GuardMode | str = "check",
    notify: Notify = LOG.warning,
) -> ModelCache:
    """Build a quantized KV cache for a Transformers model, hybrid or not.

    Parameters
    ----------
    model
        A causal language model. Load it with `attn_implementation="hybridkv"` to attend packed rows; with any
        other implementation the cache stores the same bytes and gives dequantized tensors.
    config
        A file with types for each layer, as `hybridkv tune` writes it, instead of all that follows but n_ctx and guard.
    type_k, type_v
        Any of `hybridkv.formats.FORMATS`, in any pair; q8_0 by default.
    rotate_k, rotate_v
        Hadamard rotation before quantizing; off by default.
    scale
        `absmax`, `refit`, or None for each type's own default.
    k_first, k_last, v_first, v_last
        `TYPE,N`: another type for the first or last N KV layers.
    tail, sink
        How many of the newest and of the first tokens stay f16 where K or V is quantized; 0 by default.
    center
        Whether K is stored minus its mean over early tokens; needs a tail of at least 32. Off by default.
    n_ctx
        Tokens per sequence to reserve and not to exceed; None grows as needed.
    guard
        `check upgrade warn strict off`.
    notify
        Where fallbacks are reported; the log by default.

    Returns
    -------
    ModelCache
        Pass it as `cache` (before Transformers 5.24: `past_key_values`) to `model(...)` or `model.generate(...)`. It is
        for one prompt and what follows it: `reset()` it before another.

    Raises
    ------
    ModelError
        For a model whose weights have no values.
    UsageError
        For an unknown type, rule or count; for a `config` that is none, or is of another model, or comes together with
        what it says itself.

    Examples
    --------
    >>> cache = quantized_cache(model, type_k="q4_0", type_v="q4_0", rotate_k=True)  # doctest: +SKIP
    >>> model.generate(**inputs, cache=cache)  # doctest: +SKIP
    """
    register()
    device, facts = _device_of(model), layer_facts(model.config)
    asked_types: dict[str, Any] = {
        "type_k": type_k,
        "type_v": type_v,
        "rotate_k": rotate_k,
        "rotate_v": rotate_v,
        "scale": scale,
        "k_first": k_first,
        "k_last": k_last,
        "v_first": v_first,
        "v_last": v_last,
        "tail": tail,
        "sink": sink,
        "center": center,
    }
    given = {name: value for name, value in asked_types.items() if value is not None}
    policy = (
        policy_of(given, default_type=_TYPE, in_python=True) if config is None else _configured(Path(config), given)
    )
    watcher = Guard(mode=parse_mode(guard))
    asked = policy.resolve(kv_facts(facts))
    specs, warnings = watcher.before(asked, hybrid=is_hybrid(facts), n_ctx=n_ctx or _PLAN_CONTEXT)
    for line in (*policy.notices(asked, n_ctx), *warnings):
        notify(line)
    return ModelCache(model.config, specs, device=device, n_ctx=n_ctx, guard=watcher, notify=notify)


def _device_of(model: Any) -> str:
    """Return the type of the device on which a model computes.

    Layers that accelerate keeps on disk or in other memory are on the meta device but for the moment in which they
    run; the tensors that stay are where they run.

    Raises
    ------
    ModelError
        If weights are on the meta device for good.
    """
    held = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in held if tensor.is_meta]
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if empty and (not offloaded or len(empty) == len(held)):
        raise ModelError(
            f"{len(empty)} of {len(held)} tensors of this model are on the meta device, {empty[0]} for one, and have "
            "no values; allowed: weights in memory, or on disk where accelerate brings them in",
            hint='load the model without device_map, or with device_map="auto" and an offload_folder',
        )
    return next(str(tensor.device.type) for _, tensor in held if not tensor.is_meta)


def _configured(path: Path, given: dict[str, Any]) -> KVConfig:
    if given:
        raise UsageError(
            f"config was given together with {', '.join(given)}, which the file already sets",
            hint=f"leave {', '.join(given)} out, or change the file",
        )
    return read_config(path)
