"""The shape of one attention call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """Head dim, query and KV heads, new and stored tokens; one sequence, causal."""

    head_dim: int
    n_heads: int
    n_kv_heads: int
    n_new: int
    n_stored: int

    @property
    def multiply_adds(self) -> float:
        """Of both products."""
        seen = self.n_stored - (self.n_new - 1) / 2
        return 2 * self.n_heads * self.n_new * seen * self.head_dim

    def __str__(self) -> str:
        return f"D={self.head_dim} {self.n_heads}/{self.n_kv_heads} T={self.n_new} S={self.n_stored}"
