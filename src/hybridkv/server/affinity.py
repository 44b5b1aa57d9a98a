"""The choice of a replica for a request: one that holds what its prompt begins with, unless it has more than its share.

A prompt is known by digests of its leading parts: after each message of a conversation, and at lengths that grow by an
eighth, so that a million characters have about a hundred. The longest one that a replica was sent before leads there.
Nothing is kept but digests; a wrong guess costs the processing of a prompt and never an answer, because a replica
compares the tokens themselves (`hybridkv.engine.prefixes`).

Knows no Ray and no HTTP: `hybridkv.server.cluster` asks it.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

MAX_KNOWN = 1 << 16
"""Digests that are remembered; those unused for longest are forgotten first."""

_STEP = 32
_DIGEST_BYTES = 16


def prefix_keys(path: str, body: bytes) -> tuple[bytes, ...]:
    """Digest the beginnings of a request's prompt, the shortest first; none where the body does not tell.

    What is wrong with a body is for the replica to say.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(asked, dict) or asked.get("cache_prompt") is False:
        return ()
    # Sequences that are stored otherwise share nothing.
    kind = json.dumps([path, asked.get("kv_types")], sort_keys=True).encode()
    if path.endswith("/chat/completions"):
        return tuple(_digests(kind, _conversation(asked.get("messages")), ends=True))
    return tuple(_digests(kind, _text(asked.get("prompt")), ends=False))


def _conversation(messages: Any) -> list[bytes]:
    """Encode each message as bytes; all of them or none."""
    parts = []
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            return []
        parts.append(json.dumps([message.get("role"), message.get("content")]).encode())
    return parts


def _text(prompt: Any) -> list[bytes]:
    """Encode a text, or token ids, as one part whose end says nothing: another prompt may resume from within it."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return [prompt.encode(errors="surrogatepass")]
    if isinstance(prompt, list) and prompt and all(type(i) is int and 0 <= i < 2**31 for i in prompt):
        return [struct.pack(f"<{len(prompt)}I", *prompt)]
    return []


def _digests(kind: bytes, parts: Sequence[bytes], *, ends: bool) -> Iterator[bytes]:
    """Digest all up to each mark, and up to each part's end if that says something."""
    state = hashlib.blake2b(kind, digest_size=_DIGEST_BYTES)
    place, mark = 0, _STEP
    for part in parts:
        done = 0
        while place + len(part) - done >= mark:
            take = mark - place
            state.update(part[done : done + take])
            yield state.digest()
            done, place = done + take, mark
            mark += max(_STEP, mark // 8 // _STEP * _STEP)
        state.update(part[done:])
        place += len(part) - done
        if ends:
            yield state.digest()


class Affinity:
    """The record of what was sent where, and how much of it is still being answered. For any thread.

    Parameters
    ----------
    slack
        How many more requests than the least loaded replica one may be answering and still be preferred.
    max_known
        Digests that are remembered.
    """

    def __init__(self, slack: int, max_known: int = MAX_KNOWN) -> None:
        self._slack, self._max_known = slack, max_known
        self._holders: OrderedDict[bytes, set[str]] = OrderedDict()
        self._load: Counter[str] = Counter()
        self._lock = threading.Lock()

    def rank(self, keys: Sequence[bytes], replicas: Iterable[str]) -> list[list[str]]:
        """Rank replicas in groups, the group to try first in front; within a group, the less loaded is to be taken.

        Those that hold the longest known beginning, unless each of them is too busy; else two at random. Then the rest.
        """
        there = set(replicas)
        with self._lock:
            load = {name: self._load[name] for name in there}
            best = self._preferred(keys, load)
        best = best or set(random.sample(sorted(there), min(2, len(there))))
        groups = [sorted(group, key=lambda name: (load[name], random.random())) for group in (best, there - best)]
        return [group for group in groups if group]

    def sent(self, replica: str) -> None:
        """Note that a request goes to a replica."""
        with self._lock:
            self._load[replica] += 1

    def learn(self, keys: Sequence[bytes], replica: str) -> None:
        """Note that a replica has taken a request: from now on it holds its prompt."""
        with self._lock:
            for key in keys:
                self._holders.setdefault(key, set()).add(replica)
                self._holders.move_to_end(key)
            while len(self._holders) > self._max_known:
                self._holders.popitem(last=False)

    def answered(self, replica: str) -> None:
        """Note that a replica has answered, whatever the answer is."""
        with self._lock:
            self._load[replica] = max(0, self._load[replica] - 1)

    def keep(self, replicas: Iterable[str]) -> None:
        """Forget all replicas but these: a new one in an old one's place has another name."""
        there = set(replicas)
        with self._lock:
            for name in set(self._load) - there:
                del self._load[name]
            for key, holders in list(self._holders.items()):
                holders &= there
                if not holders:
                    del self._holders[key]

    def _preferred(self, keys: Sequence[bytes], load: Mapping[str, int]) -> set[str]:
        least = min(load.values(), default=0)
        for key in reversed(keys):
            if holders := self._holders.get(key, set()) & load.keys():
                return {name for name in holders if load[name] - least < self._slack}
        return set()
