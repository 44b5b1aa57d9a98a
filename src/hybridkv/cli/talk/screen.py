"""The look of a conversation: text as it comes, thoughts dimmed or folded away, one line for what is going on."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time

from hybridkv.cli.show import notice
from hybridkv.cli.talk.talk import Answered
from hybridkv.cli.talk.thoughts import Kind

_DIM, _PLAIN, _CLEAR = "\x1b[2m", "\x1b[0m", "\r\x1b[2K"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""A model's text is data: what would move a terminal's cursor or change its title is left out."""

_NOTES = {"n": "-n ends the answer here", "context full": "the context is full: /reset begins anew"}


class Screen:
    """Writes answers to stdout.

    Without a terminal there, the answer's own text is written and nothing else.

    Attributes
    ----------
    folds
        Whether thoughts are one changing line, and one line of figures when they are over.
    """

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.colors = self.is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.folds = False
        self._kind: Kind | None = None
        self._line = ""
        self._begun = 0.0

    def begin(self) -> None:
        """Get ready for an answer."""
        self._kind, self._line, self._begun = None, "", time.perf_counter()

    def waiting(self, done: int, whole: int) -> None:
        """Say how far a prompt is, once it takes long."""
        if self.is_terminal and whole > 0 and time.perf_counter() - self._begun > 1:
            self._status(f"reading the prompt: {done} of {whole} tokens, {100 * done // whole} %")

    def write(self, kind: Kind, text: str) -> None:
        """Write a piece."""
        text = _CONTROL.sub("", text) if self.is_terminal else text
        if kind == "thought" and not self.is_terminal:
            return
        if kind != self._kind:
            self._change(kind)
        if kind == "thought" and self.folds:
            self._line = (self._line + text.replace("\n", " "))[-200:]
            self._status(f"thinking: ...{self._line[-(shutil.get_terminal_size().columns - 16) :]}")
            return
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self, answered: Answered) -> None:
        """Finish an answer; say what ended it, unless the model did."""
        self._clear()
        if self._kind == "thought" and not self.folds:
            sys.stdout.write(self._mark(_PLAIN))
        if self._kind == "thought" and self.folds:
            self._say_thoughts()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if answered.ended == "interrupted":
            self.say("(stopped)")
        elif answered.ended in _NOTES:
            notice(_NOTES[answered.ended])

    def fail(self) -> None:
        """Leave the line of an answer that did not come."""
        self._clear()
        if self._kind is not None:
            sys.stdout.write(f"{self._mark(_PLAIN)}\n")
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Write something of the program's own."""
        print(f"{self._mark(_DIM)}{_CONTROL.sub('', text)}{self._mark(_PLAIN)}", flush=True)

    def _change(self, kind: Kind) -> None:
        self._clear()
        if kind == "thought":
            self._begun = time.perf_counter()
            if not self.folds:
                sys.stdout.write(self._mark(_DIM))
        elif self._kind == "thought":
            if self.folds:
                self._say_thoughts()
            else:
                sys.stdout.write(f"{self._mark(_PLAIN)}\n\n")
        self._kind = kind

    def _say_thoughts(self) -> None:
        self.say(f"(thought for {time.perf_counter() - self._begun:.1f} s; /think shows it)")

    def _status(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write(f"{_CLEAR}{self._mark(_DIM)}{text[:width]}{self._mark(_PLAIN)}")
        sys.stdout.flush()
        self._written = True

    def _clear(self) -> None:
        if getattr(self, "_written", False):
            sys.stdout.write(_CLEAR)
            self._written = False

    def _mark(self, sequence: str) -> str:
        return sequence if self.colors else ""
