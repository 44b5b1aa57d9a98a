"""Kernels that are launched while the one before ends: what they must do, read from their source."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.kernels import cuda
from hybridkv.kernels.cuda.overlap import begin, overlapping
from hybridkv.kernels.cuda.packed_tiles import _both, ask

LAUNCHED = 27
"""Kernels that are launched so; those that only call `begin` for them are none."""


def sources() -> dict[str, str]:
    found = {}
    for module in (importlib.import_module(f"{cuda.__name__}.{m.name}") for m in pkgutil.iter_modules(cuda.__path__)):
        for name, kernel in vars(module).items():
            function = getattr(kernel, "fn", None)
            if function is not None and function.__module__ == module.__name__:
                source = inspect.getsource(function)
                if "OVERLAPS: tl.constexpr" in source and kernel is not begin:
                    found[name] = source
    return found


def test_all_are_found() -> None:
    assert len(sources()) == LAUNCHED, sorted(sources())


READS_WEIGHTS_EARLY = "_product"


PACKED_EARLY = ("_products", "_gated", "_tiles", "_plain_row")
"""Of packed weights: they wait in `_tiles` and `_plain_row`, between the first loads of weights and of activations."""


@pytest.mark.parametrize("name", sorted({*sources()} - {READS_WEIGHTS_EARLY, *PACKED_EARLY}))
def test_memory_is_touched_after_the_wait(name: str) -> None:
    source = sources()[name]
    wait = re.search(r"begin\(OVERLAPS\)|gdc_wait\(\)", source)
    touch = re.search(r"tl\.(load|store|atomic_\w+)\(|load_rows\(|_unpack\(|_slots\(|_load_eight\(|_queries\(", source)
    assert wait is not None
    assert touch is not None
    assert wait.start() < touch.start()


def test_before_the_wait_a_product_reads_weights_alone() -> None:
    before, wait, after = sources()[READS_WEIGHTS_EARLY].partition("gdc_wait()")
    assert wait
    assert set(re.findall(r"tl\.(?:load|store|atomic_\w+)\((\w+)", before)) == {"rows", "ups"}
    assert re.findall(r"(?:rows|ups) = (\w+)", before) == ["weight", "rows"]
    assert "tl.load(x" in after


def test_before_the_wait_a_packed_product_reads_weights_alone() -> None:
    before, wait, after = sources()["_tiles"].partition("gdc_wait()")
    assert wait
    assert "gdc_wait" not in after
    assert set(re.findall(r"(\w+)\(", before.partition('"""')[2])) <= {"arange", "rows_of", "ask"}
    assert "ask(main, more, scales, last," in before
    assert "share_times(" in after
    asked = inspect.getsource(ask.fn) + inspect.getsource(_both.fn)
    assert "load_unit(main, more, scales, last," in asked
    assert not re.search(r"tl\.(load|store)\(", asked)


def test_before_the_wait_a_plain_row_reads_weights_alone() -> None:
    before, wait, after = sources()["_plain_row"].partition("gdc_wait()")
    assert wait
    assert re.findall(r"tl\.(?:load|store|atomic_\w+)\((\w+)", before) == ["at"]
    assert re.findall(r"at = (\w+)", before) == ["plain"]
    assert "tl.load(x" in after


def test_a_cpu_has_none() -> None:
    assert overlapping(torch.device("cpu")) == {"OVERLAPS": False}
