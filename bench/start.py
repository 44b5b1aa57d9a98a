"""How long a start takes: `hybridkv run -n 1` from an empty process to its end, and where the time goes.

python bench/start.py FILE.gguf [-t 2] [-n 3]

The file should be in the page cache. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hybridkv_lab.machine import machine

CHILD = """
import json, sys, time
spent, last = {}, time.perf_counter()
def mark(name):
    global last
    now = time.perf_counter()
    spent[name], last = spent.get(name, 0) + now - last, now
from hybridkv.cli.collector import import_torch, pause_collector
pause_collector()
import_torch()
mark("torch")
from pathlib import Path
import hybridkv.engine.engine, hybridkv.engine.load
from hybridkv.cache import KVTypes
from hybridkv.engine import Engine
from hybridkv.engine.steps import resolve_step
from hybridkv.gguf.mapped import map_gguf
from hybridkv.gguf.split import read_model
from hybridkv.model import kv_facts, layer_facts
from hybridkv.native import native_model
from hybridkv.policy import Guard, Policy
import torch
torch.set_num_threads(int(sys.argv[2]))
mark("hybridkv")
header = read_model(Path(sys.argv[1]))
mark("header")
mapped = map_gguf(header)
mark("checks, tokenizer, map")
model = native_model(mapped.config, mapped.source, "auto", mapped.end_ids)
specs = Policy(KVTypes("q4_0", "q4_0", rotate_k=True, rotate_v=True)).resolve(kv_facts(layer_facts(mapped.config)))
engine = Engine(model, specs, n_ctx=4096, guard=Guard(), notify=print, step=resolve_step(mapped.config, "cpu")(model))
mark("operations")
engine.prefill(mapped.tokenizer.encode("Hello world"))
mark("prompt")
print(json.dumps(spent))
"""


def timed(command: list[str]) -> dict[str, float]:
    """Wall, user and system time of a process, and its peak resident memory in bytes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr)
    return {"wall_s": wall, "user_s": after.ru_utime - before.ru_utime, "system_s": after.ru_stime - before.ru_stime}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-n", "--repeats", type=int, default=3)
    a = parser.parse_args()
    own = [sys.executable, "-m", "hybridkv.cli"]
    cache = ["-ctk", "q4_0", "-ctv", "q4_0"]
    rotated = [*cache, "-khad", "-vhad"]
    commands = {
        "run -n 1": [*own, "run", "-m", str(a.file), "-p", "Hello world", "-n", "1", *rotated, "-t", str(a.threads)],
        "plan": [*own, "plan", "-m", str(a.file), *cache],
        "--help": [*own, "--help"],
    }
    found = {}
    for name, command in commands.items():
        runs = [timed(command) for _ in range(a.repeats)]
        found[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"{name:10} {found[name]['wall_s']:.2f} s, {found[name]['user_s']:.2f} user, "
            f"{found[name]['system_s']:.2f} system"
        )
    child = [sys.executable, "-c", CHILD, str(a.file), str(a.threads)]
    outputs = [subprocess.run(child, capture_output=True, text=True, check=True).stdout for _ in range(a.repeats)]
    splits = [json.loads(output.splitlines()[-1]) for output in outputs]
    split = {name: statistics.median(each[name] for each in splits) for name in splits[0]}
    print("of it: " + ", ".join(f"{name} {spent:.2f} s" for name, spent in split.items()))
    print(json.dumps({"file": a.file.name, "machine": machine(a.threads), "commands": found, "split": split}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
