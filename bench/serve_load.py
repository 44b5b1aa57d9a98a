"""A server under load: many streaming clients, each reply checked against single-stream greedy. The last line is JSON.

python bench/serve_load.py --minutes 5 -o docs/measurements/serve-load.json

The expected replies are computed first, one sequence at a time and without stored prefixes, with prompts in the
server's pieces. The engine of `hybridkv run` takes larger ones, in another order of summation: how many of its replies
are the same is counted too. Then a server of its own process answers clients that send one request after another; some
leave in the middle of a stream. Clients and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx2
import torch
import transformers

from hybridkv.cache import KVTypes
from hybridkv.engine import Engine, Request, SamplingParams, Scheduler
from hybridkv.engine.load import bundled_model, bundled_text, describe, load
from hybridkv.model import kv_facts
from hybridkv.policy import Guard, Policy
from hybridkv_lab.machine import load as machine_load
from hybridkv_lab.machine import machine
from perplexity import commit

TYPE = "q4_0"
N_CTX = 1024
LENGTHS = (3, 17, 60, 130, 260, 520)
"""Tokens of the prompts; some begin alike, so that stored prefixes are used."""


@dataclass(frozen=True)
class Case:
    """A request and what single-stream greedy answers."""

    prompt: str
    max_tokens: int
    expected: str


@dataclass
class Seen:
    """What the clients saw."""

    first_s: list[float] = field(default_factory=list)
    next_s: list[float] = field(default_factory=list)
    n_right: int = 0
    n_left: int = 0
    n_retried: int = 0
    n_tokens: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    rss_bytes: list[tuple[float, int]] = field(default_factory=list)


def cases(n: int) -> tuple[list[Case], int]:
    """Greedy replies, one sequence at a time, and how many `hybridkv run`'s engine gives too."""
    loaded = load(describe(bundled_model()), dtype=torch.float32, device="cpu", weights="auto")
    assert loaded.tokenizer is not None
    specs = Policy(KVTypes(TYPE, TYPE)).resolve(kv_facts(loaded.description.facts))
    guard, greedy = Guard(mode="warn"), SamplingParams(temp=0)
    alone = Scheduler(loaded.model, specs, n_parallel=1, n_ctx=N_CTX, guard=guard, notify=print)
    text = bundled_text().read_text()
    encode, decode = loaded.tokenizer.encode, loaded.tokenizer.decode
    found, n_same = [], 0
    for index in range(n):
        length = LENGTHS[index % len(LENGTHS)]
        begin = 4000 * (index % 7)
        tail = f"\n\nNumber {index}:" if index >= len(LENGTHS) * 7 else ""
        prompt = decode(encode(text[begin : begin + 6 * length])[:length]) + tail
        ids = encode(prompt)
        max_tokens = 16 + 8 * (index % 5)
        handle = alone.submit(Request(tuple(ids), max_tokens, greedy, stop_ids=tuple(loaded.end_ids)))
        while alone.iterate():
            pass
        answered = [token for token in handle.token_ids[len(ids) :] if token not in loaded.end_ids]
        engine = Engine(loaded.model, specs, n_ctx=N_CTX, guard=guard, notify=print)
        run = [token for (token,) in engine.generate(ids, greedy, n_predict=max_tokens)]
        n_same += answered == list(takewhile(lambda token: token not in loaded.end_ids, run))
        found.append(Case(prompt, max_tokens, decode(ids + answered)[len(decode(ids)) :]))
    return found, n_same


async def client(http: httpx2.AsyncClient, cases: Sequence[Case], seen: Seen, rng: random.Random, end: float) -> None:
    """One client: request after request until the time is over."""
    while time.monotonic() < end:
        case = rng.choice(cases)
        leaves = rng.random() < 0.05
        body = {"prompt": case.prompt, "max_tokens": case.max_tokens, "temperature": 0, "stream": True}
        start = last = time.perf_counter()
        answered, n_chunks, whole = "", 0, False
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 429:
                seen.n_retried += 1
                await asyncio.sleep(int(response.headers["Retry-After"]))
                continue
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    whole = True
                    break
                text = json.loads(line[6:])["choices"][0]["text"]
                if not text:
                    continue
                now = time.perf_counter()
                (seen.next_s if n_chunks else seen.first_s).append(now - last)
                last, n_chunks, answered = now, n_chunks + 1, answered + text
                if leaves and n_chunks == 3:
                    break
        seen.n_tokens += n_chunks
        if leaves and not whole:
            seen.n_left += 1
            if not case.expected.startswith(answered):
                seen.wrong.append({"prompt": case.prompt[-80:], "expected": case.expected, "said": answered})
        elif whole and answered == case.expected:
            seen.n_right += 1
        else:
            seen.wrong.append(
                {"prompt": case.prompt[-80:], "expected": case.expected, "said": answered, "s": last - start}
            )


