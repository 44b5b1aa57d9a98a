"""Compiles what a step launches for a card that is not here: `python -m tests.kernels.compile_only 86 4b`.

The step's own code runs on the CPU, a layer of each kind at a model's real widths; each launch compiles its kernel for
the card, with the tools of Triton's wheel, and runs nothing. Prints a line per variant: name, bytes of shared memory,
and what was made. Triton's interpreter must be off.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hybridkv.cache import KVTypes
from hybridkv.formats.weights import WEIGHTS
from hybridkv.hf.step.graph import GraphStep
from hybridkv.kernels import Encoder, Kernel
from hybridkv.kernels import cuda as kernels
from hybridkv.kernels.cuda import launch, packed, packed_rows, prefill
from hybridkv.kernels.cuda.packed_layout import PACKED, PackedWeight
from hybridkv.kernels.weights import Weight
from hybridkv.model import graph_of, kv_facts, layer_facts
from hybridkv.model.tensors import graph_tensors
from hybridkv.native import cuda_card
from hybridkv.native.cuda_step import PackedStep
from hybridkv.native.model import NativeModel
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import ModelCache
from tests.hf import recorded

_DELTA: dict[str, Any] = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128}
_DELTA |= {"linear_value_head_dim": 128, "head_dim": 256, "num_attention_heads": 16, "num_hidden_layers": 2}
_DELTA |= {"layer_types": ["linear_attention", "full_attention"], "vocab_size": 512, "tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "4b": (
        "Qwen3_5TextConfig",
        {**_DELTA, "hidden_size": 2560, "num_key_value_heads": 4, "intermediate_size": 9216},
    ),
    "35b": (
        "Qwen3_5MoeTextConfig",
        {
            **_DELTA,
            **{"hidden_size": 2048, "num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8},
            **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
        },
    ),
    "nemotron": (
        "NemotronHConfig",
        {
            **{"hidden_size": 2688, "layers_block_type": ["mamba", "attention", "moe"], "vocab_size": 512},
            **{"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 64},
            **{"mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "n_routed_experts": 128},
            **{"num_experts_per_tok": 6, "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712},
        },
    ),
    "falcon": (
        "FalconH1Config",
        {
            **{"hidden_size": 3072, "num_hidden_layers": 1, "vocab_size": 512, "intermediate_size": 12288},
            **{"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128, "mamba_d_ssm": 3072},
            **{"mamba_n_heads": 24, "mamba_d_head": 128, "mamba_d_state": 256, "mamba_n_groups": 1},
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            **{"hidden_size": 2560, "num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 8192},
            **{"num_attention_heads": 20, "num_key_value_heads": 1, "num_experts": 1, "attn_layer_period": 2},
            **{"attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 160},
        },
    ),
    "lfm2": (
        "Lfm2MoeConfig",
        {
            **{"hidden_size": 2048, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
            **{"vocab_size": 512, "num_attention_heads": 32, "num_key_value_heads": 8, "num_experts": 32},
            **{"num_experts_per_tok": 4, "moe_intermediate_size": 1792, "num_dense_layers": 0},
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **{"hidden_size": 2560, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
            **{"vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
            **{"intermediate_size": 10240, "sliding_window": 1024},
        },
    ),
    "llama": (
        "LlamaConfig",
        {
            **{"hidden_size": 4096, "num_hidden_layers": 1, "vocab_size": 512, "intermediate_size": 14336},
            **{"num_attention_heads": 32, "num_key_value_heads": 8},
        },
    ),
}
FLOATS = ("ssm_alpha", "ssm_beta", "ffn_gate_inp", "ffn_gate_inp_shexp")
MIX = {"attn_v": "q6_K", "ffn_down": "q6_K", "ffn_down_exps": "q6_K", "attn_qkv": "q5_K", "token_embd": "q6_K"}
"""Types by name where they are not q4_K, as llama.cpp mixes them."""


UNTOUCHED = torch.empty
"""Memory that stays the system's."""


