"""Whole steps with packed weights on one CUDA device: decode, prompts, memory, and what a step's kernels take.

Random blocks of ggml's types at the geometries of step_cuda.py, in the mix that llama.cpp's Q4_K_M has, or of one type;
35B-A3B has all 40 layers here. The floor of a decode step is its bytes, packed weights and rows and states once each,
over the copy bandwidth measured here. Figures come only after the check: logits of small models in the same mixes
against Transformers' forward pass in float32 on the decoded weights.

    python bench/packed_cuda.py --out packed.jsonl
    python bench/packed_cuda.py --parts check,decode --models 4b:q4_k_m --types q8_0 --depths 4096
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.errors import HybridKVError
from hybridkv.formats.weights import WEIGHTS, WeightFormat
from hybridkv.hf import EagerStep
from hybridkv.hf import ModelCache as HfCache
from hybridkv.hf.step.graph import GraphStep
from hybridkv.kernels.weights import Weight
from hybridkv.model import graph_of, kv_facts, layer_facts
from hybridkv.model.tensors import graph_tensors
from hybridkv.native.cuda_step import PackedStep
from hybridkv.native.model import NativeModel
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import ModelCache
from step_cuda_model import GEOMETRIES, WARM_STEPS, Bench, copy_bandwidth, fill, prompt_speed, say, timed_steps

PARTS = ("check", "decode", "prefill", "memory", "profile")
MIXES = {
    "q4_k_m": {"attn_v": "q6_K", "ffn_down": "q6_K", "attn_qkv": "q5_K", "output": "q6_K", "": "q4_K"},
    "q8_0": {"": "q8_0"},
    "q6_k": {"": "q6_K"},
    "q4_0": {"output": "q6_K", "": "q4_0"},
}
"""Type of a matrix by the start of its name; every other layer's `ffn_down` has the rest's type."""
SCALES = {
    "q4_K": (8e-5, 6e-4), "q5_K": (4e-5, 6.2e-4), "q6_K": (1.5e-5,), "q8_0": (2.7e-4,), "q4_0": (4.3e-3,),
}  # fmt: skip
"""Of random codes, so that values have a deviation of some 0.02."""
VECTORS = ("norm.weight", "conv1d.weight", ".bias", "ssm_a")
"""Ends of the names of what is no matrix of a product."""
PLACES = {"q4_K": (0, 2), "q5_K": (0, 2), "q6_K": (208,), "q8_0": (0,), "q4_0": (0,)}


def config_of(geometry: str) -> Any:
    """The config of a geometry; 35B-A3B with all of its layers, and a head of its own as its files have it."""
    class_name, sizes = GEOMETRIES[geometry]
    sizes = sizes | ({"num_hidden_layers": 40} if geometry == "35b" else {})
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(sizes["num_hidden_layers"])]
    return getattr(transformers, class_name).config_class(
        **sizes,
        layer_types=kinds,
        vocab_size=1024 if geometry.startswith("check") else 151936,
        tie_word_embeddings=geometry != "35b",
        max_position_embeddings=2**20,
    )


class RandomSource:
    """Random weights in a mix; the matrices of a stack have the same bytes, each of its own on the card."""

    def __init__(self, config: Any, mix: str) -> None:
        self.config, self.mix = config, MIXES[mix]
        tensors = graph_tensors(graph_of(config), ().__contains__)
        self.shapes = {t.names[0]: t.shape for t in tensors if not (t.optional and config.tie_word_embeddings)}
        self.taken: dict[str, Weight] = {}
        self.generator = torch.Generator().manual_seed(7)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.shapes

    def weight(self, name: str) -> Weight:
        """Random blocks; the same each time."""
        if name not in self.taken:
            stack, n_out, n_in = (1, 1, *self.shapes[name])[-3:]
            own = name.split(".")[-2]
            if own in ("ssm_alpha", "ssm_beta", "ffn_gate_inp", "ffn_gate_inp_shexp"):
                values = 0.02 * torch.randn(n_out, n_in, generator=self.generator)
                self.taken[name] = Weight(WEIGHTS["f32"], values.view(torch.uint8)[None], n_in)
            else:
                one = self._blocks(WEIGHTS[self._type(name, own)], n_out, n_in)
                self.taken[name] = Weight(WEIGHTS[self._type(name, own)], one.expand(stack, -1, -1), n_in)
        return self.taken[name]

    def vector(self, name: str) -> Tensor:
        """Random numbers, near what such vectors hold."""
        shape = self.shapes[name]
        noise = torch.randn(shape, generator=self.generator)
        if name.endswith("ssm_a"):
            return -(1 + noise.abs())
        if "norm" in name:
            return 1 + 0.1 * noise
        return 0.3 * noise

    def matrices(self) -> Iterable[Weight]:
        """Those that were taken."""
        return self.taken.values()

    def vectors(self) -> Iterable[Tensor]:
        """Not counted."""
        return ()

    def verify(self) -> None:
        """Nothing to do."""

    def _type(self, name: str, own: str) -> str:
        if name == "token_embd.weight" and self.config.tie_word_embeddings:
            own = "output"
        if own.startswith("ffn_down") and int(name.split(".")[1]) % 2:
            own = ""
        return next(kind for start, kind in self.mix.items() if own.startswith(start))

    def _blocks(self, fmt: WeightFormat, n_out: int, n_in: int) -> Tensor:
        n = n_out * (n_in // fmt.block)
        blocks = torch.randint(0, 256, (n, fmt.block_bytes), dtype=torch.uint8, generator=self.generator)
        for place, scale in zip(PLACES[fmt.name], SCALES[fmt.name], strict=True):
            values = scale * (0.5 + torch.rand(n, 1, generator=self.generator))
            blocks[:, place : place + 2] = values.to(torch.float16).view(torch.uint8)
        return blocks.view(1, n_out, -1)


class PackedBench(Bench):
    """Of a step that holds its own weights."""

    @property
    def weight_bytes(self) -> int:
        """Of all weights on the card."""
        return int(self.model.n_bytes)

    @property
    def read(self) -> int:
        """Bytes of the weights that one token reads: of a stack, the chosen experts."""
        source, total = self.model.source, 0
        config = self.model.config
        for name, weight in source.taken.items():
            part = weight.nbytes
            if "_exps." in name:
                part = part * config.num_experts_per_tok // config.num_experts
            if name == "token_embd.weight" and not config.tie_word_embeddings:
                part = 0
            total += part
        return total


def made(options: argparse.Namespace, name: str, bandwidth: float) -> PackedBench:
    geometry, mix = name.split(":")
    config = config_of(geometry)
    model: Any = NativeModel(config, RandomSource(config, mix), device=options.device)  # type: ignore[arg-type]
    start = time.perf_counter()
    step = PackedStep(model)
    model.n_bytes = step.n_bytes
    bench = PackedBench(options, model, name, GraphStep(step, notify=say), bandwidth)
    torch.cuda.synchronize()
    gib = torch.cuda.memory_allocated() / 2**30
    peak = torch.cuda.max_memory_allocated() / 2**30
    bench.report("load", seconds=time.perf_counter() - start, weights_gib=step.n_bytes / 2**30, gib=gib, peak_gib=peak)
    return bench


def check(options: argparse.Namespace) -> None:
    """Small models in each mix against Transformers in float32 on the decoded weights, prompt and decode.

    Raises
    ------
    SystemExit
        If they differ by more than float16 does.
    """
    for name in ("check:q4_k_m", "check:q8_0", "check-35b:q4_k_m", "check-35b:q8_0"):
        geometry, mix = name.split(":")
        config = config_of(geometry)
        source = RandomSource(config, mix)
        vectors = {n: source.vector(n) for n in source.shapes if n.endswith(VECTORS)}
        source.vector = vectors.__getitem__  # type: ignore[method-assign]
        packed = GraphStep(PackedStep(NativeModel(config, source, device=options.device)), notify=say)  # type: ignore[arg-type]
        model = transformers_model(config, source, vectors)
        step = EagerStep(model.to(options.device))
        prompt, answer = torch.randint(3, 900, (2, 150)), torch.randint(3, 900, (2, 6))
        found = []
        for runner in (packed, step):
            specs = Policy(KVTypes("f16", "f16")).resolve(kv_facts(layer_facts(config)))
            kind = ModelCache if runner is packed else HfCache
            cache = kind(config, specs, device="cuda", n_ctx=256, guard=Guard(), notify=say)
            logits = [runner.forward(prompt, cache, 0)]
            logits += [runner.forward(answer[:, i : i + 1], cache, 150 + i) for i in range(6)]
            found.append(torch.stack(logits).double())
        errors = [(a - b).norm() / b.norm() for a, b in zip(*found, strict=True)]
        print(f"check {name} prompt {errors[0]:.2e} decode {max(errors[1:]):.2e}", flush=True)
        if not max(errors) < 2e-2:
            raise SystemExit("the check failed: logits may differ by 2e-2")


def transformers_model(config: Any, source: RandomSource, vectors: dict[str, Tensor]) -> Any:
    """A float32 model with a source's values, by the tables that loading a file uses."""
    import gguf

    from hybridkv.gguf.convert import find_tables
    from hybridkv.gguf.decode import decode_into
    from hybridkv.gguf.pairing import build_skeleton, pair
    from hybridkv.hf import IMPLEMENTATION
    from hybridkv.hf.attention import register

    register()
    pairings = pair(find_tables(config), config, build_skeleton(config, torch.float32), ())
    config = copy.deepcopy(config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION).float()
    for pairing in pairings:
        target = model.get_parameter_or_buffer(pairing.param).data.view(pairing.matrix)
        stack, _, n_cols = pairing.matrix
        start = 0
        for name in pairing.names:
            if name in source.taken:
                kind, data = source.taken[name].format.ggml_type, source.taken[name].data
            else:
                kind, data = 0, vectors[name].contiguous().view(-1, n_cols).view(torch.uint8)
            data = data.reshape(stack, -1, data.shape[-1])
            n = data.shape[1]
            order = None if pairing.rows is None else pairing.rows[start : start + n]
            for matrix, rows in zip(target, data.contiguous().numpy(), strict=True):
                own = matrix[start : start + n] if order is None else matrix
                read = None if pairing.rule.values is None else pairing.rule.values.read
                decode_into(own, rows, gguf.GGMLQuantizationType(kind), rows=order, cols=pairing.cols, values=read)
            start += n
    return model.eval()


