"""What lies on a card: options of llama.cpp, and what fits, at the sizes of a 35B-A3B."""

from __future__ import annotations

import pytest

from hybridkv.errors import UsageError
from hybridkv.placement import (
    BESIDE_BYTES,
    SPLIT_BYTES,
    Needs,
    Placement,
    Portion,
    expert_overrides,
    fit,
    group_of,
    least,
    parse_gpu_layers,
    parse_overrides,
    place,
    whole_experts,
)

GIB, MIB = 2**30, 2**20
LAYERS = 40
Q4_K, Q6_K = 144 / 256, 210 / 256


def portion(name: str, n: int, bits: float, layer: int | None, *, has_kv: bool = False) -> Portion:
    return Portion(name, layer, group_of(name, has_kv), int(n * bits), int(n * bits))


def qwen35_35b(n_ctx: int, kv_bits: float = 34 / 32) -> Needs:
    """Qwen3.5-35B-A3B in llama.cpp's mix: 256 experts of 512 in 40 layers, 10 with attention."""
    found = [
        portion("token_embd.weight", 248320 * 2048, Q4_K, None),
        portion("output.weight", 248320 * 2048, Q6_K, None),
    ]
    kv = [i % 4 == 3 for i in range(LAYERS)]
    for i in range(LAYERS):
        at = f"blk.{i}."
        for part, bits in (("gate", Q4_K), ("up", Q4_K), ("down", Q6_K)):
            found.append(portion(f"{at}ffn_{part}_exps.weight", 256 * 512 * 2048, bits, i))
            found.append(portion(f"{at}ffn_{part}_shexp.weight", 512 * 2048, bits, i))
        found.append(portion(f"{at}ffn_gate_inp.weight", 256 * 2048, 4, i))
        if kv[i]:
            found += [portion(f"{at}attn_q.weight", 8192 * 2048, Q4_K, i, has_kv=True)]
            found += [portion(f"{at}attn_output.weight", 4096 * 2048, Q4_K, i, has_kv=True)]
        else:
            found += [portion(f"{at}attn_qkv.weight", 8192 * 2048, Q4_K, i)]
            found += [portion(f"{at}ssm_out.weight", 4096 * 2048, Q4_K, i)]
    rows = int(2 * 2 * 256 * kv_bits * n_ctx)
    states = 4 * (32 * 128 * 128 + 8192 * 4)
    return Needs(found, [rows * one for one in kv], [states * (not one) for one in kv])


def bytes_of(placement: Placement, group: str) -> tuple[int, int]:
    line = next(line for line in placement.lines() if line.name == group)
    return line.card_bytes, line.host_bytes


def test_all_of_it_where_it_fits() -> None:
    """To the byte: with one byte less something moves."""
    needs = qwen35_35b(32768)
    total = sum(p.card_bytes for p in needs.portions) + sum(needs.kv_bytes) + sum(needs.state_bytes) + BESIDE_BYTES
    assert 19 * GIB < total < 22 * GIB
    whole = fit(needs, total)
    assert whole is not None
    assert whole.whole
    assert (whole.card_bytes, whole.host_bytes, whole.n_cpu_moe) == (total, 0, 0)
    less = fit(needs, total - 1)
    assert less is not None
    assert not less.whole
    assert less.card_bytes < total


@pytest.mark.parametrize("n_ctx", [4096, 32768, 131072])
def test_a_card_of_8_gib(n_ctx: int) -> None:
    """All but the embedding and routed experts is there; experts of the last layers, as many as fit and no fewer."""
    needs = qwen35_35b(n_ctx)
    found = fit(needs, 8 * GIB)
    assert found is not None
    assert found.card_bytes <= 8 * GIB
    for group in ("attention", "recurrent", "shared experts", "head", "KV", "states"):
        card, host = bytes_of(found, group)
        assert card > 0
        assert host == 0
    assert bytes_of(found, "embedding")[0] == 0
    assert 0 < found.n_cpu_moe < LAYERS
    one_more = place(needs, None, (*parse_overrides("token_embd=CPU"), *expert_overrides(found.n_cpu_moe - 1)))
    assert one_more.card_bytes > 8 * GIB
    kept = {p.layer for p, on in zip(needs.portions, found.on_card, strict=True) if p.group == "routed experts" and on}
    assert kept == set(range(found.n_cpu_moe, LAYERS))
    assert found.card_bytes + found.host_bytes == place(needs).card_bytes + SPLIT_BYTES


def test_longer_contexts_and_smaller_cards_keep_fewer_experts() -> None:
    kept = [[fit(qwen35_35b(n), free * GIB) for n in (4096, 131072, 262144)] for free in (4, 6, 8, 12, 24)]
    counts = [[None if one is None else one.n_cpu_moe for one in row] for row in kept]
    assert counts[-1] == [0, 0, 0]
    assert all(a is None or b is None or a <= b for row in counts for a, b in zip(row, row[1:], strict=False))
    assert all(a is not None and b is not None and a >= b for a, b in zip(counts[1], counts[2], strict=True))
    assert counts[0][2] is None  # KV rows alone take 2.7 GiB