async def watch(pid: int, seen: Seen, start: float, end: float) -> None:
    """The server's resident memory, every second."""
    while time.monotonic() < end:
        status = Path(f"/proc/{pid}/status").read_text()
        kib = re.search(r"VmRSS:\s+(\d+)", status)
        assert kib
        if len(seen.rss_bytes) % 10 == 0:
            print(f"{seen.n_right} right, {len(seen.wrong)} wrong, {seen.n_left} left", file=sys.stderr)
        seen.rss_bytes.append((time.monotonic() - start, int(kib[1]) * 1024))
        await asyncio.sleep(1)


async def attack(url: str, pid: int, cases: Sequence[Case], n_clients: int, seconds: float) -> tuple[Seen, str, float]:
    """All clients at once; what they saw, the server's own counts, and seconds until the last had its reply."""
    seen = Seen()
    limits = httpx2.Limits(max_connections=n_clients + 2)
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        start = time.monotonic()
        end = start + seconds
        clients = [client(http, cases, seen, random.Random(number), end) for number in range(n_clients)]
        await asyncio.gather(watch(pid, seen, start, end), *clients)
        took = time.monotonic() - start
        metrics = (await http.get("/metrics")).text
    return seen, metrics, took


def start_server(options: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    """A server, and where it is."""
    words = ["serve", "--port", "0", "-c", str(N_CTX), "-np", str(options.parallel), "-t", str(options.threads)]
    words += ["-ctk", TYPE, "-ctv", TYPE, "--kv-guard", "warn", "--max-waiting", "128", "--prefix-memory", "64MiB"]
    with tempfile.NamedTemporaryFile() as log:  # a pipe that nobody reads would stop the server one day
        process = subprocess.Popen([sys.executable, "-m", "hybridkv.cli", *words], stderr=log.fileno())
        while process.poll() is None:
            if found := re.search(r" at (http://\S+)\n", Path(log.name).read_text()):
                return process, found[1]
            time.sleep(0.1)
        raise SystemExit(Path(log.name).read_text())


def figures(seen: Seen, metrics: str, took: float) -> dict[str, Any]:
    """What is reported; milliseconds and bytes."""

    def percentiles(values: list[float]) -> dict[str, float]:
        cuts = statistics.quantiles(values, n=100)
        return {"p50_ms": 1e3 * cuts[49], "p99_ms": 1e3 * cuts[98], "max_ms": 1e3 * max(values)}

    def count(name: str) -> float:
        found = re.search(rf"^hybridkv_{name} (\S+)", metrics, re.MULTILINE)
        assert found, name
        return float(found[1])

    # After a third of the time everything that is kept has been filled: from then on memory has to be flat.
    settled = [rss for at, rss in seen.rss_bytes if at > took / 3]
    half = len(settled) // 2
    return {
        "seconds": took,
        "right": seen.n_right,
        "wrong": len(seen.wrong),
        "left_early": seen.n_left,
        "told_to_retry": seen.n_retried,
        "first_token": percentiles(seen.first_s),
        "next_token": percentiles(seen.next_s),
        "client_tokens_s": seen.n_tokens / took,
        "generated_tokens": count("generated_tokens_total"),
        "prompt_tokens_processed": count("prompt_tokens_total"),
        "prompt_tokens_from_prefixes": count("cached_tokens_total"),
        "cancelled": count("cancelled_total"),
        "failed": count("failed_total"),
        "still_running": count("running") + count("waiting"),
        "rss_bytes": {
            "first_s": seen.rss_bytes[0][1],
            "after_a_third": settled[0],
            "end": settled[-1],
            "largest": max(rss for _, rss in seen.rss_bytes),
            "median_second_half_less_first": statistics.median(settled[half:]) - statistics.median(settled[:half]),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("-np", "--parallel", type=int, default=8)
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cases", type=int, default=56)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    expected, n_as_run = cases(options.cases)
    load_before = machine_load()
    print(f"{len(expected)} replies computed; starting the server", file=sys.stderr)
    process, url = start_server(options)
    try:
        seen, metrics, took = asyncio.run(attack(url, process.pid, expected, options.clients, 60 * options.minutes))
    finally:
        process.terminate()
        code = process.wait(60)
    for reply in seen.wrong[:5]:
        print(f"WRONG {json.dumps(reply)}")
    result = {
        "command": f"python bench/serve_load.py {' '.join(sys.argv[1:])}",
        "model": describe(bundled_model()).name,
        "types": TYPE,
        "n_ctx": N_CTX,
        "parallel": options.parallel,
        "clients": options.clients,
        "cases": options.cases,
        "cases_as_run": n_as_run,
        **machine(options.threads),
        "load_before": load_before,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "commit": commit(),
        "server_exit_code": code,
        **figures(seen, metrics, took),
    }
    for name in ("seconds", "right", "wrong", "left_early", "told_to_retry", "first_token", "next_token", "rss_bytes"):
        print(f"{name}: {result[name]}")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 1 if seen.wrong or code else 0


if __name__ == "__main__":
    sys.exit(main())
