"""Every kernel against float64 attention over the decoded rows, in every case that it accepts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridkv.formats import FORMATS
from hybridkv.kernels import KERNELS, AttentionCase, AttentionParams, Kernel, attend, reference
from hybridkv.rotation import rotate
from tests.kernels.stored import store
from tests.oracles.attention import exact_attention, relative_rmse
from tests.thin import each_side

DIMS = [(16, 16), (48, 48), (80, 80), (96, 96), (112, 112), (128, 64), (160, 160), (192, 128), (256, 256), (512, 512)]
ORDINARY = AttentionCase("cpu", "q8_0", "q8_0", 64, 64, 1, "decode")
BUILT = [k for k in KERNELS if k.rejects(ORDINARY) is None]  # tests/kernels/test_registry.py says which must be
KERNEL = pytest.mark.parametrize("kernel", BUILT, ids=lambda k: k.name)


def check(kernel: Kernel, *, n_new: int, group: int = 2, params: dict[str, Any] | None = None, **storage: Any) -> None:
    """Store, attend, compare."""
    stored = store(storage.pop("type_k", "q8_0"), storage.pop("type_v", "q8_0"), **storage)
    view = stored.view
    (rows,) = view.segments
    case = AttentionCase(
        "cpu",
        rows.format_k.name,
        rows.format_v.name,
        view.head_dim_k,
        view.head_dim_v,
        group,
        "decode" if n_new == 1 else "prefill",
    )
    if (reason := kernel.rejects(case)) is not None:
        pytest.skip(f"{kernel.name} refuses {case}: {reason}")
    batch, n_kv_heads = rows.k[0].shape[:2]
    generator = torch.Generator().manual_seed(99)
    q = torch.randn(batch, n_kv_heads * group, n_new, view.head_dim_k, generator=generator)
    options = {"scale": view.head_dim_k**-0.5, **(params or {})}
    got = attend(kernel, q, view, AttentionParams(**options))
    exact = exact_attention(q, stored.k, stored.v, window=view.window, **options)
    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    assert relative_rmse(got, exact) <= kernel.tolerance


@KERNEL
@pytest.mark.parametrize(("type_k", "type_v"), each_side(FORMATS))
def test_every_pair(kernel: Kernel, type_k: str, type_v: str) -> None:
    check(kernel, type_k=type_k, type_v=type_v, n_new=3)
    check(kernel, type_k=type_k, type_v=type_v, n_new=1, head_dim_k=80, head_dim_v=48, n_rows=31)


@KERNEL
@pytest.mark.parametrize("n_new", [1, 3, 63])
@pytest.mark.parametrize("n_rows", [1, 31, 33, 257])
def test_odd_sizes(kernel: Kernel, n_rows: int, n_new: int) -> None:
    if n_new > n_rows:
        n_new = n_rows
    check(kernel, n_rows=n_rows, n_new=n_new, type_k="q4_0", type_v="q5_1")


@KERNEL
@pytest.mark.parametrize("group", [1, 3, 4, 6, 8, 16])
def test_groups(kernel: Kernel, group: int) -> None:
    check(kernel, group=group, n_new=1, type_k="q6_0", type_v="q4_0")
    check(kernel, group=group, n_new=5, type_k="q4_0", type_v="q8_0")


@KERNEL
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(kernel: Kernel, dims: tuple[int, int]) -> None:
    for n_new in (1, 4):
        check(kernel, head_dim_k=dims[0], head_dim_v=dims[1], n_new=n_new, type_k="q4_0", type_v="iq4_nl")


@KERNEL
@pytest.mark.parametrize("n_new", [1, 7])
@pytest.mark.parametrize("window", [1, 8, 40])
def test_window(kernel: Kernel, window: int, n_new: int) -> None:
    check(kernel, window=window, n_new=n_new, n_rows=37)


@KERNEL
@pytest.mark.parametrize("n_new", [1, 7])
def test_softcap_and_sinks(kernel: Kernel, n_new: int) -> None:
    sinks = torch.tensor([0.5, -3.0, 4.0, 0.0])
    check(kernel, n_new=n_new, params={"softcap": 2.0, "scale": 1.0})
    check(kernel, n_new=n_new, params={"sinks": sinks})


@KERNEL
@pytest.mark.parametrize("n_new", [1, 6])
@pytest.mark.parametrize("heads", [1, 4])
def test_mask_with_unseen_rows_and_unseeing_queries(kernel: Kernel, heads: int, n_new: int) -> None:
    mask = torch.rand(2, heads, n_new, 33, generator=torch.Generator().manual_seed(5)) < 0.4
    mask[1, :, 0] = False
    check(kernel, n_new=n_new, params={"mask": mask})


@KERNEL
@pytest.mark.parametrize("n_new", [1, 4])
def test_stale_rows_under_the_mask_do_not_leak(kernel: Kernel, n_new: int) -> None:
    """Rows of another sequence's past, NaN as floats, lie under the mask: outputs must not see them."""
    stored = store("q8_0", "q4_0", n_rows=20)
    for plane in (*stored.view.segments[0].k, *stored.view.segments[0].v):
        plane[1, :, stored.view.segments[0].start : stored.view.segments[0].start + 6] = 0xFF
    mask = torch.ones(2, 1, n_new, 20, dtype=torch.bool)
    mask[1, :, :, :6] = False
    q = torch.randn(2, 4, n_new, 64, generator=torch.Generator().manual_seed(3))
    got = attend(kernel, q, stored.view, AttentionParams(scale=0.125, mask=mask))
    exact = exact_attention(q, stored.k, stored.v, scale=0.125, mask=mask)
    assert torch.isfinite(got).all()
    assert relative_rmse(got, exact) <= kernel.tolerance


