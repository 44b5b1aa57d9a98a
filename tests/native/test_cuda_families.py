"""Every family's step on CUDA against Transformers in float64: in the interpreter without a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.hf.step.graph import GraphStep
from hybridkv.kernels import cpu_native
from hybridkv.model import FAMILIES, kv_facts, layer_facts
from hybridkv.native.choice import rejects_packed
from hybridkv.native.model import NativeModel
from hybridkv.native.parameters import ParameterSource
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import ModelCache
from tests import families
from tests.families import build
from tests.hf import recorded

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.kernels.cuda import delta
from hybridkv.native.cuda_step import PackedStep
from tests.native.test_families import VARIANTS
from tests.on_device import DEVICE, ON_CUDA

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason="the extension is not built")

LIMIT = 1e-2
"""float16 activations, which the interpreter cuts where the card rounds."""

CASES = {
    **{name: (name, {}) for name in families.FAMILIES if name not in ("gemma2", "gpt_oss")},
    **VARIANTS,
}


@pytest.fixture(autouse=True)
def short_chunks(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not ON_CUDA:
        monkeypatch.setattr(delta, "CHUNK", 16)
    with torch.inference_mode():
        yield


def pieces_of(batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (batch, n), generator=generator) for n in (17, 1, 1, 3, 1)]


SAMPLED = ("lfm2", "nemotron_h")
"""Attention, convolutions, states and experts, for the interpreter takes minutes for all."""


@pytest.mark.slow
@pytest.mark.parametrize("case", [c if c in SAMPLED else pytest.param(c, marks=pytest.mark.long) for c in CASES])
def test_logits(case: str) -> None:
    """A prompt, single tokens as a recording, more of the prompt; two sequences of plain weights."""
    family, changes = CASES[case]
    model = build(family, **changes)
    noise = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1 and ("bias" in name or name.endswith((".D", "norm.weight"))):
            tensor += 0.3 * torch.randn(tensor.shape, generator=noise)
    config = model.config
    assert rejects_packed(config, "cuda") is None
    source = ParameterSource(model, model.get_parameter_or_buffer)
    step = GraphStep(PackedStep(NativeModel(config, source, device=DEVICE)), recorder=recorded.Again())
    specs = Policy(KVTypes("f32", "f32")).resolve(kv_facts(layer_facts(config)))
    own = {"kernels": recorded.KERNELS, "encoders": recorded.ENCODERS}
    cache = ModelCache(config, specs, device=DEVICE, n_ctx=60, guard=Guard(), **own)
    pieces, position, got = pieces_of(2), 0, []
    for piece in pieces:
        got.append(step.forward(piece, cache, position).cpu())
        position += piece.shape[1]
    model.config._attn_implementation = "eager"
    model = model.double()
    model.set_experts_implementation("eager")
    whole = torch.cat(pieces, 1)
    ends = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0) - 1
    exact = model(input_ids=whole, use_cache=False).logits[:, ends]
    errors = ((torch.stack(got, 1) - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2))).tolist()
    assert max(errors) < LIMIT, errors


def test_every_family_is_run() -> None:
    known = {name for name in families.FAMILIES if build(name).config.model_type in FAMILIES}
    assert {name for name in known if rejects_packed(build(name).config, "cuda") is not None} == set()
