"""Sorts the text of an answer as it comes: thoughts, tool calls, and what is said.

A word that may begin something is withheld until it is known whether it does. What was opened and never closed stays
what it is: thoughts that the end cuts off are no content. A call that cannot be read is text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hybridkv.server.dialects import Call, Dialect, Tools, UnreadableCallError

THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""What models put around their thoughts."""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """The addition to a call; the first of each has its id and name."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(slots=True)
class Sorted:
    """The addition of a piece of text to each channel."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reading:
    """The way to read an answer.

    Attributes
    ----------
    thoughts
        What encloses thoughts; None leaves them in the content.
    opened
        Whether the prompt has opened them already.
    keeps_thoughts
        Whether they are content too.
    dialect, tools
        How calls are written, and which tools there are; None where none are to be found.
    one_call
        Whether the answer ends with its first call.
    """

    thoughts: tuple[str, str] | None = None
    opened: bool = False
    keeps_thoughts: bool = False
    dialect: Dialect | None = None
    tools: Tools = field(default_factory=dict)
    one_call: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """Words that have to reach the text even where they are control tokens."""
        dialect = () if self.dialect is None else (self.dialect.opens, self.dialect.closes, "[ARGS]", "[CALL_ID]")
        return tuple(word for word in (*(self.thoughts or ()), *dialect) if word)


def thoughts_of(template: str) -> tuple[str, str]:
    """Find the marks that a model with this chat template puts around its thoughts."""
    return next((pair for pair in THOUGHTS if pair[0] in template or pair[1] in template), THOUGHTS[0])


