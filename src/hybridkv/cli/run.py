"""`hybridkv run`: answer a prompt with a model on a quantized KV cache."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from hybridkv.cli.cache_options import add_cache_arguments, policy_from
from hybridkv.cli.chat_options import add_chat_arguments, chat_choice, is_chat, stops_of
from hybridkv.cli.compiler import start_early
from hybridkv.cli.fits import Demand, check_memory, fit_context
from hybridkv.cli.form_options import add_form_arguments, form_from
from hybridkv.cli.guess_memory import guesses_for
from hybridkv.cli.model_options import (
    add_model_arguments,
    check_limits,
    limit_spinning,
    open_model,
)
from hybridkv.cli.progress import loading, reading
from hybridkv.cli.prompt import add_prompt_arguments, is_typed, read_prompt
from hybridkv.cli.ranks import check_ranks, leave_ranks, report_failure, silence_other_ranks
from hybridkv.cli.resolve import resolve_types
from hybridkv.cli.sampler_options import add_sampling_arguments, sampling_for, sampling_from
from hybridkv.cli.session import Conversation, check_session, open_conversation
from hybridkv.cli.show import notice, size
from hybridkv.cli.spec_options import add_spec_arguments, check_spec, speculation_from
from hybridkv.cli.talk.start import check_talk, talk_about
from hybridkv.errors import ContextError, HybridKVError, UsageError
from hybridkv.options import EXACT, OWN

if TYPE_CHECKING:
    from hybridkv.cli.stream import Streams
    from hybridkv.engine import Engine, SamplingParams
    from hybridkv.engine.load import Loaded
    from hybridkv.engine.sampling import Steering
    from hybridkv.kernels.cuda.compiling import Compiled

NAME = "run"
HELP = "answer a prompt with a model on a quantized KV cache"

_FLASH = {"1": "on", "true": "on", "0": "off", "false": "off"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv run`, in llama-cli's spellings."""
    add_model_arguments(parser)
    add_prompt_arguments(parser)
    add_chat_arguments(parser)
    parser.add_argument(
        "-n",
        "--n-predict",
        "--predict",
        type=int,
        metavar="N",
        help="maximum tokens to generate; -1: until the context is full (default 64, in a chat -1)",
    )
    parser.add_argument(
        "-np",
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="answers to generate from the prompt at once (default 1)",
    )
    parser.add_argument(
        "--session",
        metavar="FILE",
        help="resume the conversation in FILE if it exists, and save it there",
    )
    parser.add_argument(
        "-fa",
        "--flash-attn",
        nargs="?",
        const="on",
        default="auto",
        metavar="on|off|auto",
        help="for compatibility with llama-cli: attention always reads the packed cache",
    )
    parser.add_argument(
        "-cuda", metavar="KEY=VALUE", help="for compatibility with ik_llama.cpp: fa-offset has no effect"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="continue after the end-of-text token")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    add_cache_arguments(parser)
    add_sampling_arguments(parser)
    add_form_arguments(parser)
    add_spec_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Check, resolve, print the table, load, generate, print the figures."""
    start_early(arguments)
    limit_spinning()
    from hybridkv.policy import Guard, parse_mode

    a = arguments
    _check(a)
    choice, form = chat_choice(a), form_from(a)
    talks = (a.conversation or a.interactive) and not a.single_turn
    prompt = None if talks and is_typed(a) else read_prompt(a)
    policy = policy_from(a)
    guard = Guard(mode=parse_mode(a.kv_guard))
    sampling = sampling_from(a)

    from hybridkv.engine import Engine
    from hybridkv.engine.admission import is_out_of_memory

    opened = open_model(a, ranks="many")
    guesses = guesses_for(a, opened, n_seqs=a.parallel)
    opened = fit_context(opened, a.ctx_size, policy, guard, n_seqs=a.parallel, guesses=guesses)
    if talks:
        return talk_about(a, opened, policy, guard, sampling, choice, form, None if prompt is None else str(prompt))
    assert prompt is not None
    notify = silence_other_ranks(opened.description.n_ranks)
    n_ctx = opened.n_ctx
    specs = resolve_types(opened, policy, guard)
    guesses = guesses_for(a, opened, n_seqs=a.parallel)
    opened = check_memory(opened, Demand(specs, n_ctx, a.parallel, guarded=guard.measures, guesses=guesses))
    with loading(opened.description.name, opened.ahead) as shown:
        loaded, step = opened.load(specs, shown)
    talk = open_conversation(a, prompt, loaded.model, loaded.tokenizer, choice)
    steering = form.steering_for(loaded)(talk.text if a.chat else None)
    print(f"backend: {opened.backend_name(step)}", file=sys.stderr)
    try:
        speculation = speculation_from(a, loaded, step, notify, n_ctx=n_ctx, n_seqs=a.parallel)
        engine = Engine(
            loaded.model, specs, n_ctx=n_ctx, guard=guard, notify=notify, step=step, speculation=speculation
        )
        talk.hand_over(engine)
        sampling = sampling_for(sampling, a, loaded)
        return leave_ranks(_generate(a, loaded, engine, sampling, talk, steering))
    except HybridKVError as error:
        report_failure(error)
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        needed = sum(spec.bytes_at(n_ctx, a.parallel) for spec in specs)
        raise ContextError(
            f"not enough memory: the KV cache of {a.parallel} x {n_ctx} tokens takes {size(needed)}",
            hint="take a smaller -c, fewer sequences (-np) or smaller types (-ctk, -ctv); `hybridkv plan` counts them",
        ) from error


def _check(a: argparse.Namespace) -> None:
    """Refuse what can be refused before anything heavy is imported."""
    a.flash_attn = _FLASH.get(a.flash_attn, a.flash_attn)
    if a.flash_attn not in ("on", "off", "auto"):
        raise UsageError(f"-fa {a.flash_attn!r}; allowed: on, off, auto")
    a.chat = is_chat(a)
    if a.n_predict is None:
        a.n_predict = -1 if a.chat else 64
    a.n_predict = -1 if a.n_predict == -2 else a.n_predict  # until the context is full, in older programs
    if a.n_predict == 0 or a.n_predict < -1:
        raise UsageError(f"-n {a.n_predict}; allowed: 1 or more, or -1 until the context is full", hint="try -n 64")
    if a.conversation or a.interactive:
        check_talk(a)
    check_session(a)
    check_spec(a)
    check_ranks(a)
    check_limits(a, ("-np", "parallel", 1, 1024))
    if a.flash_attn == "off":
        notice(
            "-fa off has no effect: llama.cpp needs flash attention for a quantized V, but every kernel here reads "
            "the packed cache directly"
        )
    if a.cuda is not None:
        key = a.cuda.partition("=")[0]
        if key != "fa-offset":
            raise UsageError(f"-cuda {a.cuda!r}; allowed: fa-offset=X", hint="leave -cuda out")
        notice(
            f"-cuda {a.cuda} is not needed: scores, softmax and the value accumulator are float32 here, "
            "so the overflow that the offset works around cannot happen"
        )


def _generate(
    a: argparse.Namespace,
    loaded: Loaded,
    engine: Engine,
    sampling: SamplingParams,
    talk: Conversation,
    steering: Steering | None,
) -> int:
    """Stream the answer, then print what it took. Nothing reaches stdout before the first token is there."""
    from hybridkv.cli.stream import Streams
    from hybridkv.kernels.cuda.compiling import watch_compilation

    text, ids = talk.text, talk.ids
    # A grammar that is at its end lets nothing but an end through.
    ends = set() if a.ignore_eos and steering is None else set(loaded.end_ids)
    shown = a.display_prompt if a.display_prompt is not None else not a.chat
    streams = Streams(
        loaded.tokenizer if a.ids is None else None,
        ids,
        a.parallel,
        ends,
        prompt=text if shown else "",
        live=not a.json,
        stops=stops_of(a),
    )
    stopped = "n"
    with watch_compilation(loaded.model.device.type) as compiled, reading(len(ids), engine.read_share) as end_reading:
        try:
            for tokens in engine.generate(
                ids, sampling, n_predict=a.n_predict, n_seqs=a.parallel, steering=steering, keep_at=talk.n_shared
            ):
                end_reading()
                streams.push(tokens)
                if streams.all_ended:
                    stopped = "reverse prompt" if streams.all_stopped else "end of text"
                    break
            else:
                if engine.timings.n_generated != a.n_predict * a.parallel:
                    stopped = "context full"
        except KeyboardInterrupt:
            stopped = "interrupted"
    streams.close()
    talk.keep(engine, loaded.model, answer=streams.sequences[0].text, ended=stopped == "end of text")
    if stopped == "context full":
        notice(f"stopped: the context is full at {engine.history.shape[1]} tokens")
    if a.json:
        print(json.dumps(_result(engine, loaded, streams, sampling, text, ids, stopped, compiled)))
    else:
        _print_figures(engine, sampling, compiled)
    return 130 if stopped == "interrupted" else 0


def _print_figures(engine: Engine, sampling: SamplingParams, compiled: Compiled) -> None:
    t, cache = engine.timings, engine.cache
    lines = [
        f"prompt:     {t.n_prompt} tokens, {t.prompt_tok_s:.1f} tokens/s",
        f"generation: {t.n_generated} tokens, {t.generation_tok_s:.1f} tokens/s",
        f"memory:     KV {size(cache.kv_bytes_used)} used of {size(cache.kv_bytes)}, states {size(cache.state_bytes)}",
    ]
    if t.n_guessed:
        share, each = 100 * t.n_right / t.n_guessed, t.n_generated / t.n_runs
        lines.append(f"guesses:    {t.n_right} of {t.n_guessed} right ({share:.0f} %), {each:.2f} tokens a step")
    if compiled.n_kernels:
        kept = f"{compiled.n_kernels} compiled in {compiled.seconds:.1f} s of that, kept for the next run"
        lines.append(f"kernels:    {kept}")
    if cache.errors:
        lines.append(_guard_line(engine))
    if t.n_rebuilds:
        lines.append(f"rebuilds:   {t.n_rebuilds}")
    if sampling.temp > 0:
        lines.append(f"seed:       {sampling.seed}")
    print("\n" + "\n".join(lines), file=sys.stderr)


def _guard_line(engine: Engine) -> str:
    """Name the layer that comes nearest to its limit, or furthest beyond it."""
    errors, limits = engine.cache.errors, engine.cache.limits
    worst = max(errors, key=lambda layer: errors[layer] / limits[layer])
    found = f"within {errors[worst]:.3g} of float, limit {limits[worst]:.3g}"
    return f"guard:      first prompt's attention {found} (worst: layer {worst})"


def _result(
    engine: Engine,
    loaded: Loaded,
    streams: Streams,
    sampling: SamplingParams,
    text: str,
    ids: list[int],
    stopped: str,
    compiled: Compiled,
) -> dict[str, Any]:
    """Build the object that `--json` prints."""
    t, cache = engine.timings, engine.cache
    return {
        "model": loaded.description.name,
        "prompt": text,
        "prompt_ids": ids,
        "sequences": [{"text": s.text, "ids": s.ids} for s in streams.sequences],
        "stopped": stopped,
        "seed": sampling.seed if sampling.temp > 0 else None,
        "backend": engine.step.name,
        "prompt_tokens": t.n_prompt,
        "prompt_tok_s": t.prompt_tok_s,
        "generated_tokens": t.n_generated,
        "generation_tok_s": t.generation_tok_s,
        "guessed_tokens": t.n_guessed,
        "right_guesses": t.n_right,
        "compiled_kernels": compiled.n_kernels,
        "compile_s": compiled.seconds,
        "rebuilds": t.n_rebuilds,
        "kv_bytes": cache.kv_bytes,
        "kv_bytes_used": cache.kv_bytes_used,
        "state_bytes": cache.state_bytes,
        "layers": [
            {
                "layer": layer.spec.facts.layer,
                **{option.name: getattr(layer.types, option.name) for option in OWN},
                **{option.name: getattr(layer.spec, option.name) for option in EXACT},
                "kernel_prefill": layer.kernels.prefill.name,
                "kernel_decode": layer.kernels.decode.name,
                "bytes_per_token": layer.spec.bytes_per_token,
                "guard_error": cache.errors.get(layer.spec.facts.layer),
                "guard_limit": cache.limits.get(layer.spec.facts.layer),
            }
            for layer in cache.kv_layers
        ],
    }
