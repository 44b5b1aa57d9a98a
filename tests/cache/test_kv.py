"""Packed rows in growing memory: what is stored, what is seen, what can be taken back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridkv.cache import AttentionFacts, KVLayer, KVSpec, KVTypes, LayerKernels, resolve
from hybridkv.cache.kv import GROW_ROWS
from hybridkv.cache.spec import WINDOW_SLACK
from hybridkv.errors import ContextError, ModelError, NoKernelError, UsageError
from hybridkv.formats import FORMATS, get_format
from hybridkv.kernels import ENCODERS, KERNELS
from tests.thin import each_side


def choose(spec: KVSpec) -> LayerKernels:
    return resolve(spec, "cpu", KERNELS, ENCODERS)


def layer(
    types: KVTypes | None = None, *, window: int | None = None, n_ctx: int | None = None, **facts: Any
) -> KVLayer:
    sizes = {"n_heads": 4, "n_kv_heads": 2, "head_dim_k": 64, "head_dim_v": 48, **facts}
    spec = KVSpec(AttentionFacts(layer=5, window=window, **sizes), types or KVTypes("q8_0", "q4_0"))
    return KVLayer(spec, choose, n_ctx=n_ctx)


def rows(n: int, *, batch: int = 1, seed: int = 0, dims: tuple[int, int] = (64, 48)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, 2, n, dim, generator=generator) for dim in dims)
    return k, v


def tensors(x: Any) -> list[Tensor]:
    """Every tensor that an object of the cache reaches."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, (tuple, list)):
        return [t for item in x for t in tensors(item)]
    if not type(x).__module__.startswith("hybridkv.cache"):
        return []
    names = [*getattr(x, "__dict__", ()), *getattr(x, "__slots__", ())]
    return [t for name in names for t in tensors(getattr(x, name))]


def decoded(type_name: str, x: Tensor) -> Tensor:
    fmt = get_format(type_name)
    return fmt.decode(fmt.encode(x), x.shape[-1])


@pytest.mark.parametrize("chunks", [(1,), (7, 1, 1, 30), (300, 5, 400), (GROW_ROWS, 1)], ids=str)
def test_append_in_any_chunks_stores_the_same_rows(chunks: tuple[int, ...]) -> None:
    k, v = rows(sum(chunks), batch=2)
    kv = layer()
    for first, last in pairwise([0, *torch.tensor(chunks).cumsum(0).tolist()]):
        view = kv.append(k[:, :, first:last], v[:, :, first:last])
        assert (view.segments[0].start, view.length) == (0, last)
    got_k, got_v = kv.decode()
    torch.testing.assert_close(got_k, decoded("q8_0", k), rtol=0, atol=0)
    torch.testing.assert_close(got_v, decoded("q4_0", v), rtol=0, atol=0)
    assert kv.n_seen == kv.n_stored == sum(chunks)


@pytest.mark.parametrize(("type_k", "type_v"), each_side(FORMATS))
def test_bytes_are_codes_and_scales_and_nothing_else(type_k: str, type_v: str) -> None:
    """No float copy hides in the layer: every tensor that it reaches is counted, and is as small as its format."""
    kv = layer(KVTypes(type_k, type_v), n_ctx=40)
    kv.append(*rows(17, batch=3))
    per_row = get_format(type_k).row_bytes(64) + get_format(type_v).row_bytes(48)
    assert sum(t.untyped_storage().nbytes() for t in tensors(kv)) == kv.nbytes == 3 * 2 * 40 * per_row
    assert kv.nbytes == kv.spec.bytes_at(40, batch=3)
    assert kv.nbytes_used == 3 * 2 * 17 * per_row


def test_exact_rows_and_the_center_are_counted() -> None:
    kv = layer(KVTypes("q8_0", "q4_0", tail=32, sink=4, center=True))
    kv.append(*rows(1000, batch=3))
    assert sum(t.untyped_storage().nbytes() for t in tensors(kv)) == kv.nbytes


def test_rotation_is_stored_and_undone() -> None:
    k, v = rows(9)
    kv = layer(KVTypes("f32", "f32", rotate_k=True, rotate_v=True))
    view = kv.append(k, v)
    stored = view.segments[0].format_k.decode([p[:, :, :9] for p in view.segments[0].k], 64)
    assert not torch.allclose(stored, k, atol=0.1)
    got_k, got_v = kv.decode()
    torch.testing.assert_close(got_k, k, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_v, v, rtol=0, atol=1e-5)


def test_scale_rule_changes_bytes() -> None:
    k, v = rows(9)
    stored = []
    for rule in ("absmax", "refit"):
        kv = layer(KVTypes("q4_0", "f16", scale=rule))  # f16 has no choice of scale and takes none
        view = kv.append(k, v)
        stored.append(view.segments[0].k[0][:, :, :9].clone())
    assert not torch.equal(*stored)


