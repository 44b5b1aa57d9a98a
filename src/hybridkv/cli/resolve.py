"""Types and kernels of every KV layer, resolved and printed before any weight is loaded: for `run` and `serve`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hybridkv.cli.model_options import Opened
from hybridkv.cli.show import layer_table, notice, stderr_console, summary, warning

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec, LayerKernels
    from hybridkv.policy import AnyPolicy, Guard


def resolve_types(opened: Opened, policy: AnyPolicy, guard: Guard) -> tuple[KVSpec, ...]:
    """How every KV layer will be stored; the table goes to stderr, with what has no effect.

    Raises
    ------
    UsageError, GuardError
        For types that this model or the guard does not allow.
    NoKernelError
        If nothing runs them.
    """
    from hybridkv.cache import resolve
    from hybridkv.kernels import ENCODERS, KERNELS
    from hybridkv.model import is_hybrid, kv_facts

    facts = opened.description.facts
    asked = policy.resolve(kv_facts(facts))
    specs, warnings = guard.before(asked, hybrid=is_hybrid(facts), n_ctx=opened.n_ctx)
    resolved: list[tuple[KVSpec, LayerKernels]] = [
        (spec, resolve(spec, opened.device_type, KERNELS, ENCODERS)) for spec in specs
    ]
    print(summary(opened.description), file=sys.stderr)
    if not specs:
        notice("no layer has a KV cache: nothing grows with the context and nothing is quantized")
    elif not any(f.state for f in facts):
        notice("this model is not a hybrid: it has no recurrent state, and its whole memory is the KV cache")
    for line in policy.notices(asked, opened.n_ctx):
        notice(line)
    for line in warnings:
        warning(line)
    if resolved:
        stderr_console().print(layer_table(resolved))
    return specs