@KERNEL
def test_a_visible_nan_is_not_hidden(kernel: Kernel) -> None:
    stored = store("q8_0", "q8_0", n_rows=20)
    stored.view.segments[0].v[0][0, 0, stored.view.segments[0].start + 4] = 0xFF
    q = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(3))
    got = attend(kernel, q, stored.view, AttentionParams(scale=0.125))
    assert torch.isnan(got[0, :2]).any()
    assert torch.isfinite(got[0, 2:]).all()
    assert torch.isfinite(got[1]).all()


@KERNEL
def test_large_scores_do_not_overflow(kernel: Kernel) -> None:
    check(kernel, n_new=2, type_k="f32", type_v="f32", params={"scale": 300.0})


@KERNEL
def test_rotated_rows_give_the_same_attention(kernel: Kernel) -> None:
    stored = store("f32", "f32", n_rows=19)
    q = torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(3))
    rotated = store("f32", "f32", n_rows=19)
    rows = slice(rotated.view.segments[0].start, rotated.view.segments[0].start + 19)
    f32 = FORMATS["f32"]
    rotated.view.segments[0].k[0][:, :, rows] = f32.encode(rotate(stored.k))[0]
    rotated.view.segments[0].v[0][:, :, rows] = f32.encode(rotate(stored.v))[0]
    from dataclasses import replace

    view = replace(rotated.view, rotate_k=True, rotate_v=True)
    got = attend(kernel, q, view, AttentionParams(scale=0.125))
    exact = exact_attention(q, stored.k, stored.v, scale=0.125)
    assert relative_rmse(got, exact) <= kernel.tolerance


@pytest.mark.parametrize("tiles", [(1, 1), (2, 7), (64, 16)])
def test_the_reference_does_not_depend_on_its_tiles(monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, int]) -> None:
    monkeypatch.setattr(reference, "TILE_QUERIES", tiles[0])
    monkeypatch.setattr(reference, "TILE_ROWS", tiles[1])
    for kernel in reference.KERNELS:
        check(kernel, n_new=9, n_rows=40, window=11, params={"sinks": torch.randn(4)})
