"""A part of the kernels' tests on the kernels for 64-bit ARM, cross-built and run under QEMU; all: `tests.arm.run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.arm import run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(run.missing() is not None, reason=f"{run.missing()}")]

# Every type: stored, attended and multiplied with; and every operation of a step.
TESTS = (
    "test_encode_writes_the_bytes_of_the_torch_encoder",
    "test_head_dims",
    "test_scores_far_apart",
    "test_rows_masked_for_some_queries_never_leak_to_them",
    "test_products_are_those_of_float64",
    "test_rows_have_the_same_bits_beside_any_others",
    "test_no_sum_of_products_overflows",
    "test_step.py",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.build(tmp_path_factory.mktemp("arm"))


@pytest.mark.parametrize(
    ("processor", "isa"), [("max", "dotprod"), pytest.param("cortex-a72", "neon", marks=pytest.mark.long)]
)
def test_kernels_of_arm_pass_the_tests_of_kernels(program: Path, processor: str, isa: str) -> None:
    done = run.run(program, processor, ["-n", "0", *run.FILES, "-k", f"{isa} and ({' or '.join(TESTS)})"])
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
