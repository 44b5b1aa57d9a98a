"""Quantized files that the native backend cannot run, or that are damaged: said in one error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from hybridkv.errors import ModelFileError
from hybridkv.gguf.load import load_gguf
from hybridkv.kernels import cpu_native
from hybridkv.native import map_gguf
from tests.cli.conftest import Cli
from tests.native.quantized import plain_file, quantized_file, with_tensor

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")
NAME = "blk.1.ffn_gate.weight"


def test_a_type_without_a_product_is_one_clear_error(cli: Cli, tmp_path: Path) -> None:
    """`run` and `plan` say the same; the eager backend takes the file."""
    source = plain_file("qwen3")
    ternary = np.zeros((512, 54), np.uint8)
    path = with_tensor(source, tmp_path / "ternary.gguf", NAME, ternary, Type.TQ1_0)
    with pytest.raises(ModelFileError, match=f"{NAME}' has type TQ1_0"):
        map_gguf(path)
    for command in (("run", "--ids", "5", "-n", "1"), ("plan", "--device", "cpu")):
        done = cli(command[0], "-m", path, *command[1:])
        assert done.code == 2
        assert (
            f"tensor '{NAME}' has type TQ1_0, which the native backend does not multiply; allowed: f32, f16" in done.err
        )
        n_values = sum(p.numel() for p in load_gguf(path).model.parameters())
        assert f"--backend eager decodes all weights to float32 ({4 * n_values / 2**30:.2f} GiB)" in done.err
        assert "Traceback" not in done.err
    assert cli("run", "-m", path, "--ids", "5", "-n", "1", "--backend", "eager").code == 0


@pytest.mark.parametrize(("mix", "at"), [("q4_k_m", 0), ("q6_k", 208), ("q2_k", 80), ("iq4_xs", 0)])
def test_a_scale_that_is_nan_is_named(cli: Cli, tmp_path: Path, mix: str, at: int) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(quantized_file("qwen3_5_moe_text", mix).read_bytes())
    source = map_gguf(path).source
    name = "blk.1.ffn_up_exps.weight"
    info = source._infos[name]
    row, stack = info.nbytes // (info.shape[0] * info.shape[1]), info.shape[1]
    offset = info.offset + (2 * stack + 5) * row + at
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(np.float16("nan").tobytes())
    assert map_gguf(path).source.check() == f"{name} (expert 2, row 5, block 0)"
    ids = ",".join(str(i) for i in range(3, 60))
    done = cli("run", "-m", path, "--ids", ids, "-n", "1")
    assert done.code == 2
    assert f"the weights are not finite: {name} (expert 2, row 5, block 0)" in done.err