class Card:
    """What Triton asks of a driver."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """None is used."""
        return device


def target_of(name: str) -> GPUTarget:
    """`75` to `90`, `gfx942`, `gfx1100`."""
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(name), 32)


class Compiler:
    """Stands in for launches; counts and prints what it compiles."""

    def __init__(self, only: set[str]) -> None:
        self.only, self.seen, self.n = only, set[int](), 0
        self.launch = JITFunction.run

    def run(self, function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Compile a launch's kernel."""
        del warmup
        if self.only and function.__name__ not in self.only:
            return
        kernel = self.launch(function, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in self.seen:
            self.seen.add(id(kernel))
            print(function.__name__, kernel.metadata.shared, list(kernel.asm)[-1], flush=True)


class Source:
    """Weights of a graph without values."""

    def __init__(self, config: Any) -> None:
        tensors = graph_tensors(graph_of(config), ().__contains__)
        self.shapes = {t.names[0]: t.shape for t in tensors if not (t.optional and config.tie_word_embeddings)}

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.shapes

    def weight(self, name: str) -> Weight:
        """A matrix or a stack, of which no byte is read."""
        stack, n_out, n_in = (1, 1, *self.shapes[name])[-3:]
        own = name.split(".")[-2]
        fmt = WEIGHTS["f32" if own in FLOATS else MIX.get(own, "q4_K")]
        if fmt.rejects(n_in) is not None:  # as llama.cpp does where a row does not fill the blocks
            fmt = WEIGHTS["q8_0"]
        rows = torch.zeros((1, n_out, fmt.row_bytes(n_in)), dtype=torch.uint8)
        return Weight(fmt, rows.expand(stack, -1, -1), n_in)

    def vector(self, name: str) -> Tensor:
        """Ones; decays are negative."""
        return torch.full(self.shapes[name], -1.0 if name.endswith("ssm_a") else 1.0)

    def matrices(self) -> tuple[Weight, ...]:
        """Not counted."""
        return ()

    def vectors(self) -> tuple[Tensor, ...]:
        """Not counted."""
        return ()

    def verify(self) -> None:
        """Nothing is read."""


def held(name: str, n_stack: int, n_out: int, n_in: int) -> PackedWeight:
    """A packed weight whose memory nobody touches."""
    shape = (n_stack * n_out, -(-n_in // 256))
    a, b, c, d = (UNTOUCHED((*shape, n or 16), dtype=torch.uint8) for n in PACKED[name].plane_bytes)
    return PackedWeight(PACKED[name], (a, b, c, d), n_stack, n_out, n_in)


def upload(weights: list[Weight], device: torch.device) -> PackedWeight:
    """Stand in for `packed_layout.upload`."""
    assert device.type == "cpu"
    first = weights[0]
    return held(first.format.name, first.n_stack, sum(w.n_out for w in weights), first.n_in)


def run_model(name: str, kv_type: str) -> None:
    """A prompt that is decoded window by window, a short one, and single tokens, recorded and not."""
    class_name, options = MODELS[name]
    config = getattr(transformers, class_name)(**options)
    own: dict[str, Any] = {
        "kernels": (Kernel(kernels.NAME, 5, kernels.TOLERANCE, lambda case: None, kernels.attend),),
        "encoders": (Encoder(kernels.NAME, 5, lambda *case: None, kernels.write, kernels.store),),
    }
    specs = Policy(KVTypes(kv_type, kv_type)).resolve(kv_facts(layer_facts(config)))
    model: Any = NativeModel(config, Source(config))  # type: ignore[arg-type]
    step = PackedStep(model)
    recording = GraphStep(step, recorder=recorded.Again(), notify=print)
    for runner, lengths in ((step, (packed.FEW_ROWS + 8, 8, 1)), (recording, (4, 1, 1))):
        cache = ModelCache(config, specs, device="cpu", n_ctx=128, guard=Guard(mode="off"), **own)
        position = 0
        for length in lengths:
            runner.forward(torch.full((1, length), 3), cache, position)
            position += length
    cache = ModelCache(config, specs, device="cpu", n_ctx=128, guard=Guard(mode="off"), **own)
    step.forward(torch.full((4, 1), 3), cache, 0)


def run_types(names: list[str]) -> None:
    """Each type's products and rows by themselves: one row, and 9, at the widths of a 4B."""
    for name in names:
        for n_in in (2560, 9216):
            weight = held(name, 1, 64, n_in)
            for n_rows in (1, 9):
                packed.multiply_packed(torch.zeros((n_rows, n_in), dtype=torch.float16), (weight,))
        packed.multiply_gated(torch.zeros((1, 2560), dtype=torch.float16), held(name, 1, 64, 2560))
        packed_rows.decode_rows(held(name, 1, 64, 2560), 0, 64)
        packed_rows.gather_rows(held(name, 1, 64, 2560), torch.zeros(3, dtype=torch.int64))


def _launched(compiler: Compiler) -> Any:
    def run(function: Any, *args: Any, **options: Any) -> None:
        compiler.run(function, *args, **options)

    return run


def main() -> None:
    """Compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("what", help=f"{', '.join(MODELS)}, or types of weights")
    parser.add_argument("--kv", default="q8_0")
    parser.add_argument("--only", default="", help="kernels, separated by commas")
    options = parser.parse_args()
    target = target_of(options.target)
    driver.set_active(Card(target))
    compiler = Compiler(set(filter(None, options.only.split(","))))
    turing = target.backend == "cuda" and target.arch < 80
    with (
        mock.patch.object(JITFunction, "run", _launched(compiler)),
        mock.patch.object(cuda_card, "upload", upload),
        mock.patch.object(launch, "_has_products_of_fragments", return_value=not turing),
        mock.patch.object(prefill, "available", return_value=False),
        torch.inference_mode(),
    ):
        if options.what in MODELS:
            # Results that no kernel wrote are read as indices: zeros are some.
            with mock.patch.object(torch, "empty", torch.zeros):
                run_model(options.what, options.kv)
        else:
            run_types(options.what.split(","))
    print(SimpleNamespace(n=len(compiler.seen), triton=triton.__version__))


if __name__ == "__main__":
    main()
