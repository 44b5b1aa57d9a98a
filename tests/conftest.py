"""What every test runs under: no hub, quiet Transformers, few threads, and cache memory full of 0xFF."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from torch import Tensor

import hybridkv.kernels.cuda as kernels
from tests.isas import ISAS
from tests.on_device import INTERPRETED
from tests.with_lab import WHERE, WITH_LAB

if INTERPRETED:
    # Triton decides on its import whether its interpreter runs kernels, and so do these modules. Afterwards nothing
    # is offered on the CPU that would run in it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for found in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"{kernels.__name__}.{found.name}")

from transformers.utils import logging

from hybridkv.cache import planes

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


def patch_language_once() -> None:
    """Half of the interpreter's time is saved by letting it put its functions into `triton.language` only once.

    It does so for each call of a function from a kernel, though they are there already, and takes them out again
    after each launch, though nothing else here would use the language.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_lang(fn: FunctionType) -> SimpleNamespace:
        if fn.__module__ not in patched:  # the modules of the language that it patches are those that `fn` can name
            patch(fn)
            patched.add(fn.__module__)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_lang


if INTERPRETED:
    patch_language_once()


collect_ignore = [] if WITH_LAB else ["lab"]


def pytest_report_header() -> str:
    """Say what is not collected."""
    return "" if WITH_LAB else f"tests/lab is left out: {WHERE}"


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton asks the environment again on a launch; numpy, in which it computes, warns of NaN where it is meant."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with np.errstate(all="ignore"):
        yield


SHARED = ("test_ray.py", "test_tensor_parallel.py", "test_shipped_models.py")
"""Modules whose tests share what takes most of a minute to start or to load."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put them first: pytest-xdist deals the first tests in large pieces, so that one worker has all of a module."""
    items.sort(key=lambda item: SHARED.index(item.path.name) if item.path.name in SHARED else len(SHARED))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh cache memory holds 0xFF: NaN as a float16 or float32 scale, so that reading it cannot go unnoticed."""

    def allocate(shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.full(shape, 0xFF, dtype=torch.uint8, device=device)

    monkeypatch.setattr(planes, "allocate", allocate)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ask for an instruction set: for each that this processor runs, or for those of a test; `best` asks for none."""
    if request.param != "best":
        if request.param not in ISAS:
            pytest.skip(f"this processor does not run {request.param}")
        monkeypatch.setenv("HYBRIDKV_ISA", request.param)
    return str(request.param)
