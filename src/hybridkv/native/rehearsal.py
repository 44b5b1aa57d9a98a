"""A model's step on CUDA, rehearsed on the CPU without weights: what it launches is compiled while they load.

The step's own code runs over memory that nobody reads: a prompt of each kind of length, and a token as it is recorded.
`python -m hybridkv.native.rehearsal` is the process that `hybridkv.kernels.cuda.ahead` starts for that: it reads a
request, lists the variants of kernels, and has them compiled into Triton's directory.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from hybridkv.cache import KVSpec
from hybridkv.formats.weights import WEIGHTS
from hybridkv.hf.step.graph import GraphStep
from hybridkv.kernels import Encoder, Kernel
from hybridkv.kernels import cuda as kernels
from hybridkv.kernels.cuda.card import CardFacts
from hybridkv.kernels.cuda.packed_layout import PACKED, PackedWeight
from hybridkv.kernels.weights import Weight
from hybridkv.policy import Guard, Ok
from hybridkv.runtime import ModelCache

LENGTHS: Final = (96, 40, 8, 16, 32)
"""Tokens of prompts: with torch's attention, with ours, and by 8, 16 and 32 rows of the packed products."""

_UNTOUCHED = torch.empty
_MOST = 8192  # rows of a cache; what is cut for more of them is compiled where it is launched


@dataclass(frozen=True, slots=True)
class Request:
    """A model to rehearse.

    Attributes
    ----------
    config
        Its config.
    tensors
        Shape and type of each, by its name in a file.
    specs
        Of its KV layers.
    card
        Where it will run.
    n_ctx
        Tokens of the cache.
    """

    config: Any
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    specs: tuple[KVSpec, ...]
    card: CardFacts
    n_ctx: int = 256


class _Unread:
    """A file's tensors without values."""

    def __init__(self, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        self._tensors = tensors

    def has(self, name: str) -> bool:
        """Check whether there is such a tensor."""
        return name in self._tensors

    def weight(self, name: str) -> Weight:
        """Return a matrix or a stack, of whose memory nothing is used."""
        shape, kind = self._tensors[name]
        stack, n_out, n_in = (1, 1, *shape)[-3:]
        rows = _UNTOUCHED((1, n_out, WEIGHTS[kind].row_bytes(n_in)), dtype=torch.uint8)
        return Weight(WEIGHTS[kind], rows.expand(stack, -1, -1), n_in)

    def vector(self, name: str) -> Tensor:
        """Return ones; decays are negative."""
        return torch.full(self._tensors[name][0], -1.0 if name.endswith("ssm_a") else 1.0)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Iterate names and shapes."""
        return ((name, shape) for name, (shape, _) in self._tensors.items())

    def check(self) -> None:
        """Find nothing wrong."""

    def matrices(self) -> tuple[Weight, ...]:
        """Count none."""
        return ()

    def vectors(self) -> tuple[Tensor, ...]:
        """Count none."""
        return ()

    def forget(self, name: str) -> None:
        """Keep nothing."""

    def shown(self, name: str) -> str:
        """Return the name."""
        return name

    def verify(self) -> None:
        """Find nothing wrong: nothing is read."""


class _Lenient(Guard):
    """Measures, and lets everything pass: nothing was computed."""

    @property
    def watches(self) -> bool:
        """Look at no value."""
        return False

    def judge(self, evidence: Any) -> Ok:
        """Accept."""
        del evidence
        return Ok()


class _Once:
    """Runs a recording's body, which is recorded as launches."""

    def trial(self, body: Any) -> None:
        """Find no fault."""
        del body

    def record(self, body: Any) -> Any:
        """Return the body."""
        return body


def _imagined(weights: Sequence[Weight], device: torch.device) -> PackedWeight:
    """Return what `packed_layout.upload` does, without memory that is read."""
    first, type_ = weights[0], PACKED[weights[0].format.name]
    n_out, n_units = sum(w.n_out for w in weights), -(-first.n_in // 256)
    planes = (
        _UNTOUCHED((1, 1, n or 16), dtype=torch.uint8, device=device).expand(first.n_stack * n_out, n_units, -1)
        for n in type_.plane_bytes
    )
    a, b, c, d = planes
    return PackedWeight(type_, (a, b, c, d), first.n_stack, n_out, first.n_in)


@contextmanager
def _zeros() -> Iterator[None]:
    """Fill new memory with zeros: what no kernel wrote is read as indices, and is measured."""
    empty, new_empty, empty_like = torch.empty, Tensor.new_empty, torch.empty_like
    torch.empty, Tensor.new_empty, torch.empty_like = torch.zeros, Tensor.new_zeros, torch.zeros_like  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.empty, Tensor.new_empty, torch.empty_like = empty, new_empty, empty_like  # type: ignore[method-assign]


def rehearse(request: Request, lengths: Sequence[int] = LENGTHS) -> None:
    """Launch what the model's prompts and tokens launch; to be called while a card is assumed and launches recorded."""
    from hybridkv.native.cuda_step import PackedStep
    from hybridkv.native.model import NativeModel

    own: dict[str, Any] = {
        "kernels": (Kernel(kernels.NAME, 5, kernels.TOLERANCE, lambda *_: None, kernels.attend),),
        "encoders": (Encoder(kernels.NAME, 5, lambda *_: None, kernels.write, kernels.store),),
    }
    step = PackedStep(NativeModel(request.config, _Unread(request.tensors)), send=_imagined)
    recorded = GraphStep(step, notify=lambda _: None, recorder=_Once())

    def cache(n_ctx: int = 256) -> ModelCache:
        return ModelCache(request.config, request.specs, n_ctx=n_ctx, guard=_Lenient(), **own)

    with torch.inference_mode(), _zeros():
        first, *others = lengths
        filled = cache(min(max(request.n_ctx, 256), _MOST))
        step.forward(torch.full((1, first), 3), filled, 0)
        for position in (first, first + 1):
            recorded.forward(torch.full((1, 1), 3), filled, position)
        for length in others:
            step.forward(torch.full((1, length), 3), cache(), 0)


def serve(source: Any, say: Any) -> None:
    """Read a request, list its variants, and compile them."""
    from hybridkv.kernels.cuda.recording import compile_variants, n_workers, recording

    try:
        request: Request = pickle.load(source)
    except EOFError:
        return  # nothing was asked
    with recording(request.card) as variants:
        rehearse(request)
    say({"names": [variant.name for variant in variants]})
    compile_variants(variants, n_workers(), say)
    say({"ended": True})


def main() -> None:
    """Serve one request from the standard input; a message a line on the standard output."""
    torch.set_num_threads(1)
    channel = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no message

    def say(message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        try:
            while line:  # once, but for the list of names: workers' lines are shorter than what a pipe takes whole
                line = line[os.write(channel, line) :]
        except BrokenPipeError:
            os._exit(0)  # nobody waits any more

    serve(sys.stdin.buffer, say)


if __name__ == "__main__":
    main()