def test_what_does_not_fit_without_its_experts_is_none() -> None:
    needs = qwen35_35b(4096)
    least = place(needs, None, (*parse_overrides("token_embd=CPU"), *expert_overrides(LAYERS))).card_bytes
    found = fit(needs, least)
    assert found is not None
    assert found.n_cpu_moe == LAYERS
    assert fit(needs, least - 1) is None
    assert fit(needs, 0) is None


def test_a_model_without_experts_fits_whole_or_not() -> None:
    needs = Needs([portion("blk.0.ffn_up.weight", MIB, 1, 0), portion("token_embd.weight", MIB, 1, None)], [0], [0])
    tied = Needs(needs.portions, [0], [0], tied=True)
    total = 2 * MIB + BESIDE_BYTES
    assert fit(needs, total) is not None
    assert fit(needs, total - 1) is not None  # the embedding gives way
    assert fit(tied, total - 1) is None  # that of every token does not
    assert fit(needs, total - MIB - 1) is None


@pytest.mark.parametrize(
    ("n", "layers", "head", "embedding"),
    [(0, 0, False, False), (1, 0, True, False), (2, 1, True, False), (40, 39, True, False), (41, 40, True, True)],
)
def test_whole_layers(n: int, layers: int, head: bool, embedding: bool) -> None:
    """As llama.cpp: the last ones, the head first of all, with their KV rows and states."""
    needs = qwen35_35b(4096)
    found = place(needs, n)
    assert found.layers == tuple(i >= LAYERS - layers for i in range(LAYERS))
    where = dict(zip((p.name for p in needs.portions), found.on_card, strict=True))
    assert (where["output.weight"], where["token_embd.weight"]) == (head, embedding)
    assert all(where[f"blk.{i}.ffn_up_exps.weight"] is (i >= LAYERS - layers) for i in range(LAYERS))
    on_card = sum(needs.kv_bytes[LAYERS - layers :])
    line = next(line for line in found.lines() if line.name == "KV")
    assert (line.card_bytes, line.host_bytes) == (on_card, sum(needs.kv_bytes) - on_card)
    if n == 0:
        assert found.card_bytes == 0


def test_the_first_pattern_decides() -> None:
    needs = qwen35_35b(4096)
    overrides = parse_overrides(r"blk\.3\..*_exps=CUDA0,_exps=cpu")
    found = place(needs, 1, overrides)
    where = dict(zip((p.name for p in needs.portions), found.on_card, strict=True))
    assert where["blk.3.ffn_up_exps.weight"]
    assert not where["blk.33.ffn_up_exps.weight"]
    assert not where["blk.3.attn_q.weight"]
    line = next(line for line in found.lines() if line.name == "routed experts")
    assert (line.card_layers, line.host_layers) == (1, 39)


def test_experts_by_layers() -> None:
    needs = qwen35_35b(4096)
    assert place(needs, None, expert_overrides(0)).whole
    found = place(needs, None, expert_overrides(11))
    assert found.n_cpu_moe == 11
    assert {p.layer for p, on in zip(needs.portions, found.on_card, strict=True) if not on} == set(range(11))
    assert bytes_of(found, "shared experts")[1] == 0


def test_experts_of_a_layer_lie_in_one_place() -> None:
    """A pattern that finds a part of them moves all: they are computed where they lie."""
    found = place(qwen35_35b(4096), None, parse_overrides(r"blk\.7\.ffn_up_exps=CPU"))
    assert {p.name for p, on in zip(found.needs.portions, found.on_card, strict=True) if not on} == {
        "blk.7.ffn_up_exps.weight"
    }
    whole = whole_experts(found)
    parts = ("down", "gate", "up")
    assert sorted(p.name for p, on in zip(whole.needs.portions, whole.on_card, strict=True) if not on) == [
        f"blk.7.ffn_{part}_exps.weight" for part in parts
    ]
    assert whole_experts(place(qwen35_35b(4096))).whole


def test_the_least() -> None:
    """What `fit` falls back on: no routed expert, and an embedding only if it is the head."""
    needs = qwen35_35b(4096)
    small = least(needs)
    assert small.n_cpu_moe == LAYERS
    assert bytes_of(small, "embedding")[0] == 0
    tied = least(Needs(needs.portions, needs.kv_bytes, needs.state_bytes, tied=True))
    assert bytes_of(tied, "embedding")[1] == 0
    found = fit(needs, small.card_bytes)
    assert found is not None
    assert found.on_card == small.on_card


@pytest.mark.parametrize("text", ["exps", "=CPU", "exps=", "exps=CUDA1", "exps=CPU,", "exps=GPU", ""])
def test_an_override_without_a_place(text: str) -> None:
    with pytest.raises(UsageError, match="allowed: REGEX=CPU or REGEX=CUDA0") as caught:
        parse_overrides(text)
    assert caught.value.hint == "for example -ot 'ffn_.*_exps=CPU'"


def test_an_override_that_is_no_pattern() -> None:
    with pytest.raises(UsageError, match="allowed: a regular expression"):
        parse_overrides("blk.(3=CPU")


def test_numbers_of_layers() -> None:
    assert [parse_gpu_layers(text, 40) for text in ("0", "7", "41", "99", "all", "auto", "-1")] == [
        0, 7, 41, 41, 41, 41, 41,
    ]  # fmt: skip
    for text in ("-2", "1.5", "many", ""):
        with pytest.raises(UsageError, match="allowed: 0 or more layers, all, auto"):
            parse_gpu_layers(text, 40)