class TestWindow:
    def test_shows_what_a_window_sees_and_lets_old_rows_go(self) -> None:
        k, v = rows(3 * WINDOW_SLACK)
        kv = layer(KVTypes("f32", "f32"), window=10)
        for t in range(3 * WINDOW_SLACK):
            view = kv.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
            assert view.length == min(t + 1, 10)
            got, _ = kv.decode(view.length)
            torch.testing.assert_close(got, k[:, :, t + 1 - view.length : t + 1], rtol=0, atol=0)
        assert kv.capacity == 9 + WINDOW_SLACK
        assert kv.n_seen == 3 * WINDOW_SLACK
        assert kv.nbytes == kv.spec.bytes_at(10**9)

    def test_a_long_prompt_is_seen_whole_and_then_let_go(self) -> None:
        k, v = rows(2000)
        kv = layer(KVTypes("f32", "f32"), window=10)
        assert kv.append(k, v).length == 2000
        view = kv.append(k[:, :, :1], v[:, :, :1])
        assert view.length == 10
        assert kv.capacity == 9 + WINDOW_SLACK

    def test_crop_until_rows_were_let_go(self) -> None:
        kv = layer(window=10)
        kv.append(*rows(30))
        kv.crop(5)
        assert kv.n_seen == 25
        for _ in range(3):
            kv.append(*rows(WINDOW_SLACK))
        assert not kv.can_crop
        with pytest.raises(ContextError, match=r"layer 5.*window of 10 tokens"):
            kv.crop(1)


class TestLimits:
    def test_context_is_reserved_and_not_exceeded(self) -> None:
        kv = layer(n_ctx=20)
        kv.append(*rows(15))
        assert kv.capacity == 20
        kv.append(*rows(5))
        with pytest.raises(ContextError, match="21 tokens do not fit a context of 20"):
            kv.append(*rows(1))
        assert kv.n_seen == 20

    def test_growth_keeps_rows_and_is_not_quadratic(self) -> None:
        kv = layer()
        moves = 0
        capacity = 0
        for seed in range(3000 // 8):
            kv.append(*rows(8, seed=seed))
            moves += kv.capacity != capacity
            capacity = kv.capacity
        assert moves <= 8
        torch.testing.assert_close(kv.decode()[0][:, :, 16:24], decoded("q8_0", rows(8, seed=2)[0]), rtol=0, atol=0)

    def test_shapes_that_contradict_the_config(self) -> None:
        kv = layer()
        with pytest.raises(ModelError, match="layer 5 stores K of 2 heads x 64 and V of 2 x 64; its config says"):
            kv.append(*rows(1, dims=(64, 64)))
        kv.append(*rows(1))
        with pytest.raises(ModelError, match="holds 1 sequences and was given 2"):
            kv.append(*rows(1, batch=2))

    def test_unstorable_cases_are_refused_before_memory(self) -> None:
        with pytest.raises(NoKernelError, match="20"):
            layer(KVTypes("q4_0", "f16"), head_dim_k=20)
        with pytest.raises(UsageError, match="rotation of head dim 20"):
            layer(KVTypes("f16", "f16", rotate_k=True), head_dim_k=20)


def test_crop_then_append_overwrites() -> None:
    kv = layer()
    first, second = rows(10), rows(10, seed=1)
    kv.append(*first)
    kv.crop(4)
    kv.append(*second)
    expected = torch.cat([first[0][:, :, :6], second[0]], 2)
    torch.testing.assert_close(kv.decode()[0], decoded("q8_0", expected), rtol=0, atol=0)
    kv.crop(100)
    assert kv.n_stored == 0


def test_sequences_are_selected_and_repeated() -> None:
    k, v = rows(6, batch=3)
    kv = layer()
    kv.append(k, v)
    kv.select_sequences(torch.tensor([2, 0, 0, 1]))
    assert kv.batch == 4
    torch.testing.assert_close(kv.decode()[0], decoded("q8_0", k[[2, 0, 0, 1]]), rtol=0, atol=0)
    kv.append(*rows(1, batch=4))


def test_reset_frees_memory_and_forgets_the_batch() -> None:
    kv = layer()
    kv.append(*rows(6, batch=3))
    kv.reset()
    assert (kv.nbytes, kv.n_seen, kv.batch) == (0, 0, 0)
    kv.append(*rows(2, batch=1))


def test_fresh_memory_is_never_read() -> None:
    """Every byte around the stored rows is 0xFF here; what comes out is finite all the same."""
    kv = layer(KVTypes("q4_1", "iq4_nl"), n_ctx=50)
    kv.append(*rows(3))
    assert all(torch.isfinite(x).all() for x in kv.decode())
    assert (kv.view().segments[0].k[0][:, :, 3:] == 0xFF).all()
