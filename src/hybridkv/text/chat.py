"""Conversations as text: a model's own Jinja template, which is a stranger's program and treated as one.

Owns: the limits and the errors, and what becomes of system messages that a template does not take. Transformers
renders, in Jinja's immutable sandbox: no attribute that starts with an underscore, no change to what it is given,
`range` up to 100 000. A template can still loop in loops, hence the limit on time. Called by the command line and by
the server.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from hybridkv.errors import ModelFileError, UsageError
from hybridkv.text.control_words import ControlWords, Covered

MAX_SECONDS = 5.0
MAX_CHARACTERS = 1 << 26

# What Jinja lets through when a template computes nonsense.
_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


Message = Mapping[str, Any]


class MessageError(ModelFileError):
    """A message that the chat template does not take.

    Parameters
    ----------
    index
        Which one, from 0.
    """

    def __init__(self, message: str, *, index: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.index = index


def chat_prompt(
    words: ControlWords, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
) -> Covered:
    """Render a conversation, up to where its answer begins.

    System messages at the beginning are merged, a blank line between them, where the template takes only one.

    Parameters
    ----------
    words
        Those of the model's tokenizer.
    messages
        Each with a `role` and a `content`, and whatever else the template knows.
    variables
        Of the template, such as `enable_thinking`.

    Raises
    ------
    UsageError
        If the model has no chat template.
    MessageError
        For a system message that the template refuses or leaves out.
    ModelFileError
        If the template fails, tries what the sandbox forbids, or does not end.
    """
    cover = words.cover_of([*_texts(messages), *_texts(variables or {})])
    covered = [cover.cover_message(message) for message in messages]
    # Tools and variables are text that people wrote, too.
    text = _render_systems(words.tokenizer, covered, cover.cover_message(variables or {}))
    return Covered(cover.rendered(text), cover)


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, held in value.items():
            yield from _texts(key)
            yield from _texts(held)
    elif isinstance(value, (list, tuple)):
        for held in value:
            yield from _texts(held)


def _render_systems(tokenizer: Any, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    """Render messages whose system messages after the first may be more than the template takes."""
    later = [index for index, message in enumerate(messages) if index and message.get("role") == "system"]
    if not later or _takes(tokenizer, messages, later, variables):
        return chat_text(tokenizer, messages, variables)
    n_first = next((n for n, message in enumerate(messages) if message.get("role") != "system"), len(messages))
    if n_first > 1:
        contents = [str(message.get("content") or "") for message in messages[:n_first]]
        messages = [{**messages[0], "content": "\n\n".join(contents)}, *messages[n_first:]]
        later = [index - n_first + 1 for index in later if index >= n_first]
    if later and not _takes(tokenizer, messages, later, variables):
        without = [message for index, message in enumerate(messages) if index not in later]
        chat_text(tokenizer, without, variables)  # what else is wrong is said first
        index = later[0] + max(n_first, 1) - 1
        raise MessageError(
            f"messages.{index}: the chat template takes system messages at the beginning alone",
            index=index,
            hint="move it to the beginning, or make it a part of a user message",
        )
    return chat_text(tokenizer, messages, variables)


def _takes(tokenizer: Any, messages: Sequence[Message], later: Sequence[int], variables: Mapping[str, Any]) -> bool:
    """Check whether a template writes these system messages: some refuse them, some leave them out in silence."""
    marks = {index: f"system{index}message" for index in later}
    marked = [{**m, "content": marks[n]} if n in marks else m for n, m in enumerate(messages)]
    try:
        text = chat_text(tokenizer, marked, variables)
    except ModelFileError:
        return False
    return all(mark in text for mark in marks.values())


def chat_text(tokenizer: Any, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
    """Render the text that a model sees of a conversation, up to where its answer begins.

    Parameters
    ----------
    tokenizer
        A Transformers tokenizer.
    messages
        Each with a `role` and a `content`.
    variables
        Of the template.

    Raises
    ------
    UsageError
        If the model has no chat template.
    ModelFileError
        If the template fails, tries what the sandbox forbids, or does not end.
    """
    if not tokenizer.chat_template:
        raise UsageError("--chat: this model has no chat template", hint="leave --chat out")
    hint = "the template is a part of the model; leave --chat out to do without it"
    try:
        with _time_limit():
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **(variables or {})
            )
    except SecurityError as error:
        raise ModelFileError(f"the chat template does something forbidden: {_line(error)}", hint=hint) from error
    except TimeoutError as error:
        raise ModelFileError(f"the chat template takes more than {MAX_SECONDS:.0f} s", hint=hint) from error
    except _FAILURES as error:
        raise ModelFileError(f"the chat template fails: {_line(error)}", hint=hint) from error
    if len(text) > MAX_CHARACTERS:
        raise ModelFileError(f"the chat template makes {len(text)} characters of this prompt", hint=hint)
    return str(text)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise `TimeoutError` after `MAX_SECONDS`: by a signal in the main thread, where there are signals."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        with _thread_limit():
            yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _thread_limit() -> Iterator[None]:
    """Limit the time in any thread: another one has CPython raise the error here, between two of its instructions."""
    here, lock, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def stop() -> None:
        with lock:
            if not over:
                raise_in(here, ctypes.py_object(TimeoutError))

    timer = threading.Timer(MAX_SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
            raise_in(here, None)  # one that was on its way as the template ended
        timer.cancel()


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
