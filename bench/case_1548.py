"""The case that hybridkv grew out of, replayed: hybrid models whose 4-bit KV cache "died of error accumulation".

ik_llama.cpp #1548 found NaN logits with q4_0 on a hybrid model, blamed precision lost through the recurrent layers
and forced q8_0. The cause was another one (#1549, #1616): no kernel was built for the type, and the fallback read
queries of 36-byte blocks (q8_1) as blocks of 34 (q8_0). This script runs the same prompt with the same types, once with
our kernels and once with a kernel that misreads its queries in just that way, and writes docs/case-1548.md.

    python bench/case_1548.py > docs/case-1548.md

and, on a file of the pull request's own geometry, its own command for the end of that page:

    python bench/random_model.py m.gguf --mix q4_k_m --layers 40 --experts 256 --hidden 2048
    python bench/case_1548.py --original m.gguf >> docs/case-1548.md
"""

from __future__ import annotations

import argparse
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hybridkv.cache import KVSpec, KVTypes
from hybridkv.engine import Engine, SamplingParams
from hybridkv.engine.load import Loaded, bundled_model, describe, load
from hybridkv.errors import GuardError
from hybridkv.formats import FORMATS
from hybridkv.hf import ModelCache
from hybridkv.kernels import KERNELS, AttentionParams, Kernel, KVView
from hybridkv.model import kv_facts
from hybridkv.policy import Guard, GuardMode, Policy
from hybridkv_lab.machine import cpu_model

PROMPT = "Hello world"
N_PREDICT = 64
ORIGINAL = "-np 1 -fa on -t 2 -ctk q4_0 -ctv q4_0 -khad -vhad -n 64 --temp 0 --ignore-eos"


def misreading(kernel: Kernel) -> Kernel:
    """A kernel that reads queries made for q4_0 rows, blocks of q8_1, as blocks of q8_0."""

    def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
        if view.segments[0].format_k.name == "q4_0":
            head_dim = q.shape[-1]
            written = FORMATS["q8_1"].to_ggml(FORMATS["q8_1"].encode(q), head_dim)
            read = written[..., : FORMATS["q8_0"].row_bytes(head_dim)].contiguous()
            q = FORMATS["q8_0"].decode(FORMATS["q8_0"].from_ggml(read, head_dim), head_dim)
        return kernel.attend(q, view, params)

    return replace(kernel, name=f"{kernel.name}-misreading", attend=attend)


def run(loaded: Loaded, types: KVTypes, mode: GuardMode, kernels: Sequence[Kernel]) -> tuple[str, list[str]]:
    """The text of a run, or how it ended, and what the guard said."""
    messages: list[str] = []
    guard = Guard(mode=mode)
    facts = loaded.description.facts
    specs, warnings = guard.before(Policy(types).resolve(kv_facts(facts)), hybrid=True, n_ctx=512)
    messages += warnings

    def make_cache(specs: Sequence[KVSpec]) -> ModelCache:
        return ModelCache(loaded.model.config, specs, n_ctx=512, guard=guard, notify=messages.append, kernels=kernels)

    engine = Engine(loaded.model, specs, n_ctx=512, guard=guard, notify=messages.append, make_cache=make_cache)
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode(PROMPT)
    out: list[int] = []
    try:
        for (token,) in engine.generate(ids, SamplingParams(temp=0), n_predict=N_PREDICT):
            out.append(token)
    except GuardError as error:
        return f"stopped after {len(out)} tokens: {error.message}", messages
    return loaded.tokenizer.decode(out), messages


CASES: tuple[tuple[str, KVTypes, GuardMode, str], ...] = (
    ("q4_0, as asked", KVTypes("q4_0", "q4_0"), "check", "ours"),
    ("q4_0 -khad -vhad, as asked", KVTypes("q4_0", "q4_0", rotate_k=True, rotate_v=True), "check", "ours"),
    ("q4_0, upgraded (`--kv-guard upgrade`)", KVTypes("q4_0", "q4_0"), "upgrade", "ours"),
    ("q8_0", KVTypes("q8_0", "q8_0"), "check", "ours"),
    ("f16", KVTypes("f16", "f16"), "check", "ours"),
    ("q4_0, queries misread, guard off", KVTypes("q4_0", "q4_0"), "off", "misreading"),
    ("q4_0, queries misread, guard on", KVTypes("q4_0", "q4_0"), "check", "misreading"),
    ("q4_0, queries misread, strict", KVTypes("q4_0", "q4_0"), "strict", "misreading"),
    ("q8_0, the same kernel", KVTypes("q8_0", "q8_0"), "check", "misreading"),
)


def page(loaded: Loaded) -> str:
    """docs/case-1548.md."""
    kernels = {"ours": tuple(KERNELS), "misreading": tuple(misreading(k) for k in KERNELS)}
    story = " ".join((__doc__ or "").split("\n\n")[1].split("This script")[0].split())
    lines = [
        "# The case of ik_llama.cpp #1548",
        "",
        f"Written by `bench/case_1548.py`. {story}",
        "",
        f"The bundled model ({loaded.description.name}), prompt {PROMPT!r}, {N_PREDICT} tokens, greedy. In that pull",
        "request's table, on Qwen3.5-35B-A3B: q4_0 NaN, q4_0 with refitted scales NaN, q4_0 upgraded to q8_0 coherent,",
        "q8_0 and f16 coherent. Here nothing is upgraded unless it is asked for or measured to be needed.",
        "",
    ]
    for title, types, mode, which in CASES:
        text, messages = run(loaded, types, mode, kernels[which])
        lines += [f"## {title}", "", "```text", *text.rstrip().splitlines(), "```", ""]
        lines += [f"> {line}" for line in messages] + [""] * bool(messages)
    lines += [
        "A wrong layout is wrong on the first prompt, and large: the guard names the layer and the measured error. It",
        "is no precision lost over time, and more bits cure it only because another type takes another path.",
    ]
    return "\n".join(lines) + "\n"


def original(path: Path) -> str:
    """The end of the page: the pull request's own command on a file of its model's geometry."""
    options = shlex.split(ORIGINAL)
    command = [sys.executable, "-m", "hybridkv.cli", "run", "-m", str(path), *options, "-p", PROMPT]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    size = path.stat().st_size / 2**30
    messages = [
        line for line in done.stderr.splitlines() if line.startswith(("weights", "backend", "prompt", "gen", "mem"))
    ]
    return "\n".join(
        [
            "",
            "## The command itself, on its model's geometry",
            "",
            f"`hybridkv run -m {path.name} {ORIGINAL} -p {PROMPT!r}`:",
            f"exit code {done.returncode}, {seconds:.1f} s with the start, file {size:.2f} GiB, peak resident memory",
            f"{peak:.2f} GiB (the file's own pages, and what the program takes). Random weights,",
            f"on one {cpu_model()}: the words mean nothing, the numbers are finite and the work is that of the model.",
            "",
            "```text",
            *messages,
            "```",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--original", type=Path, help="a file of the original geometry: print the page's end alone")
    arguments = parser.parse_args()
    if arguments.original is not None:
        print(original(arguments.original), end="")
        return 0
    print(page(load(describe(bundled_model()), dtype=torch.float32, device="cpu")), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
