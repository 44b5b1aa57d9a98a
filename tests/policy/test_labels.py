from __future__ import annotations

import pytest

from hybridkv.cache import KVTypes
from hybridkv.errors import UsageError
from hybridkv.policy.labels import expand_types, label, parse


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ("q8_0", KVTypes("q8_0", "q8_0")),
        ("q8_0/q4_0", KVTypes("q8_0", "q4_0")),
        ("q4_0+kv", KVTypes("q4_0", "q4_0", rotate_k=True, rotate_v=True)),
        ("q4_0/q4_1+v+absmax", KVTypes("q4_0", "q4_1", rotate_v=True, scale="absmax")),
        (
            "iq4_nl+k+tail128+sink4+center",
            KVTypes("iq4_nl", "iq4_nl", rotate_k=True, tail=128, sink=4, center=True),
        ),
    ],
)
def test_a_label_is_read_back(text: str, types: KVTypes) -> None:
    assert parse(text) == types
    assert label(types) == text
    assert parse(label(types)) == types


@pytest.mark.parametrize("text", ["q4_0+", "q4_0+x", "q4_0+tail", "q4_0+tail-1", "q4_0+tail99999999", "q4_0+kv+vk"])
def test_unknown_options(text: str) -> None:
    with pytest.raises(UsageError, match="unknown option"):
        parse(text)


@pytest.mark.parametrize("text", ["", "q4", "q4_0/", "/q4_0", "q4_0/q4_0/q4_0"])
def test_unknown_types(text: str) -> None:
    with pytest.raises(UsageError, match="unknown KV cache type"):
        parse(text)


def test_options_multiply() -> None:
    found = expand_types(["q4_0", "q8_0/q4_0"], rotations=("none", "kv"), common={"tail": (0, 128)})
    assert [label(types) for types in found] == [
        "q4_0",
        "q4_0+tail128",
        "q4_0+kv",
        "q4_0+kv+tail128",
        "q8_0/q4_0",
        "q8_0/q4_0+tail128",
        "q8_0/q4_0+kv",
        "q8_0/q4_0+kv+tail128",
    ]


def test_what_changes_nothing_appears_once() -> None:
    scales = {"scale": ("absmax", "refit")}
    found = expand_types(["f16", "q4_1", "q4_0"], common=scales, rotations=("none", "k"))
    labels = [label(types) for types in found]
    assert labels.count("f16") == 1
    assert [name for name in labels if name.startswith("f16")] == ["f16"]
    assert len(set(labels)) == len(labels)
    assert "q4_0+k+refit" in labels


def test_unknown_rotation() -> None:
    with pytest.raises(UsageError, match="--rotate 'both'; allowed: none, k, v, kv"):
        expand_types(["q4_0"], rotations=("both",))
