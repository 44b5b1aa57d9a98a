"""What the scheduler gives: tokens/s of one and of several sequences, and the prompt tokens of a conversation.

    python bench/serve_engine.py --threads 2 --out docs/measurements/serve_engine.json

Correctness comes first: every reply is compared with that of a scheduler which has one sequence and no stored prefixes.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

from hybridkv.cli.model_options import limit_spinning

limit_spinning()  # as the commands do, before torch is imported

import torch  # noqa: E402
import transformers  # noqa: E402

from hybridkv import __version__  # noqa: E402
from hybridkv.cache import KVTypes  # noqa: E402
from hybridkv.engine import Request, SamplingParams, Scheduler  # noqa: E402
from hybridkv.engine.load import Loaded, bundled_model, bundled_text, describe, load  # noqa: E402
from hybridkv.engine.model_context import freeze_gc  # noqa: E402
from hybridkv.model import kv_facts  # noqa: E402
from hybridkv.native import NativeStep  # noqa: E402
from hybridkv.policy import Guard, Policy  # noqa: E402
from perplexity import commit, cpu_name  # noqa: E402

GREEDY = SamplingParams(temp=0)
TYPES = KVTypes("q8_0", "q8_0")


def scheduler(loaded: Loaded, **options: Any) -> Scheduler:
    specs = Policy(TYPES).resolve(kv_facts(loaded.description.facts))
    settings: dict[str, Any] = {"n_parallel": 1, "n_ctx": 16384, "guard": Guard(), "notify": print, **options}
    return Scheduler(loaded.model, specs, **settings)


def reply(run: Scheduler, ids: tuple[int, ...], n_new: int) -> tuple[tuple[int, ...], int]:
    """Generated tokens, and how many of the prompt were processed."""
    handle = run.submit(Request(ids, n_new, GREEDY))
    while run.iterate():
        pass
    return handle.token_ids[len(ids) :], handle.usage.prompt_tokens - handle.usage.cached_tokens


def decoding(loaded: Loaded, step: NativeStep, prompts: list[tuple[int, ...]], n_new: int) -> tuple[float, float, list]:
    """Wall and processor seconds from the moment that all decode to the end, per token; the replies."""
    run = scheduler(loaded, n_parallel=len(prompts), step=step)
    handles = [run.submit(Request(ids, n_new, GREEDY)) for ids in prompts]
    while not all(t.usage.generated_tokens for t in handles):
        run.iterate()
    before, wall, cpu = run.stats().generated_tokens, time.perf_counter(), time.process_time()
    while run.iterate():
        pass
    count = run.stats().generated_tokens - before
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / count, cpu / count, [t.token_ids[len(t.request.prompt_ids) :] for t in handles]


def throughput(loaded: Loaded, text: list[int], depth: int, repeats: int) -> list[dict[str, float]]:
    """One sequence and several in turn, so that a busy machine is busy for both."""
    step = NativeStep(loaded.model)
    freeze_gc()  # as the server does
    prompts = [tuple(text[i * depth : (i + 1) * depth]) for i in range(8)]
    alone = [decoding(loaded, step, [ids], 64)[2][0] for ids in prompts]
    times: dict[int, list[tuple[float, float]]] = {n: [] for n in (1, 2, 4, 8)}
    for _ in range(repeats):
        for n in times:
            wall, cpu, replies = decoding(loaded, step, prompts[:n], 64)
            assert replies == alone[:n], "a reply differs from that of the sequence alone"
            times[n].append((wall, cpu))
    rows = []
    for n, pairs in times.items():
        ratios = [one[0] / many[0] for one, many in zip(times[1], pairs, strict=True)]
        wall = [1 / w for w, _ in pairs]
        rows.append(
            {
                "n_seqs": n,
                "tok_s": median(wall),
                "tok_s_min": min(wall),
                "tok_s_max": max(wall),
                "times_one": median(ratios),
                "cpu_ms_per_token": 1000 * median(c for _, c in pairs),
            }
        )
    return rows


def conversation(loaded: Loaded, text: list[int], begin: int, question: int, answer: int) -> dict[str, Any]:
    """Ten turns, with stored prefixes and starting over: prompt tokens processed, and whether replies are the same."""
    run, over = scheduler(loaded, prefix_bytes=1 << 30), scheduler(loaded)
    ids, offset = tuple(text[:begin]), begin
    processed = total = same = 0
    for _ in range(10):
        ids, offset = (*ids, *text[offset : offset + question]), offset + question
        got, new = reply(run, ids, answer)
        expected, all_of_it = reply(over, ids, answer)
        processed, total, same = processed + new, total + all_of_it, same + (got == expected)
        ids = (*ids, *got)
    return {
        "begin": begin,
        "question": question,
        "answer": answer,
        "end": len(ids),
        "processed": processed,
        "starting_over": total,
        "share": processed / total,
        "same_replies": same,
        "prefix_bytes": run.stats().prefix_bytes,
        "checkpoints": run.stats().prefix_checkpoints,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=bundled_model())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=128, help="prompt tokens of each sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default="throughput,conversation")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    loaded = load(describe(a.model), dtype=torch.float32, device="cpu", weights="auto")
    text = [i % 1000 + 3 for i in range(20_000)]  # for a model of random weights, which has no tokenizer
    if loaded.tokenizer is not None:
        text = loaded.tokenizer.encode(bundled_text().read_text()[:120_000])
    result: dict[str, Any] = {
        "hybridkv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "model": loaded.description.name,
        "types": TYPES.label,
        "commit": commit(),
        "cpu": cpu_name(),
        "step": NativeStep(loaded.model).name,
        "threads": a.threads,
        "depth": a.depth,
        "load": os.getloadavg()[0],
    }
    if "throughput" in a.parts:
        result["throughput"] = throughput(loaded, text, a.depth, a.repeats)
        for row in result["throughput"]:
            print({k: round(v, 3) for k, v in row.items()})
    if "conversation" in a.parts:
        result["conversations"] = [
            conversation(loaded, text, 7000, 50, 50),
            conversation(loaded, text, 0, 600, 200),
        ]
        for row in result["conversations"]:
            print(row)
    if a.out is not None:
        a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
