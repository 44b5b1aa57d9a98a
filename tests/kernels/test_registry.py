"""The choice of a kernel: highest rank first, and every refusal with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridkv.errors import NoKernelError
from hybridkv.formats import FORMATS, get_format
from hybridkv.kernels import (
    ENCODERS,
    KERNELS,
    PHASES,
    AttentionCase,
    Kernel,
    cpu,
    cpu_native,
    explain,
    reference,
    select,
    select_encoder,
)


def fake(name: str, rank: int, reason: str | None) -> Kernel:
    return Kernel(name, rank, 0.0, lambda case: reason, reference.attend)


CASE = AttentionCase("cpu", "q4_0", "q8_0", 64, 64, 4, "decode")


def test_highest_rank_that_accepts() -> None:
    kernels = (fake("slow", 0, None), fake("best", 9, "wrong moon"), fake("fast", 5, None))
    assert select(CASE, kernels).name == "fast"
    assert explain(CASE, kernels) == [("best", "wrong moon"), ("fast", None), ("slow", None)]


def test_refusal_carries_every_reason() -> None:
    with pytest.raises(NoKernelError) as caught:
        select(CASE, (fake("a", 0, "too old"), fake("b", 1, "too new")))
    assert caught.value.reasons == (("b", "too new"), ("a", "too old"))
    assert "decode on cpu, K q4_0, V q8_0, head dim 64, 4 query heads per KV head" in str(caught.value)
    assert "hint:" in str(caught.value)


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 160, 192, 256, 512])
def test_every_pair_resolves_on_the_cpu(dim: int) -> None:
    for phase in PHASES:
        for k in FORMATS:
            for v in FORMATS:
                assert select(AttentionCase("cpu", k, v, dim, dim, 1, phase), KERNELS)


def test_a_head_dim_no_block_fits_is_refused_with_reason() -> None:
    with pytest.raises(NoKernelError, match="20"):
        select(AttentionCase("cpu", "q4_0", "q4_0", 20, 20, 1, "decode"), KERNELS)
    with pytest.raises(NoKernelError, match="20"):
        select_encoder("cpu", get_format("q4_0"), 20, ENCODERS)
    assert select(AttentionCase("cpu", "f16", "q8_KV", 20, 20, 1, "decode"), KERNELS)


def test_the_native_kernels_are_built() -> None:
    """An installed package has them; without a test, a failed build would only be slow."""
    assert cpu_native.available() is None
    assert select(CASE, KERNELS).name.startswith("cpu-")


@pytest.mark.skipif(cpu_native.available() is not None, reason=f"{cpu_native.available()}")
def test_a_format_that_the_extension_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new row of the table is until the extension is built again: the reference takes it, by name."""
    known = cpu_native.formats() - {"q4_0"}
    monkeypatch.setattr(cpu_native, "formats", lambda: known)
    for case in (CASE, replace(CASE, type_k="q8_0", type_v="q4_0")):
        assert dict(explain(case, KERNELS))[cpu.KERNELS[0].name] == "the extension reads no q4_0"
        assert select(case, KERNELS).name == reference.KERNELS[0].name
    assert cpu.ENCODERS[0].rejects("cpu", FORMATS["q4_0"], 64) == "the extension reads no q4_0"
    assert select(replace(CASE, type_k="q8_0", type_v="f16"), KERNELS).name == cpu.KERNELS[0].name
