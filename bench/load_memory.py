"""What loading a GGUF file takes: peak resident memory beside the weights that stay. The last line is JSON.

python bench/load_memory.py [FILE.gguf] [--dtype bf16]

The limit is the final weights, the largest tensor as the file stores it, and 64 MiB for the code that runs and one
decoded chunk. Fails if the peak is above it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from hybridkv.engine.load import bundled_model
from hybridkv.gguf.split import read_model

CONSTANT_BYTES = 64 << 20

# Everything is imported, and torch has run once, before the loading that counts. `clear_refs` resets the peak.
CHILD = """
import ctypes, gc, json, re, sys, time
from pathlib import Path
import torch
from hybridkv.engine.load import bundled_model
from hybridkv.gguf.load import load_gguf

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[sys.argv[2]]
load_gguf(bundled_model(), dtype=dtype)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
start = time.perf_counter()
model = load_gguf(sys.argv[1], dtype=dtype).model
seconds = time.perf_counter() - start
weights = sum(weight.nbytes for weight in {id(w): w for w in model.parameters()}.values())
print(json.dumps({"before": before, "peak": resident("VmHWM"), "weights": weights, "seconds": seconds}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=bundled_model())
    parser.add_argument("--dtype", default="bf16", choices=("f32", "bf16", "f16"))
    arguments = parser.parse_args()
    command = [sys.executable, "-c", CHILD, str(arguments.file), arguments.dtype]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    largest = max(info.nbytes for info in read_model(arguments.file).tensors)
    taken, limit = found["peak"] - found["before"], found["weights"] + largest + CONSTANT_BYTES
    mib = {name: value / 2**20 for name, value in (("weights", found["weights"]), ("largest", largest))}
    print(f"{arguments.file.name} as {arguments.dtype}, {found['seconds']:.1f} s")
    print(f"final weights {mib['weights']:.1f} MiB, largest tensor {mib['largest']:.1f} MiB")
    print(f"taken at the peak {taken / 2**20:.1f} MiB, limit {limit / 2**20:.1f} MiB")
    print(json.dumps({"file": arguments.file.name, "dtype": arguments.dtype, "taken_bytes": taken, **found}))
    return 0 if taken <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
