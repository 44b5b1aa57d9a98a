"""Signs of life: which share of the weights is ready."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridkv.cli.progress import Loading, loading
from hybridkv.engine.load import describe, load
from hybridkv.engine.steps import resolve_step
from hybridkv.held import WeightKind


def test_the_share_grows_while_weights_are_converted(hybrid: Path) -> None:
    description = describe(hybrid)
    shown = Loading("tiny")
    assert str(shown.__rich__()) == "loading tiny"
    kind: WeightKind = "int8"
    model = load(description, dtype=torch.float32, device="cpu", weights=kind).model
    shown.count(model, sum(description.held(kind, "cpu", "f32").parts.values()))
    shares = [str(shown.__rich__())]
    encode = model.source.weight

    def weight(name: str) -> object:
        taken = encode(name)
        shares.append(str(shown.__rich__()))
        return taken

    model.source.weight = weight
    resolve_step(model.config, "cpu")(model)
    numbers = [int(line.removeprefix("loading tiny: ").removesuffix("%")) for line in shares]
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert len(set(numbers)) > 5
    assert 90 <= numbers[-1] <= 100  # vectors are not counted


def test_another_model_has_a_spinner_alone() -> None:
    shown = Loading("other")
    shown.count(torch.nn.Linear(2, 2), 100)
    assert str(shown.__rich__()) == "loading other"


def test_nothing_is_shown_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    with loading("tiny") as shown:
        assert str(shown.__rich__()) == "loading tiny"
    assert capfd.readouterr() == ("", "")
