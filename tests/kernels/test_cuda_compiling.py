"""What is compiled is counted, once: a kernel for an H100, which needs none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.kernels.cuda.compiling import watch_compilation

PROGRAM = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybridkv.kernels.cuda.compiling import watch_compilation


@triton.jit
def kernel(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1.0)


heard = []
triton.knobs.compilation.listener = lambda **case: heard.append(case["cache_hit"])
for _ in range(2):
    with watch_compilation("cuda") as compiled:
        source = ASTSource(kernel, signature={"x": "*fp32", "N": "constexpr"}, constexprs={"N": 32})
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(compiled.n_kernels, 0 < compiled.seconds < 60)
print(heard, "watch" in str(triton.knobs.compilation.listener))
"""


def test_a_kernel_is_compiled_once(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "kept")}
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines() == ["1 True", "0 False", "[False, True] False"], done.stderr


def test_on_the_cpu_nothing_is() -> None:
    with watch_compilation("cpu") as compiled:
        pass
    assert compiled.n_kernels == 0
