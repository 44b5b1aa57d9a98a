"""`hybridkv serve`: an OpenAI-compatible server on a quantized KV cache."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv.cli.cache_options import add_cache_arguments, policy_from
from hybridkv.cli.chat_options import ChatChoice, add_template_arguments, say_unused_variables, template_of
from hybridkv.cli.fits import Demand, check_memory, fit_context
from hybridkv.cli.guess_memory import guesses_for
from hybridkv.cli.model_options import Opened, add_model_arguments, check_limits, limit_spinning, open_model
from hybridkv.cli.ray_options import LOCAL
from hybridkv.cli.resolve import resolve_types
from hybridkv.cli.serve_answers import AnswerDefaults, add_answer_arguments, answers_from
from hybridkv.cli.serve_embeddings import load_embedder
from hybridkv.cli.show import notice, size, warning
from hybridkv.cli.spec_options import add_spec_arguments, check_spec, speculation_from
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    import socket

    from hybridkv.cache import KVSpec
    from hybridkv.engine import Scheduler
    from hybridkv.engine.embed import NoScheduler
    from hybridkv.engine.load import Loaded
    from hybridkv.policy import AnyPolicy, Guard
    from hybridkv.server.gate import GateOptions
    from hybridkv.server.request_handler import Served

NAME = "serve"
HELP = "serve a model over HTTP: OpenAI-compatible completions and chat, and a chat page"

EXIT_INTERRUPTED = 130

_POOLINGS = ("none", "mean", "cls", "last")

KEY_VARIABLE = "HYBRIDKV_API_KEY"

_BEING_READ = 64
"""Requests that may be in the reading beside those that run and wait."""

_PACKAGES = ("fastapi", "uvicorn", "pydantic", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv serve`, in llama-server's spellings where it has them."""
    add_model_arguments(parser, limit_option="--total-memory")
    _add_server_arguments(parser.add_argument_group("server"))
    add_answer_arguments(parser.add_argument_group("answers, where a request does not say"))
    _add_scheduler_arguments(parser.add_argument_group("sequences"))
    add_cache_arguments(parser)
    add_spec_arguments(parser)


def _add_server_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (default 127.0.0.1)")
    group.add_argument(
        "--port", type=int, default=8080, metavar="N", help="port to listen on; 0: a free one (default 8080)"
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"require this key from every client; the variable {KEY_VARIABLE} keeps it out of the process list",
    )
    add_template_arguments(group)
    group.add_argument("-a", "--alias", metavar="NAME", help="name of the model for clients (default: its own)")
    group.add_argument(
        "--session-dir", metavar="DIR", help="directory for sessions that clients save and restore (default: none)"
    )
    group.add_argument(
        "--max-body", default="8MiB", metavar="SIZE", help="maximum size of a request body (default 8MiB)"
    )
    group.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="serve replicas with Ray Serve on this machine, or on the cluster at ADDRESS (auto: the cluster that runs "
        "here); a running deployment is replaced without downtime",
    )
    group.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="replica processes with --ray; each loads the model and uses -t threads (default 2)",
    )


def _session_dir(text: str | None) -> Path | None:
    """Check the directory of sessions.

    Raises
    ------
    UsageError
        If it is no directory that can be written to.
    """
    if text is None:
        return None
    path = Path(text).expanduser()
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"--session-dir {text!r} is not a directory that can be written to", hint=f"mkdir -p {path}")
    return path.resolve()


