"""docs/families.md: which backend runs which models; and their speed, in docs/performance.md. Called by `generate.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf_keys import keys_measured

_WORDS = {
    "Attention": "attention",
    "DeltaNet": "gated delta net",
    "Mamba1": "Mamba",
    "Mamba2": "Mamba-2",
    "Shared": "shared blocks",
    "ShortConv": "short convolution",
}


def _read(key: str) -> set[str]:
    """Architectures that read a metadata key, as measured."""
    return {name for name, (verdicts, _) in keys_measured()[key].items() if "read" in verdicts.split()}


def families_page() -> str:
    """The page, of the native backend's families, the GGUF tables and the states that are planned."""
    import transformers

    from hybridkv.gguf.architectures import WRITABLE
    from hybridkv.hf.step.fused import FAMILY_NAMES
    from hybridkv.model import FAMILIES, Experts
    from hybridkv.model.facts import STATE_SHAPES
    from hybridkv.model.families import mamba, qwen

    predicting, skipped = {*qwen.PREDICTING, *mamba.PREDICTING}, _read("nextn_predict_layers")
    files: dict[str, list[str]] = {}
    for architecture in WRITABLE:
        family = getattr(transformers, architecture.config_class).model_type
        if architecture.name not in files.setdefault(family, []):
            files[family].append(architecture.name)
    lines = [
        "# Families of models",
        "",
        "Written by `docs/generate.py` from `hybridkv.model.FAMILIES`, the GGUF tables and `hybridkv.model.facts`. Names are those",
        "of `model_type` in a Transformers config.",
        "",
        "*Native* is this package's own code: C++ on the CPU, Triton on CUDA. It is tested against Transformers in float64",
        "(`tests/native`, `tests/hf/test_cuda_step.py`). What it cannot compute of a model (an activation, biases, a kind of",
        "RoPE) it refuses by name, and `--backend auto` then takes *eager*, Transformers' own code with our cache. On CUDA all",
        "families run natively from GGUF files, and those with *yes* from model directories too. Families",
        "without a GGUF name run from Hugging Face directories alone. Other models that Transformers runs are eager too.",
        "",
        "A head of multi-token prediction (MTP) guesses tokens ahead where a GGUF file has it whole (`--spec`). *Left out*: a file",
        "that says how many such blocks it has is loaded without them, with a notice; of other architectures it is refused.",
        "",
        "| family | layers | experts | native on the CPU | native on CUDA | GGUF | MTP |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in sorted({*FAMILIES, *STATE_SHAPES, *files}):
        native = FAMILIES.get(family)
        parts = () if native is None else native.parts
        mixers = " + ".join(_WORDS[part.__name__] for part in parts if part.__name__ in _WORDS)
        cells = (
            mixers or "-",
            "yes" if Experts in parts else "-",
            "yes" if native else "eager",
            "yes" if family in FAMILY_NAMES else "GGUF files" if native and family in files else "eager",
            ", ".join(f"`{name}`" for name in files.get(family, ())) or "-",
            "yes" if family in predicting else "left out" if skipped & {*files.get(family, ())} else "-",
        )
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def speed_table() -> str:
    """Families beside llama.cpp, and what a step takes that Transformers' layers run, as measured."""
    path = Path(__file__).parent / "measurements/families.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    eager = {line["family"]: line["eager_tok_s"] for line in lines if "eager_tok_s" in line}
    rows = [
        "| geometry | weights | K and V | logits off by | prompt of 512 | depth 0 | depth 32768 | over eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = [line for line in lines if "prompt" in line]
    for line in shown:
        own = line["depth 0"]["tok_s"]["hybridkv"]
        cells = (
            f"{line['of']}, {line['parameters'] / 1e6:.0f} M",
            line["weights"],
            line["kv"],
            ", ".join(f"{off:.1g}" for off in line["from_exact"].values()),
            *(_side_by_side(line.get(part)) for part in ("prompt", "depth 0", "depth 32768")),
            f"{own / eager[line['family']]:.1f}x" if line["family"] in eager else "-",
        )
        rows.append(f"| {' | '.join(cells)} |")
    cuts = {line["of"]: line["cut"] for line in shown if line["cut"]}
    last = shown[-1]
    return "\n".join(
        (
            *rows,
            "",
            *(f"{of}: {cut}." for of, cut in cuts.items()),
            f"`python bench/families.py`: {last['machine']}, {last['isa']}, {last['threads']} threads; hybridkv commits "
            f"{' and '.join(sorted({line['commit'] for line in shown}))}; {next(line['peer'] for line in shown if line['peer'])}.",
        )
    )


def _side_by_side(speed: dict[str, Any] | None) -> str:
    """Tokens/s of both backends, and how many times as fast ours is."""
    if speed is None:
        return "-"
    both = ", ".join(f"{value:.3g}" for value in speed["tok_s"].values())
    return f"{both}, **{speed['ratio']:.2f}x**" if "ratio" in speed else both
