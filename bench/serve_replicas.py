"""Tokens/s of one server process beside replicas on Ray Serve, on the cores of one machine.

python bench/serve_replicas.py                 # the bundled model; needs hybridkv[ray] and the openai client

Every variant has all cores: one process with as many threads, or that many replicas of one thread. Clients ask at once,
each for its own conversation of several turns, each turn a prompt that goes on from the one before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import version

import openai

from hybridkv_lab.machine import cpu_model

TURNS = 3


def start(options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A server and its address."""
    words = [sys.executable, "-m", "hybridkv.cli", "serve", "--port", "0", "-c", "2048", "-ctk", "q8_0", "-ctv", "q8_0"]
    process = subprocess.Popen([*words, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"^\S+ at (http://[^, ]+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, found[1].rstrip()
    raise SystemExit("the server did not start")


def converse(url: str, number: int, n_tokens: int, first_s: list[float]) -> None:
    """One client's conversation, streamed."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    text = f"Conversation {number}: what follows explains how a server is configured, step by step. " * 6
    for _ in range(TURNS):
        begun, pieces = time.perf_counter(), []
        for chunk in client.completions.create(
            model="reference-hybrid-29m",
            prompt=text,
            max_tokens=n_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            if not pieces:
                first_s.append(time.perf_counter() - begun)
            pieces.append(chunk.choices[0].text)
        text += "".join(pieces) + " And then? "


def measure(url: str, n_clients: int, n_tokens: int) -> dict[str, float]:
    """All clients at once."""
    first_s: list[float] = []
    begun = time.perf_counter()
    threads = [threading.Thread(target=converse, args=(url, number, n_tokens, first_s)) for number in range(n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    return {"tok_s": TURNS * n_clients * n_tokens / seconds, "first_ms": 1e3 * statistics.median(first_s)}


def main() -> None:
    """Each variant with one client and with many; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    cores = os.cpu_count() or 1
    variants = {
        f"one process, {cores} threads": ["-t", str(cores), "-np", "8"],
        f"{cores} replicas of 1 thread": ["--ray", "--replicas", str(cores), "-t", "1", "-np", "8"],
        f"1 replica of {cores} threads": ["--ray", "--replicas", "1", "-t", str(cores), "-np", "8"],
    }
    found = []
    for name, options in variants.items():
        process, url = start(options)
        for n_clients in (1, a.clients):
            measure(url, n_clients, 8)
            rounds = [measure(url, n_clients, a.n) for _ in range(a.rounds)]
            row = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
            found.append({"variant": name, "clients": n_clients, **row})
            print(f"{name:28} {n_clients:3} clients {row['tok_s']:8.1f} tokens/s, first after {row['first_ms']:.0f} ms")
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    told = {"cpu": cpu_model(), "cores": cores, "ray": version("ray"), "hybridkv": version("hybridkv")}
    print(json.dumps({**told, "tokens": a.n, "turns": TURNS, "rounds": a.rounds, "rows": found}))


if __name__ == "__main__":
    main()