def _add_scheduler_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "-np", "--parallel", type=int, default=4, metavar="N", help="sequences to generate at once (default 4)"
    )
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory for KV and states of running sequences, counted at their full length; other requests wait "
        "(default: enough for -np sequences of -c tokens)",
    )
    group.add_argument(
        "--prefix-memory",
        metavar="SIZE",
        help="memory for cached prompt prefixes, on top of --memory; 0 disables (default: 8 checkpoints of a "
        "full context for each of -np, at most a quarter of the free memory)",
    )
    group.add_argument(
        "--max-waiting", type=int, default=64, metavar="N", help="maximum number of queued requests (default 64)"
    )
    group.add_argument(
        "--pooling",
        choices=_POOLINGS,
        metavar="|".join(_POOLINGS),
        help="serve /v1/embeddings, pooled so in place of what the GGUF file says; none: generate text (default: the "
        "file's pooling type, or none)",
    )
    group.add_argument(
        "--prefill-chunk",
        type=int,
        default=256,
        metavar="N",
        help="prompt tokens per chunk; other sequences wait during a chunk (default 256)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Check, bind, resolve, print the table, load, listen, until a signal comes."""
    a = arguments
    policy, guard, keys = check(a)
    from hybridkv.server.listen import bind

    listener = bind(a.host, a.port)
    try:
        opened = open_model(a, pooling=a.pooling or "of the file")
        if opened.description.header is None and a.pooling is not None:
            raise UsageError(f"--pooling {a.pooling} with a model directory; allowed: with a GGUF file")
        if opened.description.pooling is not None:
            return _serve(a, *load_embedder(a, opened), listener, keys)
        guesses = guesses_for(a, opened)
        opened = fit_context(
            opened, a.ctx_size, policy, guard, n_seqs=a.parallel, more=a.prefix_memory, guesses=guesses
        )
        specs = resolve_types(opened, policy, guard)
        opened = check_memory(opened, demand(a, opened, specs, guard))
        served, scheduler = load_served(a, opened, specs, guard)
        return _serve(a, served, scheduler, listener, keys)
    finally:
        listener.close()


def check(a: argparse.Namespace) -> tuple[AnyPolicy, Guard, tuple[str, ...]]:
    """Refuse what can be refused before a model is touched; turn sizes into bytes.

    Returns
    -------
    tuple
        Types of the KV layers, the guard, and the keys that let clients in.

    Raises
    ------
    UsageError
        For the first thing.
    """
    limit_spinning()
    check_limits(
        a,
        ("--port", "port", 0, 65535),
        ("-np", "parallel", 1, 256),
        ("--max-waiting", "max_waiting", 0, 2**20),
        ("--prefill-chunk", "prefill_chunk", 1, 2**20),
        ("--replicas", "replicas", 1, 1024),
    )
    check_spec(a)
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"hybridkv serve needs packages that are not installed: {', '.join(missing)}",
            hint='pip install "hybridkv[serve]"',
        )
    from hybridkv.planner import parse_bytes
    from hybridkv.policy import Guard, parse_mode

    a.memory = None if a.memory is None else parse_bytes(a.memory)
    if a.prefix_memory is not None:
        a.prefix_memory = 0 if a.prefix_memory == "0" else parse_bytes(a.prefix_memory, "--prefix-memory")
    a.max_body = parse_bytes(a.max_body, "--max-body")
    a.answers = answers_from(a)
    a.template = template_of(a)
    keys = _keys(a.api_key)
    a.session_dir = _session_dir(a.session_dir)
    if a.session_dir is not None and a.prefix_memory == 0:
        raise UsageError("--session-dir with --prefix-memory 0: sessions are made of stored prefixes")
    if a.ray is not None and a.pooling not in (None, "none"):
        raise UsageError(f"--pooling {a.pooling} with --ray: replicas generate text", hint="leave --ray out")
    if a.replicas is not None and a.ray is None:
        raise UsageError(f"--replicas {a.replicas} without --ray", hint="add --ray, or run several servers")
    return policy_from(a), Guard(mode=parse_mode(a.kv_guard)), keys


def demand(a: argparse.Namespace, opened: Opened, specs: Sequence[KVSpec], guard: Guard) -> Demand:
    """Count what a server takes when all its sequences run at full length."""
    guesses = guesses_for(a, opened)
    rest = Demand(specs, opened.n_ctx, a.parallel, budget_bytes=a.memory, guarded=guard.measures, guesses=guesses)
    if a.prefix_memory is None:
        from hybridkv.cli.prefix_memory import default_prefix_bytes

        a.prefix_memory = default_prefix_bytes(opened, specs, rest)
    return replace(rest, more={"stored prefixes": a.prefix_memory})


def load_served(
    a: argparse.Namespace, opened: Opened, specs: Sequence[KVSpec], guard: Guard
) -> tuple[Served, Scheduler]:
    """Load the model and start what runs it.

    Raises
    ------
    UsageError
        For a model that has no tokenizer, or that the memory does not hold.
    """
    from hybridkv.engine.model_context import freeze_gc

    loaded, step = opened.load(specs)
    if loaded.tokenizer is None:
        raise UsageError("this model has no tokenizer, and a server takes text", hint="`hybridkv run --ids` needs none")
    ChatChoice(template=a.template).put_on(loaded.tokenizer)
    template = loaded.tokenizer.chat_template or ""
    known = {"enable_thinking"} if "thinking" in template else set()  # by either name
    say_unused_variables(template, {name: v for name, v in a.answers.variables.items() if name not in known})
    print(f"backend: {opened.backend_name(step)}", file=sys.stderr)
    scheduler = _scheduler(a, opened, loaded, specs, guard, step)
    served = _served(a, opened, loaded, specs, scheduler)
    freeze_gc()
    return served, scheduler


def _keys(option: str | None) -> tuple[str, ...]:
    """Read the keys that let clients in; none lets everybody in.

    Raises
    ------
    UsageError
        For one that cannot be sent.
    """
    source, key = "--api-key", option
    if key is None:
        source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if key is None:
        return ()
    if not key.strip() or not key.isprintable() or not key.isascii():
        raise UsageError(f"{source} is empty or not plain ASCII", hint="try `openssl rand -hex 32`")
    return (key.strip(),)


