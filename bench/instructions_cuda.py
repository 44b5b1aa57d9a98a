"""Instructions of the kernels that a decode step rests on, counted in their machine code. Needs no device.

    python bench/instructions_cuda.py --types q8_0,q6_0,q4_0
    python bench/instructions_cuda.py --experts
    python bench/instructions_cuda.py --products

Compiled for an H100 with Triton's own tools. Of the attention of one token: the loop over rows is the longest one that
branches back; what it holds, over the values of K and V that a thread sees in a turn, is the last column but one. Of
experts: the loads in the longest loop by their width, and its barriers. Of products with one row: the loads before the
kernel waits for its turn, and behind.
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
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from hybridkv.kernels.cuda import experts, products
from hybridkv.kernels.cuda.decode import attend_one_token
from hybridkv.kernels.cuda.layout import row_format

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
H100 = GPUTarget("cuda", 90, 32)
WARPS = 4
TYPES = {"q": "*bf16", "starts": "*i32", "lengths": "*i32", "scale": "fp32", "softcap": "fp32"}
RESULTS = ("out", "tops", "sums", "center")
EXPERT_TYPES = dict.fromkeys(("x", "out", "each", "shared"), "*bf16") | {"index": "*i32", "weights": "*fp32"}


def signature_of(name: str, known: dict[str, Any]) -> str:
    if name in known:
        return "constexpr"
    if name in RESULTS:
        return "*fp32"
    if name.endswith("_book"):
        return "*fp16"
    return TYPES.get(name, "*u8" if name[:2] in ("k_", "v_") else "i32")


def compiled(kv_type: str, head_dim: int, group: int) -> Any:
    flags = ("HAS_WINDOW", "HAS_SOFTCAP", "HAS_CENTER", "HAS_STARTS")
    known: dict[str, Any] = dict.fromkeys(flags, False)
    known |= {
        "K": row_format(kv_type, head_dim),
        "V": row_format(kv_type, head_dim),
        "GROUP": group,
        "SUBTILES": 1,
        "WARPS": WARPS,
    }
    known |= {"N_LENGTHS": 0, "SEGMENT": 0, "OVERLAPS": True}
    signature = {name: signature_of(name, known) for name in attend_one_token.arg_names}
    return for_h100(attend_one_token, signature, known, {n for n, kind in signature.items() if kind.startswith("*")})


def for_h100(
    kernel: Any, signature: dict[str, str], known: dict[str, Any], aligned: set[str], warps: int = WARPS
) -> Any:
    """A kernel whose arguments `aligned` are multiples of 16."""
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=known, attrs=attrs)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    driver.set_active(SimpleNamespace(get_current_target=lambda: H100))  # kernels ask what they are compiled for
    return triton.compile(source, target=H100, options=options)


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


def name_of(instruction: str) -> str:
    """Without its predicate."""
    return re.sub(r"^@!?U?P\d+ ", "", instruction).split()[0]


def show_experts() -> None:
    """At the widths of a 35B-A3B: 8 experts of 512 beside a shared one, rows of 2048."""
    print("| kernel | registers | loads of 16 bytes | narrower loads | barriers |\n|---|---|---|---|---|")
    shapes = {
        "_up": {"TOP": 8, "OUT": experts.UP_OUTPUTS, "IN": experts.UP_INPUTS},
        "_down": {"TOP": 8, "SLOTS": 8, "IN": experts.DOWN_INPUTS},
    }
    for name, warps in (("_up", 4), ("_down", 1)):
        known = shapes[name]
        kernel, known = getattr(experts, name), known | {"OVERLAPS": True}
        signature = {n: "constexpr" if n in known else EXPERT_TYPES.get(n, "i32") for n in kernel.arg_names}
        code, registers = disassembled(
            for_h100(kernel, signature, known, set(signature) - set(known), warps).asm["cubin"]
        )
        body = [name_of(instruction) for instruction in loop_of(code)]
        wide = sum(i.startswith("LDG") and ".128" in i for i in body)
        narrow, barriers = sum(i.startswith("LDG") for i in body) - wide, sum(i.startswith("BAR") for i in body)
        print(f"| {name} | {registers} | {wide} | {narrow} | {barriers} |")


def show_products() -> None:
    """At the widths of a 4B Qwen3.5."""
    print("| inputs | SwiGLU | registers | loads of 16 bytes before the wait | narrower ones | of 16 bytes behind it |")
    print("|---|---|---|---|---|---|")
    for n_in, gated in ((2560, False), (2560, True), (4096, False), (9216, False)):
        tiling = products.tiling_of(n_in)
        known = {**tiling._asdict(), "SWIGLU": gated, "OVERLAPS": True}
        kernel = products._product
        signature = {
            n: "constexpr" if n in known else "i32" if n in ("n_in", "n_out") else "*bf16" for n in kernel.arg_names
        }
        code, registers = disassembled(
            for_h100(kernel, signature, known, set(signature) - set(known) - {"n_out"}, products.WARPS).asm["cubin"]
        )
        names = [name_of(instruction) for _, instruction in code]
        wait = names.index("ACQBULK")
        before, behind = ([i for i in part if i.startswith("LDG")] for part in (names[:wait], names[wait:]))
        wide = [sum(".128" in i for i in part) for part in (before, behind)]
        print(f"| {n_in} | {gated} | {registers} | {wide[0]} | {len(before) - wide[0]} | {wide[1]} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default="q8_0,q6_0,q4_0,hq4_nl,hq3_nl")
    parser.add_argument("--kinds", type=int, default=8, help="kinds of instructions to list")
    parser.add_argument("--experts", action="store_true", help="the kernels of experts instead")
    parser.add_argument("--products", action="store_true", help="products with one row instead")
    a = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    if a.experts:
        show_experts()
        return 0
    if a.products:
        show_products()
        return 0
    print(
        "| type | head dim | registers | instructions of the loop | a value | most of them |\n|---|---|---|---|---|---|"
    )
    for head_dim, group in ((256, 8), (128, 4)):
        for kv_type in a.types.split(","):
            code, registers = disassembled(compiled(kv_type, head_dim, group).asm["cubin"])
            body = loop_of(code)
            n_values = 2 * 16 * head_dim / 32
            kinds = Counter(name_of(i).split(".")[0] for i in body)
            most = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common(a.kinds))
            print(f"| {kv_type} | {head_dim} | {registers} | {len(body)} | {len(body) / n_values:.2f} | {most} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
