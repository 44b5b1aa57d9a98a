"""The cache on a CUDA device: the same answers as on the CPU. Runs where torch has one."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hybridkv import quantized_cache
from hybridkv.cli.main import main
from hybridkv.formats import FORMATS
from tests.families import FAMILIES, build
from tests.hf.test_families import EXACT, Q8_BOUND, change, run, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that torch can use")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    ids = tokens().cuda()
    exact = run(build(family).cuda(), DynamicCache(config=build(family).config), ids)
    model = build(family, attention="hybridkv").cuda()
    assert change(run(model, quantized_cache(model, type_k="f32", type_v="f32", rotate_k=True), ids), exact) <= EXACT
    q8 = change(run(model, quantized_cache(model, type_k="q8_0", type_v="q8_0"), ids), exact)
    assert EXACT < q8 <= Q8_BOUND


@pytest.mark.parametrize("type_name", FORMATS)
def test_types_as_on_the_cpu(type_name: str) -> None:
    model = build("qwen3_5_text", attention="hybridkv")
    on_cpu = run(model, quantized_cache(model, type_k=type_name, type_v=type_name, guard="off"), tokens())
    model = model.cuda()
    on_cuda = run(model, quantized_cache(model, type_k=type_name, type_v=type_name, guard="off"), tokens().cuda())
    assert change(on_cuda.cpu(), on_cpu) <= 2e-2  # single codes tip over where the two devices round differently


def test_main_job(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--device", "cuda", "-ctk", "q4_0", "-ctv", "q4_0", "-khad", "-vhad", "-p", "Hello world"]
    assert main([*words, "-n", "24", "--temp", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Hello world")
    assert len(out.split()) > 8
    assert "cuda-triton" in err