def _scheduler(
    a: argparse.Namespace, opened: Opened, loaded: Loaded, specs: Sequence[KVSpec], guard: Guard, step: Any
) -> Scheduler:
    from hybridkv.engine import Scheduler

    chunk = min(a.prefill_chunk, opened.n_ctx)
    scheduler = Scheduler(
        loaded.model,
        specs,
        n_parallel=a.parallel,
        n_ctx=opened.n_ctx,
        guard=guard,
        notify=warning,
        step=step,
        memory_bytes=a.memory,
        prefix_bytes=a.prefix_memory,
        prefill_chunk=chunk,
        max_waiting=a.max_waiting,
        speculation=speculation_from(a, loaded, step, notice, n_ctx=opened.n_ctx),
    )
    one = scheduler.admission.planned_bytes(specs, opened.n_ctx)
    total = a.parallel * one if a.memory is None else min(a.memory, a.parallel * one)
    print(
        f"memory: {size(one)} for a sequence of {opened.n_ctx} tokens, at most {size(total)} for {a.parallel} at once, "
        f"and {size(a.prefix_memory)} for stored prefixes",
        file=sys.stderr,
    )
    if a.memory is not None and one > a.memory:
        most = scheduler.admission.most_tokens(specs)
        if not most:
            raise UsageError(f"--memory {size(a.memory)}: not a single token fits", hint=f"try --memory {one}")
        notice(f"--memory holds {most} tokens of one sequence, not the {opened.n_ctx} of -c; longer ones are refused")
    return scheduler


def _served(
    a: argparse.Namespace, opened: Opened, loaded: Loaded, specs: Sequence[KVSpec], scheduler: Scheduler
) -> Served:
    from hybridkv import __version__
    from hybridkv.cache import KVTypes
    from hybridkv.model import vocab_size_of
    from hybridkv.server.request_handler import Served

    answers: AnswerDefaults = a.answers
    types = specs[0].types if specs else KVTypes()
    labels = ", ".join(dict.fromkeys(spec.types.label for spec in specs)) or "none"
    return Served(
        runner=scheduler,
        tokenizer=loaded.tokenizer,
        name=a.alias or loaded.description.name,
        types=types,
        types_label=labels,
        n_ctx=opened.n_ctx,
        parallel=a.parallel,
        n_vocab=vocab_size_of(loaded.model.config),
        end_ids=loaded.end_ids,
        session_dir=a.session_dir,
        strict=answers.strict,
        variables=answers.variables,
        reasoning_format=answers.reasoning_format,
        reasoning_budget=answers.reasoning_budget,
        sampling=answers.sampling,
        max_tokens=answers.max_tokens,
        notify=notice,
        fingerprint=f"hybridkv-{__version__}-{labels}".replace(", ", "-"),
    )


def gate_options(a: argparse.Namespace, keys: tuple[str, ...], *, local: bool, n_replicas: int) -> GateOptions:
    """Build the gate's options; print a notice if everybody is let in."""
    from hybridkv.server.gate import GateOptions

    if not local and not keys:
        warning("no --api-key: everyone who can reach this address can use the model")
    return GateOptions(
        api_keys=keys,
        max_body_bytes=a.max_body,
        local_only=local and not keys,
        max_in_flight=n_replicas * (a.parallel + a.max_waiting) + _BEING_READ,
    )


def _serve(
    a: argparse.Namespace,
    served: Served,
    scheduler: Scheduler | NoScheduler,
    listener: socket.socket,
    keys: tuple[str, ...],
) -> int:
    """Answer until a signal comes; the exit code."""
    from hybridkv.server.app import create_app
    from hybridkv.server.gate import GateState
    from hybridkv.server.listen import is_loopback, run, url_of

    options = gate_options(a, keys, local=is_loopback(listener), n_replicas=1)
    state = GateState()
    app = create_app(served, options, state)
    with ThreadPoolExecutor(1, "scheduler") as pool:
        running = pool.submit(scheduler.run_forever)

        def ready() -> None:
            print(f"{served.name} at {url_of(listener)}", file=sys.stderr, flush=True)

        try:
            finished = run(
                app,
                listener,
                state,
                ready=ready,
                draining=lambda n: notice(f"finishing what is being answered ({n}); Ctrl-C again ends at once"),
                stop_now=lambda: scheduler.shutdown(drain=False),
                alive=lambda: not running.done(),
            )
        finally:
            scheduler.shutdown(drain=False)  # nobody is left to wait for anything
        running.result()
    return 0 if finished else EXIT_INTERRUPTED
