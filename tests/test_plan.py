"""The planner counts what a real cache allocates, for every family, and inverts its own count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv.cache import AttentionFacts, KVSpec, KVTypes
from hybridkv.cache.spec import WINDOW_SLACK
from hybridkv.engine import Engine, SamplingParams
from hybridkv.errors import UsageError
from hybridkv.formats import FORMATS
from hybridkv.hf import IMPLEMENTATION
from hybridkv.model import kv_facts, layer_facts
from hybridkv.native import NativeStep
from hybridkv.planner import largest_context, parse_bytes, plan, unknown_states
from hybridkv.policy import Guard, Policy
from tests.families import FAMILIES, build
from tests.thin import every_other

SEQUENCES = [
    (KVTypes("q8_0", "q4_0", tail=64, sink=4, center=True), 3 * WINDOW_SLACK, 1),
    (KVTypes("f16", "q8_KV"), 300, 2),
    (KVTypes("f32", "iq4_nl", sink=3), 2 * WINDOW_SLACK, 3),
    (KVTypes("q4_0", "f16", tail=2 * WINDOW_SLACK), 7, 1),
]
"""Types, context and number of sequences."""


@pytest.mark.parametrize(("family", "dtype"), every_other(FAMILIES, (torch.float32, torch.bfloat16)))
def test_planned_bytes_are_the_bytes_of_a_real_cache(family: str, dtype: torch.dtype) -> None:
    """Two of the ways to store it for each family, in turn."""
    model = build(family, dtype=dtype, attention=IMPLEMENTATION)
    facts = layer_facts(model.config)
    assert not unknown_states(facts)
    first = list(FAMILIES).index(family) // 2 % 2
    for types, n_ctx, n_seqs in SEQUENCES[first::2]:
        specs = Policy(types).resolve(kv_facts(facts))
        engine = Engine(model, specs, n_ctx=n_ctx, guard=Guard("off"), notify=print)
        itemsize = 4 if isinstance(engine.step, NativeStep) else dtype.itemsize
        counted = plan(specs, facts, n_ctx=n_ctx, n_seqs=n_seqs, conv_itemsize=itemsize)
        for _ in engine.generate([3, 4, 5], SamplingParams(temp=0), n_predict=2, n_seqs=n_seqs):
            pass
        assert counted.kv_bytes == engine.cache.kv_bytes, types
        assert counted.state_bytes == engine.cache.state_bytes
        assert counted.total_bytes == counted.kv_bytes + counted.state_bytes


specs_of_a_model = st.lists(
    st.builds(
        lambda heads, dim, window, k, v, tail, sink, center: KVSpec(
            AttentionFacts(0, heads, heads, dim, dim, window=window),
            KVTypes(type_k=k, type_v=v, tail=tail, sink=sink, center=center),
        ),
        heads=st.integers(1, 16),
        dim=st.sampled_from([64, 80, 96, 112, 128, 256, 512]),
        window=st.none() | st.integers(1, 4096),
        k=st.sampled_from(list(FORMATS)),
        v=st.sampled_from(list(FORMATS)),
        tail=st.sampled_from([0, 32, 5000]),
        sink=st.sampled_from([0, 4]),
        center=st.booleans(),
    ),
    max_size=6,
)


@given(specs=specs_of_a_model, free=st.integers(-10, 2**40), n_seqs=st.integers(1, 9))
def test_the_largest_context_fits_and_one_token_more_does_not(specs: list[KVSpec], free: int, n_seqs: int) -> None:
    def needed(n_ctx: int) -> int:
        return sum(spec.bytes_at(n_ctx, n_seqs) for spec in specs)

    most = largest_context(specs, free, n_seqs=n_seqs)
    if most is None:
        assert needed(2**40) <= free
    else:
        assert most == 0 or needed(most) <= free
        assert needed(most + 1) > free or free < 0


def test_a_tail_costs_its_rows_and_saves_none() -> None:
    facts = AttentionFacts(0, 1, 1, 64, 64)
    plain, exact = (KVSpec(facts, KVTypes("q8_0", "q8_0", tail=n, sink=n and 4, center=n > 0)) for n in (0, 128))
    rows = 128 + 4 + 32 + 32
    assert exact.bytes_at(10_000) == (10_000 - 132) * plain.bytes_per_token + rows * 256 + 4 * 64
    assert exact.bytes_at(100) == 100 * 256


def test_windows_alone_stop_growing() -> None:
    windowed = [KVSpec(AttentionFacts(0, 1, 1, 64, 64, window=100), KVTypes("f16", "f16"))]
    full = (99 + WINDOW_SLACK) * 256
    assert largest_context(windowed, full) is None
    assert largest_context(windowed, full - 1) == 98 + WINDOW_SLACK
    assert largest_context(windowed, 255) == 0
    assert largest_context([], 0) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("8GB", 8 * 10**9),
        ("1048576", 2**20),
        ("0.001KB", 1),
        ("12345678901234567", 12345678901234567),  # more digits than a float holds
        ("0.1KB", 100),
        (" 2TiB ", 2**41),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "0", "0.0GiB", "1e9", "24 GiBs", "24G B", "nan", "1,5GiB", "٣GiB"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="allowed: a positive number and one of KB MB GB KiB MiB GiB TiB") as caught:
        parse_bytes(text, "--memory")
    assert caught.value.hint == "for example --memory 24GiB"


@pytest.mark.parametrize("text", ["3", "24", "8192", "1048575", "0.5"])
def test_a_number_that_lacks_its_unit(text: str) -> None:
    with pytest.raises(
        UsageError, match=f"--total-memory {text}: that is bytes; allowed: a number and one of"
    ) as caught:
        parse_bytes(text, "--total-memory")
    assert caught.value.hint == f"did you mean --total-memory {text}GiB?"
