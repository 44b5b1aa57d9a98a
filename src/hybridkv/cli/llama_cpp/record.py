"""One option of llama.cpp or ik_llama.cpp, and what it is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fate = Literal["same", "note", "refused"]
"""`same`: an option of ours by the same name. `note`: accepted, one line says what it is here. `refused`: an error,
because passing over it would change the answer."""

Takes = Literal["", "N", "[N]", "N..."]
"""Number of values that an option takes: none, one, one or none, one or more."""


@dataclass(frozen=True, slots=True)
class LlamaOption:
    """One option.

    Attributes
    ----------
    names
        Its spellings; the first is shown.
    fate
        What becomes of it.
    text
        What it is here, or why it is refused; of `same`, what differs.
    takes
        Its values.
    env
        The environment variable that llama.cpp reads for it, or "".
    off
        Values that ask for nothing, such as `--mirostat 0`: accepted without a word.
    """

    names: tuple[str, ...]
    fate: Fate
    text: str = ""
    takes: Takes = "N"
    env: str = ""
    off: tuple[str, ...] = ()

    def is_off(self, value: str | None) -> bool:
        """Check whether a value asks for nothing."""
        return value is not None and any(_equal(value, off) for off in self.off)


def same(names: str, text: str = "", *, takes: Takes = "N", env: str = "") -> LlamaOption:
    """Describe an option that a parser of ours has."""
    return LlamaOption(tuple(names.split()), "same", text, takes, env)


def note(names: str, text: str, *, takes: Takes = "N", env: str = "", off: str = "") -> LlamaOption:
    """Describe an option that changes nothing in the answer."""
    return LlamaOption(tuple(names.split()), "note", text, takes, env, tuple(off.split()))


def refused(names: str, text: str, *, takes: Takes = "N", env: str = "", off: str = "") -> LlamaOption:
    """Describe an option whose answer would be another one; `off` lists the values that ask for nothing."""
    return LlamaOption(tuple(names.split()), "refused", text, takes, env, tuple(off.split()))


def _equal(value: str, off: str) -> bool:
    try:
        return float(value) == float(off)
    except ValueError:
        return value.lower() == off
