"""Hybrid families side by side with llama.cpp on the same GGUF files: answers first, then speed.

A file is random weights in the geometry of a released model (`families_models.py`), written by `hybridkv convert`;
Q4_K_M is rounded from it by llama.cpp's own quantizer. For each pair of cache types, in one process and in turns: the
logits after every token of a text of 48 random tokens, of both backends and of Transformers in float32 on the decoded
file with a float32 cache; perplexity of those tokens; 16 greedy tokens; a prompt of 512; generation at each depth. A
depth beyond the prompt is reached by repeating its K and V rows in both backends. Families without a GGUF architecture
run here alone.

    python bench/families.py make lfm2 DIR
    python bench/families.py run lfm2 DIR --weights q8_0 --out OUT.jsonl

`docs/generate.py` makes the table of docs/performance.md of the lines in docs/measurements/families.jsonl.

To compare with a build for plain AVX2, build llama.cpp so (-DGGML_NATIVE=OFF -DGGML_AVX512=OFF) and set
HYBRIDKV_ISA=avx2; the build that is found is written into every line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridkv.cli.model_options import limit_spinning

limit_spinning()  # as the commands do, before torch is imported; llama.cpp's threads lose nothing by it

import numpy as np  # noqa: E402
import torch  # noqa: E402

import llama_peer  # noqa: E402
from families_models import GEOMETRIES, write_directory  # noqa: E402
from hybridkv.cache import KVTypes  # noqa: E402
from hybridkv.engine.convert import convert  # noqa: E402
from hybridkv.engine.describe import Description, describe  # noqa: E402
from hybridkv.engine.load import load  # noqa: E402
from hybridkv.engine.steps import resolve_step  # noqa: E402
from hybridkv.hf import EagerStep, ModelCache  # noqa: E402
from hybridkv.kernels import cpu_native  # noqa: E402
from hybridkv.model import kv_facts  # noqa: E402
from hybridkv.policy import Guard, Policy  # noqa: E402
from hybridkv_lab.decode_bench import OurRunner, Plan  # noqa: E402
from hybridkv_lab.timing import spread  # noqa: E402

N_TEXT, N_GREEDY, N_PROMPT = 48, 16, 512
PAUSE_S = 0.02  # idle threads of another library go on spinning for a while


def make(family: str, directory: Path) -> None:
    """Write a directory and, of families that files hold, q8_0 and Q4_K_M files; keep what `run` needs."""
    n = write_directory(family, directory / family)
    print(f"{family}: {n / 1e6:.0f} million parameters", flush=True)
    (directory / f"{family}.params").write_text(str(n))
    if not GEOMETRIES[family].in_gguf:
        return
    convert(directory / family, directory / f"{family}-q8_0.gguf", weights="q8_0", tokenizer="omitted")
    floats = convert(directory / family, directory / f"{family}-f16.gguf", weights="f16", tokenizer="omitted").path
    shutil.rmtree(directory / family)
    llama_peer.start()
    llama_peer.quantize(floats, directory / f"{family}-q4_k_m.gguf")
    floats.unlink()


def ids(n: int, n_vocab: int, seed: int) -> list[int]:
    """Random tokens."""
    drawn: list[int] = torch.randint(3, n_vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


def exact_logits(description: Description, text: Sequence[int], path: Path) -> np.ndarray[Any, Any]:
    """Transformers' logits in float32 on the decoded weights, with a float32 cache; kept in a file for next time."""
    if path.exists():
        kept: np.ndarray[Any, Any] = np.load(path)
        return kept
    loaded = load(description, dtype=torch.float32, device="cpu", weights="plain", backend="eager")
    specs = Policy(KVTypes("f32", "f32")).resolve(kv_facts(description.facts))
    cache = ModelCache(loaded.model.config, specs, guard=Guard(mode="off"))
    with torch.inference_mode():
        logits = EagerStep(loaded.model).logits(torch.tensor([list(text)]), cache, 0)[0].numpy()
    np.save(path, logits)
    return logits