def decode(bench: PackedBench) -> None:
    o = bench.options
    for n_seqs in o.batches:
        for depth in o.depths:
            if n_seqs > 1 and depth > 32768:
                continue
            for type_name in o.types:
                n_steps = WARM_STEPS + o.steps
                cache = bench.cache(type_name, depth + n_steps + 8)
                fill(bench, cache, depth, n_seqs)
                seconds = list(timed_steps(lambda t, p, c=cache: bench.step.forward(t, c, p), n_seqs, depth, n_steps))
                times = sorted(seconds[WARM_STEPS:])
                ms, floor = 1e3 * median(times), bench.floor_ms(cache, bench.read)
                bench.report(
                    "decode", type=type_name, n_seqs=n_seqs, depth=depth, first_ms=1e3 * seconds[0], ms=ms,
                    p90_ms=1e3 * times[int(0.9 * len(times))], floor_ms=floor, tok_s=1e3 * n_seqs / ms,
                )  # fmt: skip
                del cache


def prefill(bench: PackedBench) -> None:
    for n_tokens in bench.options.prompts:
        prompt = torch.randint(3, 900, (1, n_tokens))

        def prepare(prompt: Tensor = prompt) -> Any:
            return partial(bench.step.forward, prompt, bench.cache("q8_0", prompt.shape[1]), 0)

        first, tok_s = prompt_speed(n_tokens, prepare)
        bench.report("prefill", tokens=n_tokens, first_ms=1e3 * first, tok_s=tok_s)


