"""The tokens of a context, and what becomes of a full one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hybridkv.cli.show import notice
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.engine.describe import Description
    from hybridkv.model.changes import RopeChanges


def refuse_shift(a: argparse.Namespace, description: Description) -> None:
    """Refuse to drop old tokens of a full context, with the reason that this model has.

    Raises
    ------
    UsageError
        Unless the option is left out or off.
    """
    if getattr(a, "context_shift", None) in (None, "off", "0", "false", "disabled"):
        return
    states = any(facts.state is not None for facts in description.facts)
    reason = (
        "this model's recurrent state has seen every token and cannot lose one"
        if states
        else "rows that were stored for other positions would answer wrongly"
    )
    raise UsageError(
        f"--context-shift: {reason}", hint="a larger -c holds more; a full context ends an answer with `length`"
    )


def reach_of(trained: int, rope: RopeChanges) -> int:
    """Count the tokens that a model reaches as it was trained, or as RoPE is scaled."""
    return max(trained, int((rope.orig_ctx or trained) * (rope.factor or 1)))


def context_of(asked: int | None, trained: int | None, default_ctx: int, rope: RopeChanges) -> int:
    """Choose the tokens in the context: 0 asks for the trained length, the default never exceeds it.

    Raises
    ------
    UsageError
        For 0, if the model does not say what it was trained for.
    """
    if asked is None:
        return default_ctx if trained is None else min(default_ctx, trained)
    if asked == 0:
        if trained is None:
            raise UsageError("-c 0: this model does not say what it was trained for", hint="give -c N")
        return trained
    reach = None if trained is None else reach_of(trained, rope)
    if reach is not None and asked > reach:
        scaled = f" and RoPE is scaled for ({reach})" if reach != trained else ""
        notice(f"-c {asked} is more than the {trained} tokens that the model was trained for{scaled}")
    return asked
