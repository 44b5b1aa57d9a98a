"""Read lines, answer them: the loop of `hybridkv chat`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv.cli.talk.commands import COMMANDS, Leave, Pieces, command
from hybridkv.cli.talk.screen import Screen
from hybridkv.cli.talk.talk import Talk
from hybridkv.errors import HybridKVError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

_QUOTES = '"""'


def converse(talk: Talk, screen: Screen, first: str | None, *, after: Callable[[], None] = lambda: None) -> int:
    """Answer a first message, if there is one, and then what is typed; the exit code.

    Parameters
    ----------
    after
        Called after each answer.
    """
    talk.on_step = screen.waiting
    if first is not None:
        fine = _show(talk, screen, talk.ask(first))
        after()
        if not sys.stdin.isatty():
            return 0 if fine else 2
    session = _session()
    screen.say("/help lists commands; Ctrl-D leaves")
    while True:
        try:
            line = read_message(session.prompt)
        except KeyboardInterrupt:  # clears the line, as a shell does
            continue
        except EOFError:
            return 0
        if not line.strip():
            continue
        try:
            pieces = command(line.strip(), talk, screen) if line.startswith("/") else talk.ask(line)
            if pieces is not None:
                _show(talk, screen, pieces)
                after()
        except Leave:
            return 0
        except HybridKVError as error:
            print(f"error: {error}", file=sys.stderr)


def read_message(prompt: Callable[[str], str]) -> str:
    """Read a line, or the lines between two triple quotes, as ollama has them."""
    line = prompt("> ")
    if not line.lstrip().startswith(_QUOTES):
        return line
    lines = [line.lstrip().removeprefix(_QUOTES)]
    while _QUOTES not in lines[-1]:
        lines.append(prompt("  "))
    lines[-1] = lines[-1].partition(_QUOTES)[0]
    return "\n".join(lines).strip("\n")


def _show(talk: Talk, screen: Screen, pieces: Pieces) -> bool:
    """Write an answer as it comes; whether there was one."""
    screen.begin()
    try:
        with _stopping(talk):
            for kind, text in pieces:
                screen.write(kind, text)
    except HybridKVError as error:
        screen.fail()
        print(f"error: {error}", file=sys.stderr)
        return False
    assert talk.last is not None
    screen.end(talk.last)
    return True


@contextmanager
def _stopping(talk: Talk) -> Iterator[None]:
    """Let Ctrl-C stop the answer, between two steps, and not the program."""

    def stop(*_: object) -> None:
        talk.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        with _quiet_keys():
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quiet_keys() -> Iterator[None]:
    """Keep the terminal from writing typed keys into an answer; they are read with the next line."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    quiet = termios.tcgetattr(file)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(file, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(file, termios.TCSANOW, before)


def _session() -> PromptSession[str]:
    """Create a line editor: history in a file, Alt-Enter for a new line, pasted text as it is, commands completed."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    path = history_path()
    history: History = InMemoryHistory() if path is None else FileHistory(str(path))
    words = WordCompleter([c.name for c in COMMANDS], sentence=True)
    return PromptSession(
        history=history,
        key_bindings=keys,
        multiline=True,
        completer=words,
        complete_while_typing=False,
        prompt_continuation="  ",
    )


def history_path() -> Path | None:
    """Find the file of earlier lines; None where nothing can be written."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    path = Path(base) / "hybridkv" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return None
    return path
