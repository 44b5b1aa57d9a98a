"""Types and kernels of every KV layer, resolved and printed before any weight is loaded: for `run` and `serve`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from hybridkv.cli.model_options import Opened
from hybridkv.cli.show import layer_table, notice, stderr_console, summary, warning

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec, LayerKernels
    from hybridkv.policy import AnyPolicy, Guard


def resolve_types(
    opened: Opened, policy: AnyPolicy, guard: Guard, *, show: Literal["layers", "kinds"] = "layers"
) -> tuple[KVSpec, ...]:
    """Resolve how every KV layer is stored; print the table and what has no effect on stderr.

    Parameters
    ----------
    show
        Every layer, or a line for those that are stored alike.

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
        if show == "layers":
            stderr_console().print(layer_table(resolved))
        else:
            _say_kinds(resolved)
    return specs


def _say_kinds(resolved: list[tuple[KVSpec, LayerKernels]]) -> None:
    kinds: dict[str, int] = {}
    for spec, kernels in resolved:
        exact = f", {spec.exact_label} exact" if spec.exact_label else ""
        line = f"{spec.types.label}{exact}, {kernels.label}, {spec.bytes_per_token} bytes/token"
        kinds[line] = kinds.get(line, 0) + 1
    for line, n_layers in kinds.items():
        print(f"KV of {n_layers} layers: {line}", file=sys.stderr)
