"""Where requests go: after what their prompts begin with, and after load, without any Ray."""

from __future__ import annotations

import json
from typing import Any

from hybridkv.server.affinity import Affinity, prefix_keys

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
REPLICAS = ("a", "b", "c")


def keys(path: str = TEXT, **body: Any) -> tuple[bytes, ...]:
    return prefix_keys(path, json.dumps(body).encode())


def said(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def shared(one: tuple[bytes, ...], other: tuple[bytes, ...]) -> int:
    return len(set(one) & set(other))


def send(affinity: Affinity, keys: tuple[bytes, ...], replica: str) -> None:
    affinity.sent(replica)
    affinity.learn(keys, replica)


def test_a_prompt_that_goes_on_has_the_keys_of_its_beginning() -> None:
    first = "What a text begins with, " * 40
    before, after = keys(prompt=first), keys(prompt=first + "and how it goes on.")
    assert before
    assert after[: len(before)] == before
    ids = list(range(500))
    assert keys(prompt=[*ids, 7])[: len(keys(prompt=ids))] == keys(prompt=ids)


def test_a_conversation_is_known_by_its_messages() -> None:
    first, second = keys(CHAT, messages=said("Hi")), keys(CHAT, messages=said("Hi", "Hello.", "How?"))
    assert len(first) == 1
    assert second[0] == first[0]
    assert not shared(first, keys(CHAT, messages=said("Ho")))
    assert not shared(first, keys(CHAT, messages=[{"role": "system", "content": "Hi"}]))


def test_keys_are_few() -> None:
    assert 50 < len(keys(prompt="x" * 2**20)) < 120
    assert len(keys(prompt="x" * 31)) == 0


def test_other_types_other_paths_and_no_reuse_share_nothing() -> None:
    text = "The same text for all of them. " * 10
    plain = keys(prompt=text)
    assert not shared(plain, keys(prompt=text, kv_types={"type_k": "q4_0", "type_v": "q4_0"}))
    assert not shared(plain, keys(CHAT, messages=said(text)))
    assert keys(prompt=text, cache_prompt=False) == ()


def test_nonsense_has_no_keys() -> None:
    bodies = (b"", b"{", b"[]", b'{"prompt": 5}', b'{"prompt": [1, "x"]}', b'{"prompt": [-1]}', b"\xff", b"[" * 10**5)
    for body in bodies:
        assert prefix_keys(TEXT, body) == ()
    for messages in (None, 5, [5], "text"):
        assert keys(CHAT, messages=messages) == ()
    assert prefix_keys(TEXT, b'{"prompt": "' + b"\\ud800" * 99 + b'"}')  # half a pair: not ours to refuse


def test_a_known_beginning_leads_back() -> None:
    affinity = Affinity(slack=4)
    text = "A conversation that was begun somewhere. " * 20
    (chosen, *_), *_ = affinity.rank(keys(prompt=text), REPLICAS)
    send(affinity, keys(prompt=text), chosen)
    for _ in range(20):
        groups = affinity.rank(keys(prompt=text + "More."), REPLICAS)
        assert groups[0] == [chosen]
        assert sorted(name for group in groups for name in group) == sorted(REPLICAS)


def test_the_longest_beginning_counts() -> None:
    affinity = Affinity(slack=4)
    common = "What every conversation here begins with. " * 20
    send(affinity, keys(prompt=common), "a")
    send(affinity, keys(prompt=common + "One that went elsewhere. " * 20), "b")
    assert affinity.rank(keys(prompt=common + "One that went elsewhere. " * 25), REPLICAS)[0] == ["b"]
    assert set(affinity.rank(keys(prompt=common + "Another."), REPLICAS)[0]) == {"a", "b"}


def test_a_busy_holder_is_passed_over_until_it_is_not() -> None:
    affinity = Affinity(slack=2)
    known = keys(prompt="x" * 100)
    for _ in range(2):
        send(affinity, known, "a")
    first = affinity.rank(known, REPLICAS)[0]
    assert "a" not in first[:1]
    affinity.answered("a")
    assert affinity.rank(known, REPLICAS)[0] == ["a"]


def test_without_a_beginning_the_less_loaded_of_two_comes_first() -> None:
    affinity = Affinity(slack=4)
    for name, n in (("a", 3), ("b", 2), ("c", 1)):
        for _ in range(n):
            send(affinity, (), name)
    pairs = {tuple(affinity.rank((), REPLICAS)[0]) for _ in range(200)}
    assert pairs == {("b", "a"), ("c", "a"), ("c", "b")}
    assert affinity.rank((), ("a",)) == [["a"]]
    assert affinity.rank((), ()) == []


def test_a_replica_that_is_gone_is_forgotten() -> None:
    affinity = Affinity(slack=9)
    known = keys(prompt="x" * 100)
    for _ in range(3):
        send(affinity, known, "a")
    assert len(affinity.rank(known, ("b", "c"))[0]) == 2
    affinity.keep(("b", "c", "d"))
    affinity.answered("a")  # its last requests end after it
    for _ in range(20):
        assert len(affinity.rank(known, ("b", "c", "d"))[0]) == 2


def test_what_is_remembered_has_a_bound() -> None:
    affinity = Affinity(slack=4, max_known=10)
    old, new = keys(prompt="o" * 320), keys(prompt="n" * 320)
    send(affinity, old, "a")
    send(affinity, new, "b")
    assert affinity.rank(new, REPLICAS)[0] == ["b"]
    assert {len(affinity.rank(old, REPLICAS)[0]) for _ in range(5)} == {2}
