"""The words after a slash in a conversation: one table, from which help and completion derive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hybridkv.cli.show import size
from hybridkv.cli.talk.screen import Screen
from hybridkv.cli.talk.talk import Talk, history_of
from hybridkv.cli.talk.thoughts import Kind
from hybridkv.errors import UsageError
from hybridkv.formats import get_format

Pieces = Iterator[tuple[Kind, str]]


class Leave(Exception):  # noqa: N818 - an end, not an error
    """The conversation is over."""


@dataclass(frozen=True, slots=True)
class Command:
    """One of them.

    Attributes
    ----------
    value
        What it takes, for the help; "" for nothing.
    run
        Does it; gives the pieces of an answer, if it makes one.
    others
        What other programs call it.
    """

    name: str
    value: str
    text: str
    run: Callable[[Talk, Screen, str], Pieces | None]
    others: tuple[str, ...] = ()


def _help(talk: Talk, screen: Screen, value: str) -> None:
    del talk, value
    width = max(len(f"{c.name} {c.value}") for c in COMMANDS)
    for c in COMMANDS:
        screen.say(f"{f'{c.name} {c.value}':{width}}  {c.text}")
    screen.say('Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves; """ begins and ends')
    screen.say("a message of several lines.")


def _system(talk: Talk, screen: Screen, value: str) -> None:
    if value:
        talk.set_system(None if value == "-" else value)
    screen.say(f"system: {talk.system}" if talk.system is not None else "no system message")


def _regenerate(talk: Talk, screen: Screen, value: str) -> Pieces:
    del screen, value
    return talk.regenerate()


def _tool(talk: Talk, screen: Screen, value: str) -> Pieces:
    del screen
    if not value:
        raise UsageError("/tool needs what the tool has answered", hint='try /tool {"degrees": 21}')
    return talk.add_tool_result(value)


def _save(talk: Talk, screen: Screen, value: str) -> None:
    path = _path(value, "/save")
    screen.say(f"{talk.save(path)} tokens saved in {path}")


def _load(talk: Talk, screen: Screen, value: str) -> None:
    talk.load(_path(value, "/load"))
    screen.say(history_of(talk.messages))


def _path(value: str, name: str) -> Path:
    if not value:
        raise UsageError(f"{name} needs a file", hint=f"try {name} talk.session")
    return Path(value).expanduser()


def _stats(talk: Talk, screen: Screen, value: str) -> None:
    del value
    last = talk.last
    packed = any(get_format(name).is_quantized for name in (talk.types.type_k, talk.types.type_v))
    raised = ", but for layers that the guard has raised" * packed
    screen.say(f"cache: K {talk.types.type_k}, V {talk.types.type_v}{raised}")
    if last is None:
        screen.say("nothing was answered yet")
        return
    n_new = last.n_prompt - last.n_cached
    n_all, n_ctx = last.n_prompt + last.n_tokens, talk.scheduler.admission.n_ctx
    screen.say(f"context: {n_all} of {n_ctx} tokens, KV {size(last.kv_bytes)}")
    speed = n_new / last.prompt_s if last.prompt_s else 0.0
    screen.say(f"prompt: {n_new} tokens processed, {last.n_cached} reused; {last.prompt_s:.2f} s, {speed:.1f} tokens/s")
    speed = last.n_tokens / last.answer_s if last.answer_s else 0.0
    thought = f", {last.n_thought} of them thoughts" if last.n_thought else ""
    screen.say(f"answer: {last.n_tokens} tokens{thought}; {last.answer_s:.2f} s, {speed:.1f} tokens/s")


def _type(talk: Talk, screen: Screen, value: str) -> None:
    if value:
        talk.set_types(value)
    screen.say(f"cache: K {talk.types.type_k}, V {talk.types.type_v}" + "; all is processed again" * bool(value))


def _fold(talk: Talk, screen: Screen, value: str) -> None:
    del talk, value
    screen.folds = not screen.folds
    screen.say("thoughts are folded" if screen.folds else "thoughts are shown")


def _think(talk: Talk, screen: Screen, value: str) -> None:
    del value
    screen.say((talk.last.thought.strip() if talk.last is not None else "") or "no thoughts")


def _reset(talk: Talk, screen: Screen, value: str) -> None:
    del value
    talk.forget()
    screen.say("begun anew")


def _quit(talk: Talk, screen: Screen, value: str) -> None:
    del talk, screen, value
    raise Leave


COMMANDS: tuple[Command, ...] = (
    Command("/help", "", "show this", _help, ("/?",)),
    Command("/system", "[TEXT]", "set the system message, or show it; - takes it away", _system),
    Command("/regen", "", "answer the last question anew", _regenerate, ("/regenerate", "/retry")),
    Command("/tool", "TEXT", "say what a tool has answered to the last answer's call", _tool),
    Command("/type", "[TYPE]", "store the cache as q4_0, or q8_0/q4_0 for K and V", _type),
    Command("/stats", "", "show what the last answer took", _stats),
    Command("/fold", "", "fold thoughts away, or show them", _fold),
    Command("/think", "", "show the last thoughts", _think),
    Command("/save", "FILE", "write the conversation and its cache", _save),
    Command("/load", "FILE", "resume a saved conversation", _load),
    Command("/reset", "", "forget all turns", _reset, ("/clear", "/new")),
    Command("/quit", "", "leave, as Ctrl-D does", _quit, ("/exit", "/bye")),
)


def command(line: str, talk: Talk, screen: Screen) -> Pieces | None:
    """Do what a line that begins with a slash says.

    Raises
    ------
    UsageError
        For a word that is no command.
    """
    word, _, value = line.partition(" ")
    for c in COMMANDS:
        if word == c.name or word in c.others:
            return c.run(talk, screen, value.strip())
    raise UsageError(
        f"no command {word}", hint="/help lists them; a message that begins with / takes a space before it"
    )
