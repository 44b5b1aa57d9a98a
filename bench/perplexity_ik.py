"""Perplexity by cache type, ours beside ik_llama.cpp's on the same GGUF and the same tokens.

    python bench/perplexity_ik.py

Each window of the text is processed in chunks of 512 by both, with flash attention there and the resolved kernels here.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console

from hybridkv.cli.show import simple_table
from hybridkv.engine.load import bundled_model, describe, load
from hybridkv_lab.peers import ik_library
from hybridkv_lab.peers.ik_model import ik_context, ik_model
from perplexity import CHUNK, TEXT, Score, commit, cpu_name, log_probs, parse

LABELS = ("f16", "q8_0", "q8_0+kv", "q6_0", "q6_0+kv", "q4_0", "q4_0+k", "q4_0+kv")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, default=bundled_model())
    parser.add_argument("-f", "--file", type=Path, default=TEXT)
    parser.add_argument("-c", "--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("-t", "--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    measured = commit()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    loaded = load(describe(arguments.model), dtype=torch.float32, device="cpu", weights="auto")
    assert loaded.tokenizer is not None
    n_ctx, n_windows = arguments.context, arguments.windows
    ids = loaded.tokenizer.encode(arguments.file.read_text()[: 8 * n_ctx * n_windows])[: n_ctx * n_windows + 1]
    assert len(ids) == n_ctx * n_windows + 1, len(ids)
    ours, theirs = ({label: Score() for label in LABELS} for _ in "ab")
    with ik_model(arguments.model) as handle:
        for label in LABELS:
            kv_type, _, rotated = label.partition("+")
            with ik_context(handle, kv_type, n_ctx=n_ctx, n_threads=arguments.threads, rotated=rotated) as ik:
                for window in range(n_windows):
                    part = ids[window * n_ctx : (window + 1) * n_ctx + 1]
                    targets = torch.tensor(part[1:])
                    ik.reset()
                    for i, logits in enumerate(ik.scores(part[:-1], CHUNK)):
                        scored = torch.log_softmax(torch.from_numpy(logits), -1)
                        theirs[label].add(scored, scored, targets[i * CHUNK :][: len(scored)])
                    for i, scored in enumerate(log_probs(loaded, parse(label), torch.tensor([part[:-1]]), n_ctx)):
                        ours[label].add(scored, scored, targets[i * CHUNK :][: len(scored)])
            print(label, file=sys.stderr, flush=True)
    table = simple_table("type", "hybridkv", "ik_llama.cpp", "change", left=("type",))
    rows = []
    for label in LABELS:
        mine, other = (math.exp(s[label].nll / s[label].n) for s in (ours, theirs))
        rows.append({"type": label, "hybridkv": mine, "ik": other})
        table.add_row(label, f"{mine:.4f}", f"{other:.4f}", f"{100 * (mine / other - 1):+.3f} %")
    Console(width=120).print(table)
    conditions = {
        "model": loaded.description.name,
        "text": arguments.file.name,
        "context": n_ctx,
        "tokens": n_ctx * n_windows,
        "ik": ik_library.find().about,
        "cpu": cpu_name(),
        "commit": measured,
    }
    print(json.dumps({"conditions": conditions, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
