"""The step on CUDA whose weights stay packed: a model's graph over a GGUF file's matrices on the card."""

from __future__ import annotations

import torch

from hybridkv.hf.step.fused_layers import LayersStep
from hybridkv.kernels import cpu_native
from hybridkv.kernels.cuda.packed_layout import upload
from hybridkv.model import graph_of
from hybridkv.model.protocols import LanguageModel
from hybridkv.native import cuda as lowering
from hybridkv.native.cuda_card import Card, Send
from hybridkv.native.sources import source_of, types_held

PROMPT_ROWS = 2048
"""Tokens of all sequences in one step of a prompt: for each step, all matrices are decoded once."""


class PackedStep(LayersStep):
    """Uploads a model and runs it; `choice.rejects_packed` must have said None.

    Parameters
    ----------
    model
        A `NativeModel` of a CUDA device; its source is read once.
    send
        Puts matrices on the device.
    """

    def __init__(self, model: LanguageModel, send: Send = upload) -> None:
        source = source_of(model)
        hosted: frozenset[str] = getattr(model, "hosted", frozenset())
        card = Card(source, torch.device(model.device), hosted=hosted, n_rows=PROMPT_ROWS, send=send)
        embed, layers, head = lowering.build(graph_of(model.config), model.config, card)
        source.verify()
        self.n_bytes, self.pinned = card.n_bytes, card.pinned if hosted else None
        name = f"native-triton, weights {types_held(source)}"
        if n_layers := card.n_host_layers:
            name += f", experts of {n_layers} layers on {cpu_native.isa()}"
        super().__init__(embed, layers, head, card.device, name, PROMPT_ROWS)