def memory(bench: PackedBench) -> None:
    """Peak of a prompt and of decoding at 32768."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    cache = bench.cache("q8_0", 32768)
    fill(bench, cache, 32760, 1, n_prompt=2048)
    for _ in timed_steps(lambda t, p: bench.step.forward(t, cache, p), 1, 32760, 5):
        pass
    bench.report(
        "memory", n_ctx=32768, weights_mib=bench.weight_bytes / 2**20, kv_mib=cache.kv_bytes_used / 2**20,
        states_mib=cache.state_bytes / 2**20, peak_mib=torch.cuda.max_memory_allocated() / 2**20,
        reserved_mib=torch.cuda.max_memory_reserved() / 2**20,
    )  # fmt: skip


def profile(bench: PackedBench) -> None:
    """The kernels of decode steps and of a prompt, by their time."""
    from torch.profiler import ProfilerActivity

    cache = bench.cache("q8_0", 4200)
    fill(bench, cache, 4096, 1)
    list(timed_steps(lambda t, p: bench.step.forward(t, cache, p), 1, 4096, 5))
    prompt = torch.randint(3, 900, (1, 2048))
    own = bench.cache("q8_0", 2048)
    for label, n, run in (
        ("decode", 10, lambda: list(timed_steps(lambda t, p: bench.step.forward(t, cache, p), 1, 4101, 10))),
        ("prompt", 1, lambda: bench.step.forward(prompt, own, 0)),
    ):
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            torch.cuda.synchronize()
        rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
        total = sum(row.self_device_time_total for row in rows)
        print(f"profile {bench.geometry} {label}: {total / n:.0f} us of kernels", flush=True)
        for row in rows[:14]:
            print(f"  {row.self_device_time_total / n:9.1f} us {row.count / n:7.1f} x {row.key[:60]}", flush=True)


def names(text: str) -> list[str]:
    """Words of an option, between commas."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    """Numbers of an option, between commas."""
    return [int(word) for word in text.split(",")]


def packed_parser(description: str | None, *, parts: list[str], types: list[str]) -> argparse.ArgumentParser:
    """The options of whole steps with packed weights."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(tail=0, sink=0)
    parser.add_argument("--parts", type=names, default=parts)
    parser.add_argument("--types", type=names, default=types)
    parser.add_argument("--depths", type=numbers, default=[4096, 131072])
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--prompts", type=numbers, default=[2048])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    return parser


def measure(options: argparse.Namespace, models: Iterable[Any], make: Callable[..., PackedBench]) -> None:
    """Run the parts that are asked for on each model, `make(options, model, bandwidth)`."""
    bandwidth = copy_bandwidth(options.device)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    print(f"{card}, torch {torch.__version__}, copies {bandwidth / 1e9:.0f} GB/s", flush=True)
    for model in models:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        bench = make(options, model, bandwidth)
        for part in (decode, prefill, memory, profile):
            if part.__name__ in options.parts:
                try:
                    part(bench)
                except (HybridKVError, RuntimeError) as error:
                    message = f"{type(error).__name__}: {str(error)[:500]}"
                    print(f"{part.__name__} of {model} failed: {message}", flush=True)
        del bench


def main() -> int:
    """Run the parts that are asked for."""
    parser = packed_parser(__doc__, parts=list(PARTS), types=["q8_0"])
    parser.add_argument("--models", type=names, default=["4b:q4_k_m", "35b:q4_k_m"])
    options = parser.parse_args()
    with torch.inference_mode():
        if "check" in options.parts:
            check(options)
        measure(options, options.models, made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
