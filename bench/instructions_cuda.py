"""Instructions that the kernel for one token spends on a stored value, counted in its machine code. Needs no device.

python bench/instructions_cuda.py --types q8_0,q6_0,q4_0

Compiled for an H100 with Triton's own tools. The loop over rows is the longest one that branches back; what it holds,
over the values of K and V that a thread sees in a turn, is the last column but one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybridkv.kernels.cuda.layout import side
from hybridkv.kernels.cuda.one_token import attend_one_token

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
WARPS = 4
TYPES = {"q": "*bf16", "table": "*i32", "starts": "*i32", "lengths": "*i32", "scale": "fp32", "softcap": "fp32"}
RESULTS = ("out", "tops", "sums", "center")


def signature_of(name: str, known: dict[str, Any]) -> str:
    if name in known:
        return "constexpr"
    if name in RESULTS:
        return "*fp32"
    if name.endswith("_book"):
        return "*fp16"
    return TYPES.get(name, "*u8" if name[:2] in ("k_", "v_") else "i32")


def compiled(kv_type: str, head_dim: int, group: int) -> Any:
    flags = ("HAS_WINDOW", "HAS_SOFTCAP", "HAS_CENTER", "HAS_STARTS", "PAGED")
    known: dict[str, Any] = dict.fromkeys(flags, False)
    known |= {"K": side(kv_type, head_dim), "V": side(kv_type, head_dim), "GROUP": group, "SUBTILES": 1, "WARPS": WARPS}
    known |= {"N_LENGTHS": 0, "SEGMENT": 0, "ROWS_LOG2": 0, "OVERLAPS": True}
    signature = {name: signature_of(name, known) for name in attend_one_token.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(attend_one_token, signature=signature, constexprs=known, attrs=aligned)
    options = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def disassembled(cubin: bytes) -> tuple[list[tuple[int, str]], int]:
    """Addresses and instructions, and registers per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run(
                [str(TOOLS / "cuobjdump"), what, file.name], capture_output=True, text=True, check=True
            ).stdout
            for what in ("-sass", "-res-usage")
        ]
    found = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", texts[0], re.MULTILINE)
    registers = re.search(r"REG:(\d+)", texts[1])
    return [(int(a, 16), i.strip()) for a, i in found], int(registers[1]) if registers else 0


def loop_of(code: list[tuple[int, str]]) -> list[str]:
    longest: list[str] = []
    for address, instruction in code:
        back = re.search(r"BRA.*?0x([0-9a-f]+)$", instruction)
        if back and int(back[1], 16) < address:
            body = [i for a, i in code if int(back[1], 16) <= a <= address]
            longest = max(longest, body, key=len)
    return longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default="q8_0,q6_0,q4_0,hq4_nl,hq3_nl")
    parser.add_argument("--kinds", type=int, default=8, help="kinds of instructions to list")
    a = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    print(
        "| type | head dim | registers | instructions of the loop | a value | most of them |\n|---|---|---|---|---|---|"
    )
    for head_dim, group in ((256, 8), (128, 4)):
        for kv_type in a.types.split(","):
            code, registers = disassembled(compiled(kv_type, head_dim, group).asm["cubin"])
            body = loop_of(code)
            n_values = 2 * 16 * head_dim / 32
            kinds = Counter(re.sub(r"^@!?U?P\d+ ", "", i).split()[0].split(".")[0] for i in body)
            most = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common(a.kinds))
            print(f"| {kv_type} | {head_dim} | {registers} | {len(body)} | {len(body) / n_values:.2f} | {most} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
