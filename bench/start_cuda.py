"""Where the time to the first token goes on a CUDA device, with what Triton has compiled on disk or without.

A process of its own for each measurement: the libraries, the file, the weights' way to the card, a prompt's first
token, and the three behind it, of which the second is recorded as a graph. Beside each part: kernels that were compiled
in it, and the seconds that compiling took. The last line of each is JSON.

    python bench/start_cuda.py FILE.gguf --empty 1 --full 2
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import json, sys, time
began, spent, kernels = float(sys.argv[2]), {}, []
last = began
def mark(name):
    global last
    now = time.time()
    done = [k for k in kernels if "part" not in k]
    for k in done:
        k["part"] = name
    spent[name] = {"s": round(now - last, 2), "compiled": len(done), "compiling_s": round(sum(k["s"] for k in done), 2)}
    print(f"  {name:24}{now - last:7.2f} s, {len(done):3d} kernels compiled in {spent[name]['compiling_s']:6.2f} s",
          flush=True)
    last = now
mark("interpreter")
from types import SimpleNamespace
from hybridkv.cli import compiler
from hybridkv.cli.collector import import_torch, pause_collector
if AHEAD := sys.argv[4] == "yes":
    compiler.start_early(SimpleNamespace(device="cuda"))
pause_collector()
import_torch()
import torch
mark("torch")
from pathlib import Path
import hybridkv.engine.engine, hybridkv.engine.load
from hybridkv.cache import KVTypes
from hybridkv.engine import Engine
from hybridkv.engine.describe import describe
from hybridkv.engine.load import load
from hybridkv.engine.steps import resolve_step
from hybridkv.model import kv_facts
from hybridkv.policy import Guard, Policy
from triton import knobs
def listen(*, src, metadata, times, cache_hit, **_):
    if not cache_hit:
        name = getattr(src, "name", None) or getattr(src, "fn", src).__name__
        kernels.append({"kernel": str(name), "s": times.total / 1e6})
knobs.compilation.listener = listen
mark("hybridkv")
torch.zeros(1, device="cuda")
mark("CUDA context")
description = describe(Path(sys.argv[1]))
mark("header")
specs = Policy(KVTypes(sys.argv[3], sys.argv[3])).resolve(kv_facts(description.facts))
opened = SimpleNamespace(device="cuda", device_type="cuda", weights="auto", backend="auto", hosted=frozenset())
opened.description, opened.n_ctx = description, 4096
ahead = compiler.compile_ahead(opened, specs) if AHEAD else None
mark("asked for kernels")
loaded = load(description, dtype=torch.float32, device="cuda", weights="auto")
mark("map")
step = resolve_step(description.config, "cuda", notify=print)(loaded.model)
torch.cuda.synchronize()
mark("upload")
engine = Engine(loaded.model, specs, n_ctx=4096, guard=Guard(), notify=print, step=step)
mark("engine")
from hybridkv.engine.caches import new_cache
cache = new_cache(loaded.model, specs, n_ctx=4096, guard=Guard(), notify=print)
tokens = torch.tensor([loaded.tokenizer.encode("The first words of a prompt of some length: hello world")])
logits = step.forward(tokens, cache, 0)
logits.cpu()
mark("prompt, first token")
FIRST = len(spent)
for name in ("second token", "third token, recorded", "fourth token"):
    position = tokens.shape[1] + len(spent) - FIRST
    step.forward(logits.argmax(-1, keepdim=True).cpu(), cache, position).cpu()
    mark(name)
if ahead is not None:
    done, n = ahead.progress
    print(f"  by other processes: {done} of {n} kernels, {ahead.seconds:.1f} s together")
kernels.sort(key=lambda k: -k["s"])
for k in kernels[:60]:
    print(f"    {k['s']:6.2f} s {k['kernel']} ({k['part']})")
print(json.dumps({"total_to_first": round(sum(v["s"] for k, v in list(spent.items())[:FIRST]), 2), "parts": spent}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--type", default="q8_0", help="of K and V")
    parser.add_argument("--empty", type=int, default=1, help="processes that find nothing compiled")
    parser.add_argument("--alone", action="store_true", help="no other processes compile")
    parser.add_argument("--full", type=int, default=2, help="processes that find all of it")
    a = parser.parse_args()
    for case in ["empty"] * a.empty + ["full"] * a.full:
        if case == "empty":
            kept = tempfile.TemporaryDirectory()
        print(f"{case}:", flush=True)
        environment = {**os.environ, "TRITON_CACHE_DIR": kept.name}
        command = [sys.executable, "-c", CHILD, str(a.file), str(time.time()), a.type, "no" if a.alone else "yes"]
        if (code := subprocess.run(command, check=False, env=environment).returncode) != 0:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
