"""A model as a scheduler holds it: what its requests may ask for, and the caches made for it."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Sequence

from hybridkv.cache import KVSpec, KVTypes, resolve
from hybridkv.engine.caches import new_cache
from hybridkv.engine.requests import Request
from hybridkv.errors import UsageError
from hybridkv.kernels import ENCODERS, KERNELS
from hybridkv.model import is_hybrid, kv_facts, layer_facts, vocab_size_of
from hybridkv.model.protocols import LanguageModel
from hybridkv.policy import Guard, NonFiniteError, Policy
from hybridkv.runtime import ModelCache


class ModelContext:
    """Checks requests against a model and makes its caches.

    Parameters
    ----------
    model
        A Transformers causal language model, loaded with `attn_implementation="hybridkv"`.
    specs
        How KV layers are stored where a request does not say.
    n_ctx
        Most tokens of a sequence.
    guard
        What is watched, in every sequence.
    notify
        Where the guard reports.
    """

    def __init__(
        self, model: LanguageModel, specs: Sequence[KVSpec], *, n_ctx: int, guard: Guard, notify: Callable[[str], None]
    ) -> None:
        self.model, self.specs, self.guard, self.notify = model, tuple(specs), guard, notify
        self.device: str = model.device.type
        self._n_ctx = n_ctx

    def check_ids(self, request: Request) -> None:
        """Refuse token ids that the model does not have.

        Raises
        ------
        UsageError
            Naming the first.
        """
        n_vocab = vocab_size_of(self.model.config)
        bad = next((i for i in request.prompt_ids if not 0 <= i < n_vocab), None)
        if bad is not None:
            raise UsageError(f"token id {bad}; allowed: 0 to {n_vocab - 1}")
        request.params.check_tokens(n_vocab)

    def specs_of(self, types: KVTypes | None) -> tuple[KVSpec, ...]:
        """Resolve how a request's KV layers are stored; checked, so that nothing can be missing later.

        Raises
        ------
        UsageError, NoKernelError
            For types that do not exist or do not run here.
        """
        if types is None:
            return self.specs
        facts = layer_facts(self.model.config)
        asked = Policy(types).resolve(kv_facts(facts))
        specs, warnings = self.guard.before(asked, hybrid=is_hybrid(facts), n_ctx=self._n_ctx)
        for spec in specs:
            resolve(spec, self.device, KERNELS, ENCODERS)
        for line in warnings:
            self.notify(line)
        return specs

    def new_cache(self, specs: Sequence[KVSpec], n_ctx: int) -> ModelCache:
        """Build an empty cache for one sequence."""
        return new_cache(self.model, specs, n_ctx=n_ctx, guard=self.guard, notify=self.notify)


def freeze_gc() -> None:
    """Freeze the loaded model's objects, so that the garbage collector skips them.

    They live as long as the process; walking them again and again took a tenth of a decode step. For a process that
    serves, once it is ready.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # at the end everything is taken down in order


def bad_logits(cache: ModelCache, n_tokens: int) -> NonFiniteError:
    """Build the report of logits that are not finite though every attention output was."""
    layers = cache.kv_layers
    return NonFiniteError(
        layer=None,
        label=layers[0].types.label if layers else "none",
        kernel=layers[0].kernels.label if layers else "none",
        n_tokens=n_tokens,
        source="cache",
    )
