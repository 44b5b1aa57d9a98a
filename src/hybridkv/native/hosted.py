"""Parts of a model that stay in main memory while a card runs the rest: routed experts, and the embedding.

Owns the pinned memory through which rows go there and back, and the operations on the CPU. The router and the expert
that all tokens share are on the card: it computes the latter while the CPU computes the chosen ones. Rows of a long
prompt need most experts several times: from `stream_rows` on, an expert's matrices go to the card instead.

Does not own what lies where (`hybridkv.placement`), or how such a step is recorded (`hf/step/host_work.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hybridkv.hf.step.host_work import host_work
from hybridkv.kernels.routing import Routing
from hybridkv.kernels.step import Gate, StepProgram
from hybridkv.kernels.weights import Weight
from hybridkv.kernels.weights import rows as gather

PCIE_BYTES_S: Final = 5.4e9
"""Bytes of mapped weights that reach a card in a second through pinned memory, and are converted there.

Measured on one H200 with 16 cores: the experts of 30 layers of a 35B-A3B, 14.5 GB, in 2.7 s (`bench/split_cuda.py`)."""

HOST_ROW_S: Final = 6.1e-4
"""Seconds in which one core with AMX computes a row's routed experts of a layer; 16 took 2.36 s for 2048 rows of 30
layers there. Processors without AMX take longer, and are given prompts that are too long for them."""


def stream_rows(layer_bytes: int, n_threads: int) -> int:
    """Return the rows from which on a layer's routed experts go to the card: `bytes / PCIe rate / seconds of a row`."""
    return max(1, round(layer_bytes / PCIE_BYTES_S * n_threads / HOST_ROW_S))


class Pinned:
    """Memory through which a step's rows go to the CPU and back, and the operations there; all layers share it.

    Parameters
    ----------
    n_rows
        Most rows of a step.
    hidden, n_experts
        Width of a row, and scores of a router; 0 experts if none stay in main memory.
    verify
        Raises an error if what was read is no longer what it was; called once a step.
    """

    def __init__(
        self, n_rows: int, hidden: int, n_experts: int, device: torch.device, verify: Callable[[], None]
    ) -> None:
        pinned = device.type == "cuda"
        self.n_rows, self.hidden, self.device, self._verify = n_rows, hidden, device, verify
        self._asked = torch.zeros(n_rows, hidden + n_experts, pin_memory=pinned)
        self._answers = torch.zeros(n_rows, hidden, pin_memory=pinned)
        self._tokens = torch.zeros(n_rows, dtype=torch.long, pin_memory=pinned)
        self._program = StepProgram()
        self._widths: list[tuple[int, int]] = []
        self.least: list[int] = []
        """By layer, rows from which on its experts' matrices go to the device."""

    @property
    def nbytes(self) -> int:
        """Bytes of main memory."""
        return self._asked.nbytes + self._answers.nbytes + self._tokens.nbytes

    @property
    def n_layers(self) -> int:
        """Layers whose experts are here."""
        return len(self.least)

    def add_layer(self, gate: Weight | None, up: Weight, down: Weight, routing: Routing) -> int:
        """Add a layer's experts, squares of ReLU without a gate; return the number by which `experts` knows it."""
        x, scores, answers = self._asked[:, : up.n_in], self._asked[:, self.hidden :], self._answers[:, : down.n_out]
        act: Gate = "relu" if gate is None else "silu"  # a number times its ReLU is the square of that
        self._program.experts(x, scores, gate, up, down, answers, routing, act=act, add=False)
        self._widths.append((up.n_in, down.n_out))
        gates = 0 if gate is None else gate.nbytes
        self.least.append(stream_rows(gates + up.nbytes + down.nbytes, torch.get_num_threads()))
        return self.n_layers - 1

    def experts(self, layer: int, x: Tensor, scores: Tensor, meanwhile: Callable[[], Tensor | None]) -> Tensor:
        """Compute a layer's routed experts on the CPU, and something else on the device meanwhile.

        Parameters
        ----------
        x, scores
            `[N, hidden]`, or the experts' own width, and `[N, experts]` on the device.

        Returns
        -------
        Tensor
            The sums of the experts' answers and what `meanwhile` returns, float32 of x's shape on the device.
        """
        n, others = len(x), list[Tensor | None]()
        n_in, n_out = self._widths[layer]
        empty = [scores.new_zeros(n, self.hidden - n_in)] if n_in < self.hidden else []
        self._asked[:n].copy_(torch.cat([x.to(scores.dtype), *empty, scores], 1), non_blocking=True)
        host_work(self.device).run(partial(self._compute, layer, n), lambda: others.append(meanwhile()))
        answer = self._answers[:n].to(self.device, non_blocking=True, copy=True)[:, :n_out]
        return answer if others[0] is None else answer.add_(others[0])

    def embed(self, weight: Weight, tokens: Tensor, scale: float) -> Tensor:
        """Gather rows of a matrix in main memory, times a scale: float32 `[N, hidden]` on the device."""
        n = len(tokens)
        self._tokens[:n].copy_(tokens, non_blocking=True)
        host_work(self.device).run(partial(self._gather, weight, n))
        return self._answers[:n].to(self.device, non_blocking=True, copy=True) * scale

    def _compute(self, layer: int, n: int) -> None:
        self._program.run(layer, layer + 1, 1, n)
        if layer == self.n_layers - 1:
            self._verify()

    def _gather(self, weight: Weight, n: int) -> None:
        gather(weight, self._tokens[:n], out=self._answers[:n])
