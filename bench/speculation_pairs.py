"""What guesses cost where hardly any holds: blocks of tokens without and with them, in turn, in one process.

HYBRIDKV_ISA=avx2 python bench/speculation_pairs.py [-m FILE.gguf] [-t 2] [--texts random,held] [--spec ngram]
    [--pairs 24] [--block 48]

Two sequences of the same text are generated, one without guesses; each in turn goes on by a block, which of them is
first changing too. The figure is the median of the ratios of both times, with quartiles; `--spec none`, off against
off, says what the machine scatters. `random`: tokens drawn from all the vocabulary. `held`: held-out pages, token by
token. Both are put in place of what greedy sampling draws. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from hybridkv.cli.model_options import limit_spinning

limit_spinning()  # as the commands do, before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import hybridkv.engine.engine  # noqa: E402
from hybridkv.cache import KVTypes  # noqa: E402
from hybridkv.cli.spec_options import head_guesser  # noqa: E402
from hybridkv.engine import Engine, SamplingParams  # noqa: E402
from hybridkv.engine.load import Loaded, bundled_model, describe, load  # noqa: E402
from hybridkv.engine.sampling import Sampler, Steering  # noqa: E402
from hybridkv.engine.speculation import Speculation  # noqa: E402
from hybridkv.engine.steps import resolve_step  # noqa: E402
from hybridkv.kernels import cpu_native  # noqa: E402
from hybridkv.model import kv_facts, vocab_size_of  # noqa: E402
from hybridkv.policy import Guard, Policy  # noqa: E402
from hybridkv.runtime import Step  # noqa: E402
from hybridkv_lab.machine import machine  # noqa: E402

HELD = Path(__file__).parent.parent / "tests/data/heldout_excerpt.txt"
N_PROMPT = 256


class Forced(Sampler):
    """Draws greedily, and then gives a text's next token whatever was drawn: a text costs what a greedy one does."""

    text: ClassVar[list[int]]

    def __init__(self, params: SamplingParams, steering: Steering | None = None) -> None:
        super().__init__(params, steering)
        self._left = iter(self.text)

    def draw(self, logits: Tensor, histories: Any = ()) -> Tensor:
        """Return the next."""
        super().draw(logits, histories)
        return torch.tensor([next(self._left)])


def text_of(name: str, loaded: Loaded, n: int) -> list[int]:
    """Make a text of `n` tokens."""
    if name == "random":
        n_vocab = vocab_size_of(loaded.model.config)
        return torch.randint(3, n_vocab, (n,), generator=torch.Generator().manual_seed(1)).tolist()
    assert loaded.tokenizer is not None
    ids: list[int] = loaded.tokenizer(HELD.read_text()[:40000]).input_ids
    if len(ids) < n:
        sys.exit(f"the held-out text has {len(ids)} tokens, {n} are asked for; take fewer --pairs or a smaller --block")
    return ids[:n]


def seconds(tokens: Iterator[Any], n: int) -> float:
    """Take `n` tokens."""
    start = time.perf_counter()
    for _ in range(n):
        next(tokens)
    return time.perf_counter() - start


def count_seconds(step: Any) -> list[float]:
    """Have a step count what is spent in it, in the one number that is returned."""
    spent = [0.0]

    def counting(run: Any) -> Any:
        def counted(*given: Any) -> Any:
            start = time.perf_counter()
            answers = run(*given)
            spent[0] += time.perf_counter() - start
            return answers

        return counted

    step.forward, step.forward_drafts = counting(step.forward), counting(step.forward_drafts)
    return spent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-ctk", default="q8_0")
    parser.add_argument("-ctv", default="q8_0")
    parser.add_argument("--texts", default="random,held")
    parser.add_argument("--spec", choices=("none", "auto", "ngram", "mtp"), default="ngram")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--block", type=int, default=48)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    description = describe(a.model or bundled_model())
    loaded = load(description, dtype=torch.float32, device="cpu", weights="auto")
    make_step = resolve_step(description.config, "cpu")
    step, other = make_step(loaded.model), make_step(loaded.model)  # of each sequence its own: nothing is prepared anew
    spent = count_seconds(other), count_seconds(step)
    specs = Policy(KVTypes(a.ctk, a.ctv)).resolve(kv_facts(description.facts))
    n = a.block * (a.pairs + 1)

    def begin(text: list[int], step: Step, speculation: Speculation | None) -> tuple[Engine, Iterator[Any]]:
        engine = Engine(
            loaded.model, specs, n_ctx=len(text) + 1, guard=Guard(), notify=print, step=step, speculation=speculation
        )
        return engine, engine.generate(text[:N_PROMPT], SamplingParams(temp=0), n_predict=n)

    hybridkv.engine.engine.Sampler = Forced  # type: ignore[misc]
    rows = []
    print(f"{step.name}, {cpu_native.isa()}, --spec {a.spec}, -t {a.threads}, {a.ctk}/{a.ctv}, ", end="")
    print(f"{a.pairs} pairs of {a.block} tokens after {N_PROMPT}")
    for name in a.texts.split(","):
        text = text_of(name, loaded, N_PROMPT + n)
        Forced.text = text[N_PROMPT:]
        speculation = None if a.spec == "none" else Speculation()
        if speculation is not None and a.spec != "ngram":
            speculation.make_guesser = head_guesser(step, a.spec) or speculation.make_guesser
        # The engine makes its sampler; no parameter of one gives a text without taking longer than greedy text does.
        (plain, off), (guessing, on) = begin(text, other, None), begin(text, step, speculation)
        seconds(off, a.block)  # the guard's first checks, and buffers
        seconds(on, a.block)
        pairs, beside = [], []
        for i in range(a.pairs):
            both, own = [0.0, 0.0], [0.0, 0.0]
            for turn in ((0, 1), (1, 0))[i % 2]:
                spent[turn][0] = 0.0
                both[turn] = seconds((off, on)[turn], a.block)
                own[turn] = both[turn] - spent[turn][0]
            pairs.append((both[0], both[1]))
            beside.append(own[1] - own[0])
        assert torch.equal(plain.history, guessing.history)
        ratios = sorted(one / other for one, other in pairs)
        row = {
            "text": name,
            "off_ms": 1e3 * statistics.median(one for one, _ in pairs) / a.block,
            "on_ms": 1e3 * statistics.median(other for _, other in pairs) / a.block,
            "added_us": 1e6 * statistics.median(other - one for one, other in pairs) / a.block,
            "beside_us": 1e6 * statistics.median(beside) / a.block,
            "speed": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "guessed": guessing.timings.n_guessed,
            "right": guessing.timings.n_right,
        }
        rows.append(row)
        print(
            f"{name:8s} off {row['off_ms']:.3f} ms a token, on {row['on_ms']:.3f}; added {row['added_us']:.0f} us, "
            f"{row['beside_us']:.0f} of them beside the model's steps; "
            f"speed {row['speed']:.3f} ({row['quartiles'][0]:.3f} .. {row['quartiles'][1]:.3f}); "
            f"{row['right']} of {row['guessed']} guesses right"
        )
    conditions = {"machine": machine(a.threads), "threads": a.threads, "isa": cpu_native.isa(), "spec": a.spec}
    print(json.dumps({**conditions, "pairs": a.pairs, "block": a.block, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
