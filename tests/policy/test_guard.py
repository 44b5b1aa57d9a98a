"""The guard's arithmetic: ladder, verdicts, rules. No tensors."""

from __future__ import annotations

import pytest

from hybridkv.cache import AttentionFacts, KVSpec, KVTypes
from hybridkv.errors import UsageError
from hybridkv.formats import FORMATS, get_format
from hybridkv.policy import (
    ERROR_LIMIT,
    GUARD_MODES,
    KERNEL_LIMIT,
    STORE_LIMIT,
    Evidence,
    Fallback,
    Guard,
    Ok,
    Stop,
    next_types,
    parse_mode,
)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (("q4_0", "q4_0"), ("q6_0", "q6_0")),
        (("iq4_nl", "q8_0"), ("q6_0", "q8_0")),
        (("q6_0", "q5_1"), ("q6_0", "q6_0")),
        (("q6_0", "q6_0"), ("q8_0", "q8_0")),
        (("q6_0", "f16"), ("q8_0", "f16")),
        (("q8_0", "q8_0"), ("f16", "f16")),
        (("q8_KV", "q8_1"), ("q8_0", "q8_1")),
        (("q8_1", "f16"), ("f16", "f16")),
        (("f16", "f16"), None),
        (("bf16", "f32"), None),
    ],
)
def test_ladder(types: tuple[str, str], expected: tuple[str, str] | None) -> None:
    raised = next_types(KVTypes(*types, rotate_k=True))
    assert (None if raised is None else (raised.type_k, raised.type_v)) == expected
    assert raised is None or raised.rotate_k


@pytest.mark.parametrize("name", FORMATS)
def test_every_ladder_ends_above_where_it_began(name: str) -> None:
    types: KVTypes | None = KVTypes(name, name)
    for _ in range(5):
        assert types is not None
        higher = next_types(types)
        if higher is None:
            break
        assert get_format(higher.type_k).bits_per_value(256) > get_format(types.type_k).bits_per_value(256)
        types = higher
    assert next_types(types) is None  # type: ignore[arg-type]


def evidence(error: float, types: KVTypes | None = None) -> Evidence:
    return Evidence(layer=7, types=types or KVTypes("q4_0", "q4_0"), error=error)


@pytest.mark.parametrize(
    ("types", "limit"),
    [
        (("f16", "f16"), ERROR_LIMIT),
        (("q8_0", "q8_0"), ERROR_LIMIT),
        (("q4_0", "q4_0"), ERROR_LIMIT),
        (("hq3_nl", "f16"), 2 * 1.35 / 8),
        (("hq3_nl", "hq3_nl"), 2 * 1.35 / 8 * 2**0.5),
        (("hq2_nl", "hq2_nl"), 2 * 1.35 / 4 * 2**0.5),
    ],
)
def test_the_limit_follows_from_the_bits(types: tuple[str, str], limit: float) -> None:
    assert Guard().limit_for(KVTypes(*types)) == pytest.approx(limit)
    assert Guard(limit=0.1).limit_for(KVTypes(*types)) == 0.1


def test_rows_and_attention_that_are_not_the_types_own_are_named_at_any_error() -> None:
    q8 = KVTypes("q8_0", "q8_0")
    assert Guard().judge(Evidence(3, q8, 0.01, store_error=STORE_LIMIT, kernel_error=KERNEL_LIMIT)) == Ok()
    stored = Guard().judge(Evidence(3, q8, 0.01, store_error=2 * STORE_LIMIT))
    assert stored == Fallback(
        KVTypes("f16", "f16"), "layer 3: q8_0, stored rows err 0.01 more than these types do, limit 0.005"
    )
    kernel = Guard(mode="strict").judge(Evidence(3, q8, 0.01, kernel_error=2 * KERNEL_LIMIT))
    assert kernel == Stop("layer 3: q8_0, attention over the stored rows is off by 0.02, limit 0.01")
    assert Guard().judge(Evidence(3, q8, 0.01, store_error=float("nan"))) != Ok()


def test_within_the_limit_is_ok() -> None:
    assert Guard().judge(evidence(ERROR_LIMIT)) == Ok()
    assert Guard(limit=0.01).judge(evidence(0.02)) != Ok()


@pytest.mark.parametrize("error", [ERROR_LIMIT * 1.01, float("inf"), float("nan")])
def test_beyond_the_limit_falls_back_with_a_reason(error: float) -> None:
    verdict = Guard().judge(evidence(error))
    assert isinstance(verdict, Fallback)
    assert verdict.types == KVTypes("q6_0", "q6_0")
    assert verdict.reason.startswith("layer 7: q4_0, ")
    assert f"limit {ERROR_LIMIT:g}" in verdict.reason


def test_strict_and_the_end_of_the_ladder_stop() -> None:
    assert isinstance(Guard(mode="strict").judge(evidence(9.0)), Stop)
    assert isinstance(Guard().judge(evidence(float("nan"), KVTypes("f16", "f16"))), Stop)


def specs(*labels: str) -> tuple[KVSpec, ...]:
    return tuple(
        KVSpec(AttentionFacts(layer=4 * i + 3, n_heads=16, n_kv_heads=2, head_dim_k=256, head_dim_v=256), KVTypes(t, t))
        for i, t in enumerate(labels)
    )


class TestRules:
    def test_upgrade_names_layers_and_bytes(self) -> None:
        asked = specs("q4_0", "q8_0", "q4_0")
        used, warnings = Guard(mode="upgrade").before(asked, hybrid=True, n_ctx=131072)
        assert [s.types.label for s in used] == ["q8_0", "q8_0", "q8_0"]
        assert warnings == [
            "KV layers 3, 11 upgraded from q4_0 to q8_0 on this hybrid model: +128.0 MiB at 131072 tokens"
        ]

    def test_warn_keeps_types(self) -> None:
        asked = specs("q4_0", "f16")
        used, warnings = Guard(mode="warn").before(asked, hybrid=True, n_ctx=1024)
        assert used == asked
        assert len(warnings) == 1
        assert "KV layers 3 stay at q4_0" in warnings[0]

    @pytest.mark.parametrize("mode", GUARD_MODES)
    def test_nothing_to_say(self, mode: str) -> None:
        low, high = specs("q4_0"), specs("q8_0", "f16")
        assert Guard(mode=parse_mode(mode)).before(low, hybrid=False, n_ctx=8) == (low, [])
        assert Guard(mode=parse_mode(mode)).before(high, hybrid=True, n_ctx=8) == (high, [])

    @pytest.mark.parametrize("mode", ["check", "strict", "off"])
    def test_evidence_modes_apply_no_rule(self, mode: str) -> None:
        assert Guard(mode=parse_mode(mode)).before(specs("q4_0"), hybrid=True, n_ctx=8) == (specs("q4_0"), [])


def test_unknown_mode_lists_the_known() -> None:
    with pytest.raises(UsageError, match="allowed: check, upgrade, warn, strict, off"):
        parse_mode("maybe")
