"""Types per KV layer: counted among the layers that have a cache."""

from __future__ import annotations

from typing import Any

import pytest

from hybridkv.cache import AttentionFacts, KVTypes
from hybridkv.errors import UsageError
from hybridkv.policy import Policy, TypeOverride, parse_override, parse_scale

FACTS = [AttentionFacts(layer=n, n_heads=4, n_kv_heads=2, head_dim_k=64, head_dim_v=64) for n in (3, 7, 11, 15)]


def labels(policy: Policy) -> list[str]:
    return [spec.types.label for spec in policy.resolve(FACTS)]


def test_one_type_for_all() -> None:
    assert labels(Policy(KVTypes("q4_0", "q8_0"))) == ["q4_0/q8_0"] * 4


def test_first_and_last_count_kv_layers() -> None:
    policy = Policy(
        KVTypes("q4_0", "q4_0"),
        k_first=TypeOverride("q8_0", 2),
        k_last=TypeOverride("f16", 1),
        v_last=TypeOverride("q6_0", 3),
    )
    assert labels(policy) == ["q8_0/q4_0", "q8_0/q6_0", "q4_0/q6_0", "f16/q6_0"]
    first = Policy(KVTypes("q4_0", "q4_0"), v_first=TypeOverride("q6_0", 1))
    assert labels(first) == ["q4_0/q6_0", "q4_0", "q4_0", "q4_0"]


def test_formats_for_rotated_rows_rotate_their_side() -> None:
    """Each layer and side by its own type; what was asked for stays."""

    def rotations(policy: Policy) -> list[tuple[bool, bool]]:
        return [(spec.types.rotate_k, spec.types.rotate_v) for spec in policy.resolve(FACTS)]

    assert rotations(Policy(KVTypes("hq3_nl", "q4_0"))) == [(True, False)] * 4
    assert rotations(Policy(KVTypes("q4_0", "hq2_nl", rotate_k=True))) == [(True, True)] * 4
    first = Policy(KVTypes("q4_0", "q4_0"), k_first=TypeOverride("hq4_nl", 1))
    assert rotations(first) == [(True, False)] + [(False, False)] * 3


def test_more_layers_than_there_are() -> None:
    with pytest.raises(UsageError, match="q8_0 for the first 5 K layers; this model has 4 KV layers"):
        Policy(k_first=TypeOverride("q8_0", 5)).resolve(FACTS)


@pytest.mark.parametrize("text", ["q8_0", "q8_0,", "q8_0,0", "q8_0,-1", "q8_0,x", ",3", "q8_0,2,3"])
def test_bad_overrides(text: str) -> None:
    with pytest.raises(UsageError):
        parse_override(text, "-ctk-first")


def test_good_override() -> None:
    assert parse_override("q8_KV,3", "-ctk-first") == TypeOverride("q8_KV", 3)


def test_unknown_types_and_rules() -> None:
    with pytest.raises(UsageError, match="q3_0"):
        Policy(KVTypes("q3_0", "f16")).resolve(FACTS)
    with pytest.raises(UsageError, match="allowed: absmax, refit"):
        parse_scale("mean")


def test_options_without_effect_are_said() -> None:
    plain = Policy(KVTypes("f16", "bf16", scale="refit"))
    assert plain.notices(plain.resolve(FACTS)) == ["--kv-scale refit has no effect: bf16, f16 have no scale to fit"]
    useful = Policy(KVTypes("f16", "q4_0", scale="refit"))
    assert useful.notices(useful.resolve(FACTS)) == []
    assert Policy(KVTypes("q4_0", "q4_0")).notices(()) != []


WINDOWED = [AttentionFacts(layer=5, n_heads=4, n_kv_heads=2, head_dim_k=64, head_dim_v=64, window=100), *FACTS[1:2]]
EXACT: dict[str, Any] = {"tail": 128, "sink": 4, "center": True}


def test_exact_rows_apply_where_something_is_quantized() -> None:
    policy = Policy(KVTypes("q4_0", "f16", **EXACT), k_last=TypeOverride("f16", 2))
    assert [s.exact_label for s in policy.resolve(FACTS)] == ["tail 128, sink 4, centred"] * 2 + [""] * 2
    assert [s.exact_label for s in policy.resolve(WINDOWED[:1] + FACTS)[:2]] == [
        "tail 100, centred",
        "tail 128, sink 4, centred",
    ]
    assert Policy(KVTypes("f16", "q4_0", tail=32, center=True)).resolve(FACTS)[0].exact_label == "tail 32"


@pytest.mark.parametrize(
    ("types", "n_ctx", "said"),
    [
        (KVTypes("q4_0", "q4_0", **EXACT), 4096, []),
        (
            KVTypes("f16", "bf16", **EXACT),
            None,
            ["--kv-tail 128 --kv-sink 4 --kv-center has no effect: no layer's K or V is quantized"],
        ),
        (
            KVTypes("f16", "q4_0", tail=32, center=True),
            None,
            ["--kv-center has no effect in layers 3, 7, 11, 15: K is not quantized"],
        ),
        (
            KVTypes("q4_0", "q4_0", tail=128, sink=4),
            132,
            [
                "the types of K and V have no effect: with --kv-tail 128 --kv-sink 4, all 132 tokens of the context "
                "stay f16 and nothing is ever packed"
            ],
        ),
        (KVTypes("q4_0", "q4_0", tail=128, sink=4), 133, []),
    ],
)
def test_exact_rows_without_effect_are_said(types: KVTypes, n_ctx: int | None, said: list[str]) -> None:
    policy = Policy(types)
    assert policy.notices(policy.resolve(FACTS), n_ctx) == said


def test_what_a_window_takes_from_exact_rows_is_said() -> None:
    policy = Policy(KVTypes("q4_0", "q4_0", tail=128, sink=4))
    assert policy.notices(policy.resolve(WINDOWED)) == [
        "--kv-sink 4: none in layer 5, whose window moves on from the first tokens",
        "--kv-tail 128: no more than the window in layer 5",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tail": -1}, "--kv-tail -1; allowed: 0 to"),
        ({"sink": -4}, "--kv-sink -4; allowed: 0 to"),
        ({"tail": 2**41}, "--kv-tail 2199023255552; allowed: 0 to 1099511627776 tokens"),
        ({"sink": "four"}, "--kv-sink 'four'"),
        ({"tail": True}, "--kv-tail True"),
        ({"center": True}, "--kv-center with --kv-tail 0; allowed: a tail of at least 32 tokens"),
        ({"center": True, "tail": 31}, "--kv-center with --kv-tail 31"),
    ],
)
def test_exact_rows_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Policy(KVTypes("q4_0", "q4_0", **changes)).resolve(FACTS)
