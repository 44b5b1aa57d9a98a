"""Stored prefixes: beginnings that a new sequence can resume from, so that a shared beginning is processed once.

A recurrent state cannot go back to an earlier token. So a sequence leaves checkpoints behind as it goes: a copy of its
states (and of the few exact rows beside a tail) together with the packed KV rows since the checkpoint before. The
checkpoints of all sequences form a tree, in which rows are held once however many checkpoints lie behind them.

A checkpoint is found by the hash of the tokens since the one before it and taken only if the tokens themselves are
equal, down from the root: two prompts that share a hash share nothing. Memory is bounded in bytes. The checkpoint that
was used longest ago loses its states first; rows that no checkpoint is left to need go at once with it, and so nothing
is ever stranded. Copies are never changed: a sequence that resumes from one gets memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hybridkv.cache import KVSpec
from hybridkv.runtime import ModelCache
from hybridkv.runtime.stored import StoredCache

Key = tuple[KVSpec, ...]
"""How a sequence was asked to be stored: sequences of other types never meet."""


class Checkpoint:
    """A prefix to resume from. Once its states are evicted, it only holds rows that its children share.

    Attributes
    ----------
    end
        Tokens up to here, of the whole sequence.
    tokens
        Those since the parent.
    stored
        Rows since the parent, and states if one can resume from here.
    """

    __slots__ = ("children", "end", "kept", "key", "parent", "stored", "tokens")

    def __init__(self, key: Key, parent: Checkpoint | None, tokens: tuple[int, ...], stored: StoredCache) -> None:
        self.key, self.parent, self.tokens, self.stored = key, parent, tokens, stored
        self.end: int = len(tokens) + (0 if parent is None else parent.end)
        self.children = Children()
        self.kept = True

    def path(self) -> list[Checkpoint]:
        """List the checkpoints from the root's child to this one."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]


class Children:
    """Checkpoints by the tokens since their parent: by length, then by the hash of the tokens, then by the tokens."""

    __slots__ = ("_by_length",)

    def __init__(self) -> None:
        self._by_length: dict[int, dict[tuple[int, ...], Checkpoint]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_length)

    def get(self, tokens: tuple[int, ...]) -> Checkpoint | None:
        """Find the child of exactly these tokens."""
        return self._by_length.get(len(tokens), {}).get(tokens)

    def put(self, child: Checkpoint) -> None:
        """Take a child in."""
        self._by_length.setdefault(len(child.tokens), {})[child.tokens] = child

    def drop(self, child: Checkpoint) -> None:
        """Let a child go."""
        alike = self._by_length[len(child.tokens)]
        del alike[child.tokens]
        if not alike:
            del self._by_length[len(child.tokens)]

    def beginning(self, tokens: tuple[int, ...], start: int, most: int) -> Iterator[Checkpoint]:
        """Yield children whose tokens are the next of `tokens` from `start` on, and end at `most` or before."""
        for length, alike in self._by_length.items():
            if start + length <= most and (child := alike.get(tokens[start : start + length])) is not None:
                yield child


class PrefixStore:
    """The checkpoints of all sequences, within a budget.

    Parameters
    ----------
    budget_bytes
        What all rows and states may take; 0 stores nothing.

    Attributes
    ----------
    n_refused
        Checkpoints that found no room.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self.n_refused = 0
        self._roots: dict[Key, Children] = {}
        self._order: dict[Checkpoint, None] = {}  # those with states, the longest unused first

    def __len__(self) -> int:
        """Count the prefixes that can be resumed."""
        return len(self._order)

    def find(self, key: Key, tokens: Sequence[int], most: int) -> Checkpoint | None:
        """Find the furthest checkpoint of a sequence that begins with these tokens, at most `most` tokens long."""
        tokens = tuple(tokens)
        best: Checkpoint | None = None
        reached = [(self._roots[key], 0)] if key in self._roots else []
        while reached:
            children, start = reached.pop()
            for child in children.beginning(tokens, start, most):
                reached.append((child.children, child.end))
                if child in self._order and (best is None or child.end > best.end):
                    best = child
        if best is not None:
            self._order[best] = self._order.pop(best)
        return best

    @staticmethod
    def copies(checkpoint: Checkpoint) -> list[StoredCache]:
        """Collect what `ModelCache.load` takes to resume from a checkpoint."""
        return [node.stored for node in checkpoint.path()]

    def last_within(self, checkpoint: Checkpoint, most: int) -> Checkpoint | None:
        """Find the last resumable prefix before a checkpoint, at most `most` tokens long."""
        before = [node for node in checkpoint.path()[:-1] if node.end <= most and node in self._order]
        return before[-1] if before else None

    def add(self, key: Key, tokens: Sequence[int], cache: ModelCache, parent: Checkpoint | None) -> Checkpoint | None:
        """Leave a checkpoint at the end of `tokens`, which the cache holds, behind the sequence's last one.

        Returns
        -------
        Checkpoint or None
            What the sequence's next checkpoint lies behind: the new one, or one that was there already. Without room,
            the parent that was given.
        """
        if parent is not None and not (parent.kept and parent.stored.specs == cache.specs):
            parent = None  # it was evicted, or the guard has raised the types since
        begun = 0 if parent is None else parent.end
        if begun == len(tokens):
            return parent
        siblings = self._roots.setdefault(key, Children()) if parent is None else parent.children
        stored = cache.stored(after=None if parent is None else parent.stored)
        known = siblings.get(tuple(tokens[begun:]))
        if known is not None:
            return self._again(known, stored, parent)
        if stored.nbytes > self.budget_bytes:
            self.n_refused += 1
            return parent
        fresh = Checkpoint(key, parent, tuple(tokens[begun:]), stored)
        siblings.put(fresh)
        self.nbytes += stored.nbytes
        self._order[fresh] = None
        self._shrink()
        self.n_refused += fresh not in self._order
        return fresh if fresh.kept else parent

    def clear(self) -> None:
        """Forget everything."""
        while self._order:
            self._forget(next(iter(self._order)))

    def _again(self, known: Checkpoint, stored: StoredCache, parent: Checkpoint | None) -> Checkpoint | None:
        """Keep one copy of a prefix that another sequence has reached again.

        Not if they divide rows between packed and exact ones differently, or are of other types: what the sequence
        leaves later would not fit behind the other's.
        """
        if known.stored.specs != stored.specs or known.stored.layout != stored.layout:
            return parent
        if known in self._order:
            self._order[known] = self._order.pop(known)
            return known
        self.nbytes += stored.own_bytes
        known.stored = known.stored.with_states_of(stored)
        self._order[known] = None
        self._shrink()
        return known if known.kept else parent

    def _shrink(self) -> None:
        while self.nbytes > self.budget_bytes:
            self._forget(next(iter(self._order)))

    def _forget(self, checkpoint: Checkpoint) -> None:
        """Let states go, and rows that nothing lies behind any more."""
        del self._order[checkpoint]
        self.nbytes -= checkpoint.stored.own_bytes
        checkpoint.stored = checkpoint.stored.packed_only()
        node: Checkpoint | None = checkpoint
        while node is not None and not node.children and node not in self._order:
            (self._roots[node.key] if node.parent is None else node.parent.children).drop(node)
            self.nbytes -= node.stored.nbytes
            node.kept = False
            node = node.parent