class Channels:
    """Sorts one answer.

    Parameters
    ----------
    reading
        How it is written.

    Attributes
    ----------
    n_held
        Characters that were given and not yet sorted.
    n_calls
        Calls that were found.
    ended
        Whether the answer is over though the model may continue: `reading.one_call`.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._state: Literal["begin", "thoughts", "content", "call"] = "begin"
        if reading.thoughts is not None and reading.opened:
            self._state = "thoughts"
        self._held = ""
        self._sent: list[Call] = []  # of the calls that are being written
        self._bare = False
        self._fresh = True  # nothing but space has come since thoughts or calls ended
        self.n_calls = 0
        self.ended = False

    @property
    def n_held(self) -> int:
        """Characters that were given and not yet sorted."""
        return len(self._held)

    @property
    def thinks(self) -> bool:
        """True if the text is inside of thoughts."""
        return self._state == "thoughts"

    def push(self, text: str) -> Sorted:
        """Sort the next piece."""
        out = Sorted()
        self._held += text
        while not self.ended and self._step(out, final=False):
            pass
        return out

    def close(self) -> Sorted:
        """Sort what was withheld: the answer has ended."""
        out = Sorted()
        while not self.ended and self._held and self._step(out, final=True):
            pass
        return out

    def _step(self, out: Sorted, *, final: bool) -> bool:
        """Sort as much as one state can; whether another may continue."""
        if self._state == "begin":
            return self._begin(final=final)
        if self._state == "thoughts":
            return self._think(out, final=final)
        if self._state == "content":
            return self._say(out, final=final)
        return self._call(out, final=final)

    def _begin(self, *, final: bool) -> bool:
        text, dialect = self._held.lstrip(), self._reading.dialect
        opens = "" if self._reading.thoughts is None else self._reading.thoughts[0]
        if opens and text.startswith(opens):
            self._state = "thoughts"
            if not self._reading.keeps_thoughts:
                self._held = text[len(opens) :]
            return True
        if not final and (not text or (opens and opens.startswith(text))):
            return False
        if dialect is not None and dialect.bare and text.startswith("{"):
            self._state, self._bare = "call", True
            return True
        self._state, self._fresh = "content", False
        return True

    def _think(self, out: Sorted, *, final: bool) -> bool:
        assert self._reading.thoughts is not None
        opens, closes = self._reading.thoughts
        thought, found, rest = self._held.partition(closes)
        if not found and not final:
            n_kept = overlap(thought, closes)
            n_kept += len(thought[: len(thought) - n_kept]) - len(thought[: len(thought) - n_kept].rstrip())
            thought, rest = thought[: len(thought) - n_kept], thought[len(thought) - n_kept :]
        self._held = rest
        if self._reading.keeps_thoughts:
            out.content += thought + found
            thought = thought.removeprefix(opens)
        if self._fresh:
            thought = thought.lstrip()
            self._fresh = not thought
        out.reasoning += thought.rstrip() if found else thought
        if found:
            self._state, self._fresh = "content", True
        return bool(found)

    def _say(self, out: Sorted, *, final: bool) -> bool:
        dialect = self._reading.dialect
        if self._fresh:
            self._held = self._held.lstrip()
            if not self._held:
                return False
            if dialect is not None and dialect.bare and not self.n_calls and self._held.startswith("{"):
                self._state, self._bare = "call", True
                return True
        opens = "" if dialect is None else dialect.opens
        said, found, rest = self._held.partition(opens) if opens else (self._held, "", "")
        if found:
            said = said.rstrip()
            self._state = "call"
        elif opens and not final:
            n_kept = overlap(said, opens)
            n_kept += len(said[: len(said) - n_kept]) - len(said[: len(said) - n_kept].rstrip())
            said, rest = said[: len(said) - n_kept], said[len(said) - n_kept :]
        self._held = rest
        if said:
            self._fresh = False
        out.content += said
        return bool(found)

    def _call(self, out: Sorted, *, final: bool) -> bool:
        dialect = self._reading.dialect
        assert dialect is not None
        body, closed, rest = self._held.partition(dialect.closes) if dialect.closes else (self._held, "", "")
        # A call without its closing word is whole if it reads as one.
        whole = bool(closed) or final
        try:
            calls = dialect.read(body, whole, self._reading.tools)
            if self._bare and whole and not all(call.name in self._reading.tools for call in calls):
                raise UnreadableCallError(body[:80])
        except UnreadableCallError:
            return self._unreadable(out, body + closed, rest, whole=whole)
        if self._bare and not whole:
            return False  # an object that is the answer itself looks the same until it has ended
        self._hand_out(out, calls)
        if not whole:
            return False
        self._held, self._sent = rest, []
        self.n_calls += len(calls)
        self._state, self._fresh, self._bare = "content", True, False
        self.ended = self._reading.one_call
        return bool(rest)

    def _unreadable(self, out: Sorted, body: str, rest: str, *, whole: bool) -> bool:
        """Take for text what cannot be read; of a call that was begun in a stream, what was said stays."""
        assert self._reading.dialect is not None
        if not whole:
            return False
        if self._sent:
            self.n_calls += len(self._sent)
        else:
            out.content += body if self._bare else self._reading.dialect.opens + body
        self._held, self._sent, self._state, self._bare, self._fresh = rest, [], "content", False, False
        return bool(rest)

    def _hand_out(self, out: Sorted, calls: list[Call]) -> None:
        """Return what is new since the last reading; at most one call, if one is all that is wanted."""
        for place, call in enumerate(calls[:1] if self._reading.one_call else calls):
            known = self._sent[place] if place < len(self._sent) else None
            said = "" if known is None else known.arguments
            if known is not None and (not call.arguments.startswith(said) or call.arguments == said):
                continue
            out.calls.append(
                CallDelta(
                    self.n_calls + place,
                    f"call_{secrets.token_hex(12)}" if known is None else None,
                    call.name if known is None else None,
                    call.arguments[len(said) :],
                )
            )
            self._sent[place : place + 1] = [call]


def overlap(text: str, word: str) -> int:
    """Count the characters at the end of `text` with which `word` begins; less than all of `word`."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)


def control_ids(tokenizer: Any, words: tuple[str, ...]) -> Mapping[int, str]:
    """Find those of the words that are single tokens which decoding leaves out."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {index: token.content for index, token in added.items() if token.special and token.content in words}


def opens_thoughts(prompt: str, thoughts: tuple[str, str]) -> bool:
    """Check whether a prompt ends inside of thoughts, as those of templates do that open them."""
    return re.search(re.escape(thoughts[0]) + r"\s*\Z", prompt) is not None
