"""Other implementations of what is measured here. Each is optional, and says what was found of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """One peer as it was found.

    Attributes
    ----------
    name
        As in `--against`.
    about
        A line for people: what it is, its version and build, or how to install it.
    path, version, build
        Of the library that runs; None where it is not installed.
    flags
        Instruction sets that the library itself says it was compiled for.
    """

    name: str
    about: str
    path: str | None = None
    version: str | None = None
    build: str | None = None
    flags: tuple[str, ...] = ()
