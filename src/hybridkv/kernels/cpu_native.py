"""Binding of the native CPU kernels: torch tensors in, addresses and strides out.

Owns the checks that make the native code safe to call (shapes, dtypes, contiguity, bounds) and the choice of the
instruction set. Knows no cases: `hybridkv.kernels.cpu` adapts it to the registry.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats import Scale, get_format
from hybridkv.kernels.case import Segment, require_host_rows
from hybridkv.kernels.threads import native_threads

Isa = Literal["amx", "avx512", "avx2_vnni", "avx2", "dotprod", "neon", "portable"]


@cache
def _extension() -> ModuleType | ImportError:
    try:
        from hybridkv import _cpu
    except ImportError as error:
        return error
    return cast(ModuleType, _cpu)


def available() -> str | None:
    """Explain why the native kernels cannot run; None if they can."""
    module = _extension()
    if isinstance(module, ImportError):
        return f"the extension hybridkv._cpu is not built ({module})"
    return None


@cache
def formats() -> frozenset[str]:
    """List the KV formats that the extension was built with."""
    return frozenset(_native().FORMATS)


def isa() -> Isa:
    """Return the instruction set that calls run on: the best one here, or `HYBRIDKV_ISA`.

    Raises
    ------
    UsageError
        `HYBRIDKV_ISA` names something that this processor or this build does not run.
    """
    return _offered(os.environ.get("HYBRIDKV_ISA"))


@cache
def _offered(wanted: str | None) -> Isa:
    offered = _native().isas()
    if wanted is not None and wanted not in offered:
        raise UsageError(
            f"HYBRIDKV_ISA={wanted} does not run here; allowed: {', '.join(offered)}",
            hint="unset HYBRIDKV_ISA to take the best one",
        )
    return cast(Isa, offered[0] if wanted is None else wanted)


def allocate(shape: Sequence[int]) -> Tensor:
    """Allocate uninitialized uint8 memory, on large pages where the system has them: streams read it 10 % faster."""
    memory = torch.empty(tuple(shape), dtype=torch.uint8)
    if available() is None:
        _native().advise_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory


def encode_into(
    x: Tensor, fmt_name: str, scale: Scale | None, planes: Sequence[Tensor], start: int, *, n_threads: int | None = None
) -> None:
    """Encode x into rows [start, start + T) of the planes, with the bytes of `KVFormat.encode`.

    Parameters
    ----------
    x
        float32, float16 or bfloat16 [B, Hkv, T, D], any outer strides.
    planes
        One uint8 tensor [B, Hkv, capacity, plane bytes] per plane, contiguous.

    Raises
    ------
    UsageError
        This format has no such scale rule.
    """
    fmt = get_format(fmt_name)
    scale = scale or fmt.default_scale
    if scale not in fmt.scales:
        raise UsageError(f"{fmt_name} has no scale rule {scale!r}; allowed: {', '.join(fmt.scales)}")
    n_batch, n_kv_heads, n_new, head_dim = x.shape
    capacity = check_planes(planes, fmt_name, head_dim, (n_batch, n_kv_heads))
    assert start >= 0 and start + n_new <= capacity, (start, n_new, capacity)
    if x.stride(-1) != 1:
        x = x.contiguous()
    _native().encode(
        isa(),
        x.data_ptr(),
        {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[x.dtype],
        x.stride()[:3],
        fmt_name,
        scale == "refit",
        [plane.data_ptr() for plane in planes],
        n_batch,
        n_kv_heads,
        n_new,
        head_dim,
        capacity,
        start,
        n_threads or native_threads(),
    )


def attend(
    q: Tensor,
    segments: Sequence[Segment],
    head_dim_k: int,
    head_dim_v: int,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    n_threads: int | None = None,
    on_scratch: Callable[[int], object] | None = None,
) -> Tensor:
    """Attend the S stored rows of all segments.

    Query t stands at row S - T + t and sees the rows up to its own (all of them with causal=False), of those the
    last `window`, where `mask` is True. A query that sees no row gives zeros.

    Parameters
    ----------
    q
        Any float dtype [B, Hq, T, D].
    segments
        At least one, in the order of their tokens; none is empty, planes and centers are contiguous.
    sinks
        float32 [Hq]: a logit per head that joins the softmax and carries no value.
    mask
        bool [B or 1, Hq or 1, T, S], True where a query attends.
    n_threads
        None for torch's number.
    on_scratch
        Told the bytes of working memory that the call used, all threads together.

    Returns
    -------
    Tensor
        float32 [B, Hq, T, Dv].
    """
    n_batch, n_heads, n_new, _ = q.shape
    n_kv_heads = segments[0].k[0].shape[1]
    rows = native_rows(segments, n_batch, n_kv_heads, head_dim_k, head_dim_v)
    n_stored = sum(segment.length for segment in segments)
    assert q.shape[3] == head_dim_k and n_heads % n_kv_heads == 0, (q.shape, n_kv_heads, head_dim_k)
    assert n_new <= n_stored, (n_new, n_stored)
    assert window is None or window > 0, window
    if q.dtype != torch.float32 or q.stride(3) != 1:
        q = q.float().contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    assert sinks is None or sinks.shape == (n_heads,), sinks
    mask_strides = (0, 0, 0)
    if mask is not None:
        assert mask.dtype == torch.bool, mask.dtype
        mask = mask.expand(n_batch, n_heads, n_new, n_stored)
        mask = mask if mask.stride(3) == 1 or n_stored == 1 else mask.contiguous()
        mask_strides = cast(tuple[int, int, int], mask.stride()[:3])
    out = torch.empty(n_batch, n_heads, n_new, head_dim_v, dtype=torch.float32)
    scratch_bytes = _native().attend(
        isa(),
        q.data_ptr(),
        q.stride()[:3],
        rows,
        head_dim_k,
        head_dim_v,
        n_batch,
        n_heads,
        n_kv_heads,
        n_new,
        scale,
        softcap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
        window or 0,
        0 if mask is None else mask.data_ptr(),
        mask_strides,
        causal,
        out.data_ptr(),
        n_threads or native_threads(),
    )
    if on_scratch is not None:
        on_scratch(scratch_bytes)
    return out


def all_finite(x: Tensor) -> bool:
    """Check whether all of a contiguous float32 tensor on the CPU is finite, on this thread, in microseconds."""
    assert x.dtype == torch.float32 and x.is_cpu and x.is_contiguous(), (x.dtype, x.device, x.stride())
    return bool(_native().all_finite(x.data_ptr(), x.numel()))


def probe(kind: Literal["read", "float", "integer"], n_threads: int, data: Tensor | None = None) -> float:
    """Measure this machine's ceilings: bytes read of `data` per second, or multiply-adds per second.

    `float` multiplies float32, `integer` what the kernels take for codes: int8 tiles with AMX, int16 pairs elsewhere.
    """
    rounds = 400_000  # a few milliseconds: longer than it takes all threads to start
    address, count = (0, rounds) if data is None else (data.data_ptr(), data.nbytes // 4)
    return float(_native().probe(isa(), kind, address, count, n_threads))


@cache
def _native() -> ModuleType:
    module = _extension()
    if isinstance(module, ImportError):
        raise module
    return module


def native_rows(
    segments: Sequence[Segment], n_batch: int, n_kv_heads: int, head_dim_k: int, head_dim_v: int
) -> list[tuple[object, ...]]:
    """Describe segments for the native code: per side type, addresses and capacity; start, length, center or 0."""
    require_host_rows(segments, "the CPU kernel")
    rows: list[tuple[object, ...]] = []
    heads = (n_batch, n_kv_heads)
    for s in segments:
        capacity_k = check_planes(s.k, s.format_k.name, head_dim_k, heads)
        capacity_v = check_planes(s.v, s.format_v.name, head_dim_v, heads)
        assert 0 <= s.start < s.start + s.length <= min(capacity_k, capacity_v), (s.start, s.length, capacity_k)
        center = 0
        if s.center is not None:
            assert s.center.shape == (*heads, head_dim_k) and s.center.dtype == torch.float32, s.center.shape
            assert s.center.is_contiguous() and s.center.device.type == "cpu", s.center.stride()
            center = s.center.data_ptr()
        k = (s.format_k.name, [plane.data_ptr() for plane in s.k], capacity_k)
        v = (s.format_v.name, [plane.data_ptr() for plane in s.v], capacity_v)
        rows.append((k, v, s.start, s.length, center))
    return rows


def check_planes(planes: Sequence[Tensor], fmt_name: str, head_dim: int, heads: tuple[int, int]) -> int:
    """Assert that the native code may read the planes; their capacity in rows."""
    sizes = _plane_bytes(fmt_name, head_dim)
    capacity = int(planes[0].shape[2])
    for plane, size in zip(planes, sizes, strict=True):
        assert plane.dtype == torch.uint8 and plane.is_contiguous() and plane.device.type == "cpu"
        assert plane.shape == (*heads, capacity, size), (fmt_name, plane.shape, heads, capacity, size)
    return capacity


@cache
def _plane_bytes(fmt_name: str, head_dim: int) -> tuple[int, ...]:
    return get_format(fmt_name).plane_bytes(head_dim)
