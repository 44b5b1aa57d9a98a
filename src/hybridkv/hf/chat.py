"""Conversations as text: a model's own Jinja template, which is a stranger's program and treated as one.

Owns: the limits and the errors. Transformers renders, in Jinja's immutable sandbox: no attribute that
starts with an underscore, no change to what it is given, `range` up to 100 000. A template can still
loop in loops, hence the limit on time. Called by the command line and by the server.
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


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that a model sees of a conversation, up to where its answer begins.

    Parameters
    ----------
    tokenizer
        A Transformers tokenizer.
    messages
        Each with a `role` and a `content`.

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
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except SecurityError as error:
        raise ModelFileError(f"the chat template tries what it must not: {_line(error)}", hint=hint) from error
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
    """The same in any thread: another one has CPython raise the error here, between two of its instructions."""
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