def apart(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> float:
    """Root mean square of the difference over the second one's spread."""
    return float(np.sqrt(np.mean((one - two) ** 2)) / two.std())


def perplexity(logits: np.ndarray[Any, Any], text: Sequence[int]) -> float:
    """Of a text's tokens after its first, given logits after each."""
    scores = torch.log_softmax(torch.from_numpy(logits[:-1]).double(), dim=-1)
    return float(torch.exp(-scores[torch.arange(len(text) - 1), torch.tensor(text[1:])].mean()))


def our_logits(runner: OurRunner, text: Sequence[int]) -> np.ndarray[Any, Any]:
    """Our logits after every token of a text."""
    cache = runner._engine.new_cache(runner._engine.cache.specs)
    with torch.inference_mode():
        found: np.ndarray[Any, Any] = runner._engine.step.logits(torch.tensor([list(text)]), cache, 0)[0].numpy()
    return found


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns, each after a pause."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(PAUSE_S)
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def greedy(runner: Any, n: int, first: int) -> list[int]:
    """Greedy tokens after one."""
    tokens = [first]
    for _ in range(n):
        tokens.append(int(runner.advance(tokens[-1:]).argmax()))
    return tokens[1:]


def run(family: str, directory: Path, weights: str, a: argparse.Namespace) -> None:
    """Measure one file; a line for every pair of cache types, written as it is found."""
    geometry = GEOMETRIES[family]
    path = directory / (f"{family}-{weights}.gguf" if geometry.in_gguf else family)
    torch.set_num_threads(a.threads)
    description = describe(path)
    n_vocab = int(description.config.get_text_config(decoder=True).vocab_size)
    text = ids(N_TEXT, n_vocab, 1)
    exact = exact_logits(description, text, directory / f"{family}-{weights}.npy")
    if a.exact_only:
        return
    how: Any = "auto" if geometry.in_gguf else {"q8_0": "int8", "q4_0": "int4"}[weights]
    loaded = load(description, dtype=torch.float32, device="cpu", weights=how, backend="native")
    step = resolve_step(description.config, "cpu", "native")(loaded.model)
    peer = None
    if geometry.in_gguf:
        llama_peer.start()
        peer = llama_peer.LlamaModel(path)
    depths = tuple(map(int, a.depths.split(",")))
    plan = Plan(tuple(a.types.split(",")), depths, N_PROMPT, a.steps, a.threads, "native", profile=True)  # more room
    for kv_type in plan.types:
        runners: dict[str, Any] = {"hybridkv": OurRunner(loaded, step, plan, kv_type)}
        line: dict[str, Any] = {
            "family": family,
            "of": geometry.of,
            "cut": geometry.cut,
            "parameters": int((directory / f"{family}.params").read_text()),
            "weights": weights,
            "kv": kv_type,
            "backend": step.name,
            "isa": cpu_native.isa(),
            "peer": llama_peer.build() if peer else None,
            "threads": a.threads,
            "machine": a.machine,
            "commit": a.commit,
        }
        got = {"hybridkv": our_logits(runners["hybridkv"], text)}
        if peer is not None:
            context = runners["llama.cpp"] = llama_peer.LlamaContext(
                peer, kv_type, n_ctx=plan.n_ctx, n_threads=a.threads
            )
            got["llama.cpp"] = context.every(text)
            line["apart"] = apart(got["hybridkv"], got["llama.cpp"])
        line["from_exact"] = {name: apart(logits, exact) for name, logits in got.items()}
        line["perplexity"] = {name: perplexity(logits, text) for name, logits in {**got, "exact": exact}.items()}
        line["same_choice"] = {name: int((logits.argmax(-1) == exact.argmax(-1)).sum()) for name, logits in got.items()}
        for runner in runners.values():
            runner.reset()
            runner.advance(text)
        chosen = [greedy(runner, N_GREEDY, 3) for runner in runners.values()]
        line["greedy_agreed"] = [*(len({*each}) == 1 for each in zip(*chosen, strict=True)), False].index(False)
        if not a.check_only:
            line |= speeds(runners, plan, n_vocab)
        if isinstance(runners["hybridkv"], OurRunner):
            line["notices"] = runners["hybridkv"].notices
            line["profile"] = runners["hybridkv"].profile(8) if a.profile else None
        if peer is not None:
            runners["llama.cpp"].close()
        print(json.dumps(line), flush=True)
        if a.out:
            with Path(a.out).open("a") as file:
                file.write(json.dumps(line) + "\n")


def speeds(runners: dict[str, Any], plan: Plan, n_vocab: int) -> dict[str, Any]:
    """Prompt and generation: median milliseconds by runner, and llama.cpp's over ours."""
    prompt = ids(N_PROMPT, n_vocab, 2)

    def whole(runner: Any) -> Callable[[], object]:
        def call() -> None:
            runner.reset()
            runner.advance(prompt)

        return call

    found: dict[str, Any] = {}
    seconds = in_turns({name: whole(runner) for name, runner in runners.items()}, 3)
    found["prompt"] = _speed({name: spread(s).median_ms for name, s in seconds.items()}, N_PROMPT)
    for depth in sorted(plan.depths, reverse=True):
        for runner in runners.values():
            runner.reset()
            if depth:
                runner.advance(prompt)
                runner.deepen(depth)
            else:
                runner.advance([3])
            runner.advance([3])
        steps: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(4):
            for name, runner in runners.items():
                time.sleep(PAUSE_S)
                for n_done in range(plan.n_steps // 4 + 1):
                    begin = time.perf_counter()
                    runner.advance([3 + n_done])
                    if n_done:
                        steps[name].append(time.perf_counter() - begin)
        found[f"depth {depth}"] = _speed({name: spread(s).median_ms for name, s in steps.items()}, 1)
    return found


def _speed(ms: dict[str, float], n_tokens: int) -> dict[str, Any]:
    speed: dict[str, Any] = {"tok_s": {name: 1e3 * n_tokens / each for name, each in ms.items()}}
    if "llama.cpp" in ms:
        speed["ratio"] = ms["llama.cpp"] / ms["hybridkv"]
    return speed


def eager(family: str, directory: Path, weights: str, a: argparse.Namespace) -> None:
    """Our own eager step at depth 0, plain float32 weights: a line."""
    path = directory / (f"{family}-{weights}.gguf" if GEOMETRIES[family].in_gguf else family)
    torch.set_num_threads(a.threads)
    description = describe(path)
    loaded = load(description, dtype=torch.float32, device="cpu", weights="plain", backend="eager")
    plan = Plan(("q8_0",), (0,), N_PROMPT, a.steps, a.threads, "eager")
    runner = OurRunner(loaded, EagerStep(loaded.model), plan, "q8_0")
    runner.advance([3])
    seconds = in_turns({"eager": lambda: runner.advance([5])}, 12)["eager"][2:]
    line = {"family": family, "weights": "f32", "eager_tok_s": 1e3 / spread(seconds).median_ms}
    print(json.dumps(line), flush=True)
    if a.out:
        with Path(a.out).open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    """Make, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run", "eager"))
    parser.add_argument("family", help="of families_models.py")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--weights", default="q8_0", help="q8_0 or q4_k_m; q8_0 or q4_0 of a directory")
    parser.add_argument("--types", default="q8_0,q4_0")
    parser.add_argument("--depths", default="0,32768")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--out", help="append JSON lines here")
    parser.add_argument("--machine", default=os.uname().machine)
    parser.add_argument("--commit", default="")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--check-only", action="store_true", help="compare answers, time nothing")
    parser.add_argument("--exact-only", action="store_true", help="compute Transformers' logits, for a later run")
    a = parser.parse_args()
    if a.what == "make":
        a.directory.mkdir(parents=True, exist_ok=True)
        return make(a.family, a.directory)
    return (run if a.what == "run" else eager)(a.family, a.directory, a.weights, a)


if __name__ == "__main__":
    main()
