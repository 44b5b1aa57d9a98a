"""Stand-ins for what only a CUDA device has: a kernel that reads its numbers from tensors, and recorders.

`Traced` records what torch was asked for, tensor by tensor, and replays that without the model's Python code, as a CUDA
graph does: a number that was a constant when it was recorded stays one, memory that was read is read where it was, and
whatever asks for a tensor's value while it is recorded is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hybridkv.formats import KVFormat, Scale
from hybridkv.hf import ModelCache
from hybridkv.kernels import AttentionParams, Encoder, Kernel, KVView, Segment, reference
from hybridkv.rotation import rotate


def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
    """One query per sequence over segments whose rows tensors count, in torch, without looking at any value."""
    if view.segments[0].lengths is None:
        return reference.attend(q, view, params)
    assert q.shape[2] == 1
    assert params.mask is None
    keys, values, hidden = (torch.cat(parts, 2) for parts in zip(*(_rows(s, view) for s in view.segments), strict=True))
    if view.window is not None:
        newer = hidden.logical_not().flip(2).cumsum(2).flip(2)  # rows from each one on
        hidden = hidden | (newer > view.window)
        values = values.masked_fill(hidden, 0.0)
    grouped = q.float().unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    scores = grouped @ keys.transpose(2, 3) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    scores = scores.masked_fill(hidden.transpose(2, 3), -torch.inf).view(q.shape[0], q.shape[1], 1, -1)
    if params.sinks is not None:
        scores = torch.cat([scores, params.sinks.float().view(1, -1, 1, 1).expand(q.shape[0], -1, -1, -1)], 3)
    weights = torch.softmax(scores, -1)[..., : keys.shape[2]].view((*grouped.shape[:3], -1))
    return (weights @ values).view(*q.shape[:3], -1)


def _rows(segment: Segment, view: KVView) -> tuple[Tensor, Tensor, Tensor]:
    """K and V of as many rows as there may be, zero where there are none, and bool `[B, 1, S, 1]`: where."""
    assert segment.lengths is not None
    at = torch.arange(segment.length, device=segment.lengths.device)
    hidden = (at >= segment.lengths.unsqueeze(1))[:, None, :, None]
    first = segment.start if segment.starts is None else segment.start + segment.starts.unsqueeze(1)
    at = (at + first).clamp(max=segment.k[0].shape[2] - 1).expand(len(segment.lengths), -1)
    k, v = (
        [plane.gather(2, at[:, None, :, None].expand(-1, plane.shape[1], -1, plane.shape[3])) for plane in planes]
        for planes in (segment.k, segment.v)
    )
    keys, values = segment.format_k.decode(k, view.head_dim_k), segment.format_v.decode(v, view.head_dim_v)
    keys = keys if segment.center is None else keys + segment.center.unsqueeze(2)
    return keys, values.masked_fill(hidden, 0.0), hidden


def store(
    x: Tensor,
    fmt: KVFormat,
    scale: Scale | None,
    planes: Sequence[Tensor],
    row: int | Tensor,
    *,
    rotated: bool,
    center: Tensor | None,
) -> None:
    """Store rows where a tensor says."""
    assert center is None
    x = rotate(x) if rotated else x
    if isinstance(row, int):
        return reference.write(x, fmt, scale, planes, row)
    for plane, encoded in zip(planes, fmt.encode(x, scale), strict=True):
        plane.scatter_(2, row.long().view(-1, 1, 1, 1).expand(encoded.shape), encoded)
    return None


KERNELS = (Kernel(name="rows-on-device", rank=99, tolerance=1e-5, rejects=lambda case: None, attend=attend),)
ENCODERS = (
    Encoder(name="rows-on-device", rank=99, rejects=reference.ENCODERS[0].rejects, write=reference.write, store=store),
)


class Again:
    """Replays by running the body again."""

    def __init__(self) -> None:
        self.recorded = 0

    def trial(self, body: Callable[[], None]) -> str | None:
        body()
        return None

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        self.recorded += 1
        return body


class Traced(Again):
    """Replays the operations of a trace. Tracing runs them, so what the cache held is put back."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: ModelCache | None = None

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        self.recorded += 1
        assert self.watched is not None
        memory = self.watched.memory
        before = [tensor.clone() for tensor in memory]
        replay = trace(body)
        for tensor, old in zip(memory, before, strict=True):
            tensor.copy_(old)
        return replay


def trace(body: Callable[[], None]) -> Callable[[], object]:
    def run(unused: Tensor) -> Tensor:
        body()
        return unused

    module = make_fx(run)(torch.zeros(1))
    return lambda: module(torch.zeros(1))


class Suspicious(Traced):
    """Traces once in vain, as a trial does; tracing takes seconds."""

    def trial(self, body: Callable[[], None]) -> str | None:
        try:
            trace(body)
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        return None
