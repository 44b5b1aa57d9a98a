"""A layer's rows by row counters that only the device knows, for a step that is recorded once and replayed.

Owns which counters those are. Before a step the host counts as ever, packs what leaves a tail and moves what slides, be
it a tail or a window; the step reads from the device where the newest row goes and how many rows each segment holds.
Which segments there are is fixed with the memory that they lie in: a layer that packs its first rows has other memory
from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from hybridkv.cache.layer_kernels import LayerKernels
from hybridkv.cache.spec import KVSpec
from hybridkv.kernels import Segment

MAX_SEGMENTS = 3
"""Sinks, packed rows, tail."""

N_COUNTERS = 2 + MAX_SEGMENTS
"""Counters of a layer: the newest row, the last segment's first row, and each segment's rows."""


def rejects(spec: KVSpec, chosen: LayerKernels, device: str) -> str | None:
    """Explain why a layer's rows cannot be counted on this type of device; None if they can."""
    layer = spec.facts.layer
    if spec.facts.window is not None and (spec.tail or spec.sink):
        return f"layer {layer} has a sliding window beside exact rows, and both move"
    case = replace(spec.case(device, "decode"), device_rows=True)
    if (reason := chosen.decode.rejects(case)) is not None:
        return f"layer {layer}: {chosen.decode.name} {reason}"
    exact = (chosen.exact_k, chosen.exact_v) if spec.tail or spec.sink else ()
    for encoder in (chosen.write_k, chosen.write_v, *exact):
        if encoder.store is None:
            return f"layer {layer}: {encoder.name} takes the row_counters of rows from the host"
    return None


def counters_of(segments: Sequence[Segment]) -> tuple[int, ...]:
    """Return the `N_COUNTERS` of a layer that holds these segments, the newest row included."""
    last = segments[-1]
    absent = (0,) * (MAX_SEGMENTS - len(segments))
    return (last.start + last.length - 1, last.start, *(segment.length for segment in segments), *absent)


def on_device(segments: Sequence[Segment], row_counters: Tensor, *, slides: bool) -> tuple[Segment, ...]:
    """Return the same segments, with their rows counted on the device.

    Parameters
    ----------
    row_counters
        int32 `[N_COUNTERS, B]`: what `counters_of` says at each step, for every sequence.
    slides
        Whether the last segment begins elsewhere from step to step. The others begin at row 0.
    """
    counted = [
        replace(segment, start=0, length=min(plane.shape[2] for plane in (*segment.k, *segment.v)), lengths=lengths)
        for segment, lengths in zip(segments, row_counters[2:], strict=False)
    ]
    if slides:
        counted[-1] = replace(counted[-1], starts=row_counters[1])
    return tuple(counted)
