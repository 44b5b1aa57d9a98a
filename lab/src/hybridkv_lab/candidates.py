"""Candidates: what an evaluation compares, each one way to store the KV cache, under its label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hybridkv.policy import AnyPolicy, Policy
from hybridkv.policy.labels import expand_types, label
from hybridkv_lab.results import Role


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store the cache.

    Attributes
    ----------
    label
        As it is written in tables; unique in a run.
    policy
        What each KV layer is stored as.
    role
        `reference` is what the others are compared with, `floor` the same types once more, computed in another order.
    config
        Name of the file that gives every layer its own types, or None.
    """

    label: str
    policy: AnyPolicy
    role: Role = "candidate"
    config: str | None = None


def expand(
    types: Iterable[str],
    *,
    rotations: Sequence[str] = (),
    common: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> list[Candidate]:
    """Make a candidate of every type with every option, as `expand_types` does."""
    every = expand_types(types, rotations=rotations, common=common)
    return [Candidate(label(one), Policy(one)) for one in every]
