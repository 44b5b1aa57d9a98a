"""From a command line to a conversation: check, load, and put what talks together."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybridkv.cli.chat_options import ChatChoice, say_unused_variables, stops_of
from hybridkv.cli.fits import Demand, check_memory
from hybridkv.cli.form_options import Form
from hybridkv.cli.guess_memory import guesses_for
from hybridkv.cli.progress import loading
from hybridkv.cli.resolve import resolve_types
from hybridkv.cli.sampler_options import sampling_for
from hybridkv.cli.show import notice, size, warning
from hybridkv.cli.spec_options import speculation_from
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.cli.model_options import Opened
    from hybridkv.engine import SamplingParams
    from hybridkv.policy import AnyPolicy, Guard

_LEAST_PREFIXES = 256 << 20
_CHUNK = 256


def check_talk(a: argparse.Namespace) -> None:
    """Refuse what a conversation cannot be combined with.

    Raises
    ------
    UsageError
        Saying why.
    """
    given = [
        option
        for option, value in (("--ids", a.ids is not None), ("--json", a.json), (f"-np {a.parallel}", a.parallel > 1))
        if value
    ]
    if given:
        raise UsageError(f"{given[0]} in a conversation", hint="`hybridkv run --chat` answers one message")


def talk_about(
    a: argparse.Namespace,
    opened: Opened,
    policy: AnyPolicy,
    guard: Guard,
    sampling: SamplingParams,
    choice: ChatChoice,
    form: Form,
    first: str | None,
) -> int:
    """Load the model and talk; the exit code.

    Raises
    ------
    UsageError
        For a model without a tokenizer or a chat template.
    """
    from hybridkv.cache import KVTypes
    from hybridkv.cli.talk.loop import converse
    from hybridkv.cli.talk.screen import Screen
    from hybridkv.cli.talk.talk import Habits, Talk
    from hybridkv.engine import Scheduler

    specs = resolve_types(opened, policy, guard, show="kinds")
    one = sum(spec.bytes_at(opened.n_ctx) for spec in specs)
    prefixes = max(_LEAST_PREFIXES, 2 * one)
    more = {} if opened.device_type == "cpu" else {"stored prefixes": prefixes}
    guesses = guesses_for(a, opened)
    opened = check_memory(opened, Demand(specs, opened.n_ctx, guarded=guard.measures, more=more, guesses=guesses))
    with loading(opened.description.name, opened.ahead) as shown:
        loaded, step = opened.load(specs, shown)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UsageError("this model has no tokenizer, and a conversation is text", hint="hybridkv run --ids")
    choice.put_on(tokenizer)
    if not tokenizer.chat_template:
        raise UsageError(
            "this model has no chat template: it continues text and cannot chat",
            hint="give a chat model with -m, a template with --chat-template-file, or use `hybridkv run -p`",
        )
    say_unused_variables(tokenizer.chat_template, choice.variables)
    print(f"backend: {opened.backend_name(step)}; {size(one)} for {opened.n_ctx} tokens", file=sys.stderr)
    scheduler = Scheduler(
        loaded.model,
        specs,
        n_parallel=1,
        n_ctx=opened.n_ctx,
        guard=guard,
        notify=warning,
        step=step,
        prefix_bytes=prefixes,
        prefill_chunk=min(_CHUNK, opened.n_ctx),
        speculation=speculation_from(a, loaded, step, notice, n_ctx=opened.n_ctx),
    )
    ends = () if a.ignore_eos and form.grammar is None else loaded.end_ids
    sampling = sampling_for(sampling, a, loaded)
    steering = form.steering_for(loaded)
    steering("")  # what is wrong with a grammar is said before the first question
    habits = Habits(sampling, a.n_predict, stops_of(a), ends, choice.variables, steering)
    types = specs[0].types if specs else KVTypes()
    talk = Talk(scheduler, loaded.model, tokenizer, habits, types, choice.system)
    path = None if a.session is None else Path(a.session)
    if path is not None and path.exists():
        talk.load(path)

    def keep() -> None:
        if path is not None and talk.last is not None:
            talk.save(path)

    return converse(talk, Screen(), first, after=keep)
