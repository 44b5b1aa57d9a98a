"""What attention on a CUDA device is timed with, and torch's own in bfloat16, by every backend that runs a shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa
from triton.errors import TritonError
from triton.testing import do_bench

from hybridkv.formats import FORMATS

COLD_BYTES = 160 << 20
WARM_UP_S = 0.01
FAILED = (RuntimeError, TypeError, ValueError, TritonError)
"""What a backend, or a tiling, that does not run a shape ends in."""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Shape:
    """Head dim, query and KV heads, batch, new and stored tokens."""

    d: int
    hq: int
    hkv: int
    b: int
    t: int
    s: int

    def __str__(self) -> str:
        return f"D={self.d} {self.hq}/{self.hkv} B={self.b} T={self.t} S={self.s}"

    def kv_bytes(self, kv_type: str) -> int:
        """Stored bytes that a call reads."""
        return 2 * self.b * self.hkv * self.s * FORMATS[kv_type].row_bytes(self.d)


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 12) -> float:
    """Median microseconds per call of graph replays through all calls, in their order."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin_s = time.perf_counter()
    while time.perf_counter() - begin_s < WARM_UP_S:  # clocks fall between measurements
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    del graph
    return statistics.median(times)


def single_us(call: Callable[[], object], quick: bool) -> float:
    return 1e3 * float(do_bench(call, warmup=5, rep=20 if quick else 60, return_mode="median"))


def copies(nbytes: int) -> int:
    """Copies of a set of rows that together exceed the cache."""
    return max(1, min(48, -(-COLD_BYTES // nbytes)))


def query(shape: Shape) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(5)
    x = torch.randn(shape.b, shape.hq, shape.t, shape.d, device="cuda", generator=generator)
    return x.to(torch.bfloat16)


def copy_gb_s() -> float:
    a = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / single_us(lambda: b.copy_(a), False) / 1e3


def torch_calls(shape: Shape) -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    """Every way to ask torch for this attention, by name."""
    group = shape.hq // shape.hkv
    bias = causal_lower_right(shape.t, shape.s) if shape.t > 1 else None
    for name, backend in BACKENDS.items():
        if name == "math" and shape.b * shape.hq * shape.t * shape.s > 1 << 20:
            continue

        def gqa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, attn_mask=bias, enable_gqa=True)

        def folded(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q.view(shape.b, shape.hkv, group, shape.d), k, v).view(q.shape)

        def causal(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=True, enable_gqa=True)

        expanded_of: dict[int, Tensor] = {}

        def expand(x: Tensor, seen: dict[int, Tensor] = expanded_of) -> Tensor:  # before the timing, once
            if x.data_ptr() not in seen:
                seen[x.data_ptr()] = x.repeat_interleave(group, 1)
            return seen[x.data_ptr()]

        def expanded(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, expand(k), expand(v), attn_mask=bias)

        yield f"{name} gqa", gqa
        if shape.t == 1:
            yield f"{name} folded", folded
        else:
            yield f"{name} expanded", expanded
            if shape.t == shape.s:
                yield f"{name} causal", causal


def measure_torch(shape: Shape, quick: bool) -> dict[str, tuple[float, float]]:
    """By way: graph-replayed and single-call microseconds, of those that run."""
    q = query(shape)
    n = copies(shape.kv_bytes("bf16")) if shape.t == 1 else 1
    kv = [
        tuple(torch.randn(shape.b, shape.hkv, shape.s, shape.d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for _ in range(n)
    ]
    found = {}
    for name, call in torch_calls(shape):
        try:
            call(q, *kv[0])
            graph = graph_us([lambda call=call, k=k, v=v: call(q, k, v) for k, v in kv])  # type: ignore[misc]
            found[name] = (graph, single_us(lambda call=call: call(q, *kv[0]), quick))  # type: ignore[misc]
        except FAILED:
            continue  # this backend does not run the shape
    return found
