"""Every fault is caught by the guard, by the name of its layer; sound runs of all families raise nothing.

The whole matrix, with the numbers, is bench/guard_faults.py's.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hybridkv.cache import KVLayer, KVTypes
from hybridkv.errors import GuardError
from hybridkv.hf import ModelCache
from hybridkv.kernels import ENCODERS, KERNELS, KVView
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import Guard, GuardMode, MismatchError, Policy
from hybridkv.rotation import rotate
from hybridkv.runtime.probes import butterfly
from tests.families import FAMILIES, build, remembering
from tests.hf.faults import DECODE, FAULTS, PROMPT, Fault, stages

N_PROMPT = 30
TYPES = {
    "q8_0": KVTypes("q8_0", "q8_0"),
    "q6_0": KVTypes("q6_0", "q6_0"),
    "q4_0+kv": KVTypes("q4_0", "q4_0", rotate_k=True, rotate_v=True),
    "iq4_nl": KVTypes("iq4_nl", "iq4_nl"),
    "q8_0/q4_0+v": KVTypes("q8_0", "q4_0", rotate_v=True),
    "hq3_nl": KVTypes("hq3_nl", "hq3_nl"),
    "hq2_nl, sink": KVTypes("hq2_nl", "hq2_nl", sink=2),
}
SOUND = Fault("none", "none")


@torch.inference_mode()
def run(
    family: str,
    label: str,
    fault: Fault,
    mode: GuardMode,
    said: list[str],
    n_decode: int = 4,
    n_pad: int = 3,
    n_prompt: int = N_PROMPT,
    **changes: Any,
) -> ModelCache:
    """A prompt of two sequences, one padded on the left, and tokens past the edge of a block of 32 rows."""
    model = build(family, attention="hybridkv", **changes)
    ids = torch.randint(3, 97, (2, n_prompt + n_decode), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :n_pad] = 0
    specs = Policy(TYPES[label]).resolve(kv_facts(layer_facts(model.config)))
    kernels, encoders = fault.kernels(KERNELS), fault.encoders(ENCODERS)
    cache = ModelCache(
        model.config, specs, guard=Guard(mode=mode), notify=said.append, kernels=kernels, encoders=encoders
    )
    first = 0
    with fault.rotation():
        for size in (n_prompt, *[1] * n_decode):
            last = first + size
            positions = torch.arange(first, last).expand(2, size)
            model(ids[:, first:last], attention_mask=mask[:, :last], position_ids=positions, **remembering(cache))
            first = last
    return cache


def case_of(fault: Fault, turn: int) -> tuple[str, str]:
    """A family and types, another at every turn, on which the fault is at work."""
    families, labels = list(FAMILIES), list(TYPES)
    start = 7 * FAULTS.index(fault) + turn
    for i in range(len(labels)):
        label = labels[(start + i) % len(labels)]
        family = families[(3 * start + i) % len(families)]
        specs = Policy(TYPES[label]).resolve(kv_facts(layer_facts(build(family).config)))
        if fault.at_work(specs, padded=True):
            return family, label
    raise AssertionError(fault.name)


TURNS = pytest.mark.parametrize("turn", [0, 1])


def named(faults: tuple[Fault, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults, ids=[fault.name for fault in faults])


@TURNS
@named(PROMPT)
def test_a_fault_is_caught_in_the_first_prompt(fault: Fault, turn: int) -> None:
    family, label = case_of(fault, turn)
    with pytest.raises(GuardError, match=r"the guard stopped at layer \d+: .*, limit ") as caught:
        run(family, label, fault, "strict", [], n_decode=0)
    assert not isinstance(caught.value, MismatchError)


@TURNS
@named(DECODE)
def test_a_fault_in_decode_is_caught_within_a_block(fault: Fault, turn: int) -> None:
    family, label = case_of(fault, turn)
    run(family, label, fault, "strict", [], n_decode=0)
    with pytest.raises(MismatchError, match=r"the guard stopped at layer \d+: .*, limit "):
        run(family, label, fault, "check", [])


def of_name(name: str) -> Fault:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    return fault


@pytest.mark.parametrize("name", ["oldest row missing, decode", "newest row missing, decode"])
def test_a_row_of_hundreds_is_missed(name: str) -> None:
    """In the model's own queries it weighs a few thousandths: a probe looks for it."""
    run("qwen3", "q8_0", SOUND, "check", [], n_prompt=700, n_pad=0)
    with pytest.raises(MismatchError, match=r"attention over the stored rows is off by (1|0\.[5-9])[\d.]*, limit"):
        run("qwen3", "q8_0", of_name(name), "check", [], n_prompt=700, n_pad=0)


def test_a_row_behind_a_window_of_hundreds_is_noticed() -> None:
    options: dict[str, Any] = {"n_prompt": 700, "n_pad": 0, "sliding_window": 500}
    run("gemma3_text", "q8_0", SOUND, "strict", [], **options)
    with pytest.raises(GuardError, match=r"layer 0: q8_0, attention over the stored rows is off by [12]\.\d+, limit"):
        run("gemma3_text", "q8_0", of_name("one row before the oldest"), "strict", [], **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_runs_raise_nothing(family: str) -> None:
    said: list[str] = []
    for label, types in TYPES.items():
        cache = run(family, label, SOUND, "check", said)
        assert {s.types.label for s in cache.specs} == {types.label}
        assert all(0 < error <= Guard().limit_for(types) for error in cache.errors.values())
        assert cache.errors
    assert said == []


def test_a_fault_of_one_type_moves_the_layer_to_the_next() -> None:
    (codebook,) = (f for f in PROMPT if f.name == "codebook of another type")
    said: list[str] = []
    cache = run("qwen3_5_text", "iq4_nl", codebook, "check", said)
    assert [s.types.label for s in cache.specs] == ["q6_0", "q6_0"]
    assert said[0].startswith("layer 1: iq4_nl, attention over the stored rows is off by ")
    assert said[1].startswith("layer 3: iq4_nl, ")
    assert all(line.endswith(" KiB") and "stored as q6_0 instead, +" in line for line in said)


@pytest.mark.parametrize("skipped", [(), (0,), (1, 2)], ids=str)
def test_the_guards_own_rotation_tells_stages_apart(skipped: tuple[int, ...]) -> None:
    """Any orthonormal transform gives right scores: that is why the stored rows are compared."""
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))
    other = stages(x, skipped)
    assert torch.allclose(other.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(butterfly(x), rotate(x), atol=1e-6)
    assert math.isclose(float((other - butterfly(x)).norm() / x.norm()), 0.0, abs_tol=1e-6) == (not skipped)


def test_a_view_that_lacks_a_row_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = KVLayer.view

    def short(self: KVLayer, length: int | None = None) -> KVView:
        return original(self, None if length is None else length - (length > N_PROMPT))

    monkeypatch.setattr(KVLayer, "view", short)
    with pytest.raises(GuardError, match=r"layer 1: q8_0, stored rows err inf more than these types do"):
        run("qwen3_5_text", "q8_0", SOUND, "check", [], n_pad=0)
