"""Routed experts and the embedding in main memory while a card runs the rest: against the CPU's native step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.hf.step.graph import GraphStep
from hybridkv.kernels import cpu_native
from hybridkv.kernels.routing import Routing
from hybridkv.kernels.weights import decode, encode
from hybridkv.model import kv_facts, layer_facts
from hybridkv.native import NativeStep
from hybridkv.native.model import native_model
from hybridkv.native.parameters import ParameterSource
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import ModelCache, Step
from tests.families import build
from tests.hf import recorded

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.native import hosted
from hybridkv.native.cuda_step import PackedStep
from tests.on_device import DEVICE, random

LIMIT = 1e-2
"""float16 activations, which the interpreter cuts where the card rounds."""

SEED = 300
"""Of tokens whose routers choose clearly: where two experts are nearly equal, float16 chooses another one."""

EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def inference(interpreter: None) -> Iterator[None]:
    with torch.inference_mode():
        yield


def hosted_names(*layers: int, embedding: bool = True) -> frozenset[str]:
    return frozenset(f"blk.{i}.{name}" for i in layers for name in EXPERTS) | (
        {"token_embd.weight"} if embedding else frozenset[str]()
    )


class Pair:
    """The same model on the CPU, and with a part of it in main memory beside a card."""

    def __init__(self, names: frozenset[str], n_seqs: int = 1, least: int = 1 << 20) -> None:
        layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
        model = build("qwen3_5_moe_text", **layers, num_attention_heads=2, num_key_value_heads=1)
        config = model.config

        def source() -> ParameterSource:
            return ParameterSource(model, model.get_parameter_or_buffer)

        self.recorder = recorded.Again()
        self.card = PackedStep(native_model(config, source(), "int8", device=DEVICE, hosted=names))
        if self.card.pinned is not None:
            self.card.pinned.least[:] = [least] * self.card.pinned.n_layers
        steps: list[Step] = [
            NativeStep(native_model(config, source(), "int8")),
            GraphStep(self.card, recorder=self.recorder, notify=pytest.fail),
        ]
        specs = Policy(KVTypes("f32", "f32")).resolve(kv_facts(layer_facts(config)))
        own = {"kernels": recorded.KERNELS, "encoders": recorded.ENCODERS}
        caches = [
            ModelCache(config, specs, device="cpu", n_ctx=60, guard=Guard()),
            ModelCache(config, specs, device=DEVICE, n_ctx=60, guard=Guard(), **own),
        ]
        self.both = list(zip(steps, caches, strict=True))
        self.position = 0
        self.n_seqs = n_seqs

    def error(self, length: int) -> float:
        """How far the logits after the next tokens are from the CPU's."""
        seeded = torch.Generator().manual_seed(SEED + self.position)
        piece: Tensor = torch.randint(3, 97, (self.n_seqs, length), generator=seeded)
        exact, got = (step.forward(piece, cache, self.position).cpu() for step, cache in self.both)
        self.position += length
        assert got.dtype == torch.float32
        assert torch.isfinite(got).all()
        return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize(("n_rows", "hidden", "width"), [(1, 64, 32), (3, 96, 32), (33, 32, 160)])
def test_rows_there_and_back(n_rows: int, hidden: int, width: int) -> None:
    """The experts' sum in float64, by scores that the device gave; what it computed meanwhile is added."""
    shapes = ((5, width, hidden), (5, width, hidden), (5, hidden, width))
    gate, up, down = (encode(random(*shape, seed=i).cpu() / 8, "q8_0") for i, shape in enumerate(shapes))
    pinned = hosted.Pinned(40, hidden, 5, torch.device(DEVICE), lambda: verified.append(1))
    verified: list[int] = []
    layers = [pinned.add_layer(gate, up, down, Routing(2)), pinned.add_layer(gate, gate, down, Routing(3))]
    x, scores = random(n_rows, hidden, dtype=torch.float16), random(n_rows, 5)
    for layer, top_k, second in zip(layers, (2, 3), (up, gate), strict=True):
        got = pinned.experts(layer, x, scores, x.float)
        best, chosen = scores.cpu().double().topk(top_k)
        weights, rows = torch.softmax(best, 1), x.cpu().double()
        exact = rows.clone()
        for row, slot in product(range(n_rows), range(top_k)):
            first, other, last = (decode(w, expert=int(chosen[row, slot])).double() for w in (gate, second, down))
            between = torch.nn.functional.silu(first @ rows[row]) * (other @ rows[row])
            exact[row] += weights[row, slot] * (last @ between)
        assert got.dtype == torch.float32
        assert float((got.cpu() - exact).norm() / exact.norm()) < 1e-3
    assert verified == [1]  # once a run


def test_an_embedding_in_main_memory() -> None:
    table = encode(random(50, 64).cpu(), "q8_0")
    pinned = hosted.Pinned(8, 64, 0, torch.device(DEVICE), lambda: None)
    tokens = torch.tensor([49, 0, 7], device=DEVICE)
    assert torch.equal(pinned.embed(table, tokens, 2.0).cpu(), 2 * decode(table)[tokens.cpu()])


def test_numbers_that_are_none_come_back() -> None:
    """A row with a NaN gives NaN in its own row, whoever computes its experts."""
    gate, up, down = (encode(random(4, 32, 32, seed=i).cpu(), "q8_0") for i in range(3))
    pinned = hosted.Pinned(8, 32, 4, torch.device(DEVICE), lambda: None)
    layer = pinned.add_layer(gate, up, down, Routing(2))
    x, scores = random(3, 32, dtype=torch.float16), random(3, 4)
    x[1, 5] = torch.nan
    got = pinned.experts(layer, x, scores, lambda: torch.zeros(3, 32, device=DEVICE)).cpu()
    assert got.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.slow
def test_logits() -> None:
    """A prompt in two chunks, and single tokens as a recording; one layer's experts on each side."""
    pair = Pair(hosted_names(0))
    assert [pair.error(n) < LIMIT for n in (2, 2, 1, 1, 1)] == [True] * 5
    assert pair.recorder.recorded == 1
    assert "experts of 1 layers on " in pair.card.name


@pytest.mark.slow
def test_sequences() -> None:
    """Two of them, a row each in a step; all experts are in main memory, and the embedding is on the card."""
    pair = Pair(hosted_names(0, 1, embedding=False), n_seqs=2)
    assert [pair.error(n) < LIMIT for n in (2, 1, 1)] == [True] * 3


@pytest.mark.slow
def test_experts_of_a_prompt_are_sent() -> None:
    """Matrices of layer 0 reach the card window by window; the CPU computes those of layer 1."""
    pair = Pair(hosted_names(0, 1))
    assert pair.card.pinned is not None
    computed: list[tuple[int, int]] = []
    compute = pair.card.pinned._compute
    pair.card.pinned._compute = lambda *call: (computed.append(call), compute(*call))[1]  # type: ignore[method-assign]
    pair.card.pinned.least[:] = [4, 1 << 20]
    assert pair.error(5) < LIMIT
    assert computed == [(1, 5)]
    assert pair.error(1) < LIMIT
    assert computed == [(1, 5), (0, 1), (1, 1)]


def test_rows_from_which_experts_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sending a layer takes as long as its rows on the CPU: 1 s of bytes, 10 ms a row and core."""
    monkeypatch.setattr(hosted, "PCIE_BYTES_S", 1e9)
    monkeypatch.setattr(hosted, "HOST_ROW_S", 1e-2)
    assert [hosted.stream_rows(n, 1) for n in (10**9, 10**8, 1)] == [100, 10, 1]
    assert hosted.stream_rows(10**9, 16) == 1600
