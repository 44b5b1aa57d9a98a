"""An evaluation that nobody measured, but that looks like one: 14 candidates, 12 layers, 32 positions."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from hybridkv_lab.results import Conditions, Result, Role

CONDITIONS = Conditions(
    model="reference-hybrid-29m",
    text="heldout_long.txt",
    n_ctx=8192,
    n_windows=4,
    n_tokens=32764,
    mode="prefill",
    reference="f32",
    backend="native",
    kernel="cpu-amx",
    hybridkv="0.1.0",
    torch="2.13.0+cpu",
    transformers="5.23.0",
    cpu="Some(R) Processor",
    threads=2,
    commit="0123abcd",
    date="2026-11-24T04:00:00+00:00",
    greedy_tokens=128,
)

REFERENCE = Result(
    label="f32",
    type_k="f32",
    type_v="f32",
    rotate="none",
    role="reference",
    bytes_per_token=12288,
    bits_per_value=32.0,
    n_tokens=32764,
    perplexity=8.4184,
    perplexity_se=0.061,
    ratio=1.0,
    ratio_se=0.0,
    kld_mean=0.0,
    kld_mean_se=0.0,
    kld_median=0.0,
    kld_p95=0.0,
    kld_p99=0.0,
    kld_p999=0.0,
    kld_max=0.0,
    same_top=1.0,
    rms_delta_p=0.0,
    n_non_finite=0,
    greedy_agreement=1.0,
    prefill_tok_s=1850.2,
    decode_tok_s=61.0,
    kv_bytes=12288 * 8192,
)

_KINDS = (
    ("q8_0", 8.5, 1.1e-5),
    ("q8_KV", 8.25, 2.3e-5),
    ("q6_0", 6.5, 1.7e-4),
    ("q5_1", 6.0, 6.1e-4),
    ("q5_0", 5.5, 6.7e-4),
    ("q4_1", 5.0, 2.8e-3),
    ("q4_0", 4.5, 3.4e-3),
    ("q4_0 rot kv", 4.5, 1.9e-3),
    ("q4_0 rot kv center", 4.5, 1.8e-3),
    ("q8_0/q4_0 rot kv tail 128", 6.5, 9.0e-4),
    ("q4_0 rot kv tail 128 sink 4", 4.56, 1.6e-3),
    ("iq4_nl", 4.5, 2.9e-3),
    ("iq4_nl rot kv", 4.5, 1.7e-3),
    ("kv.toml", 5.25, 4.9e-4),
)


def result(label: str, bits: float, kld: float, role: Role = "candidate") -> Result:
    """A result whose figures follow from its size and its mean KLD."""
    rng = random.Random(label)
    edges = [x / 4 for x in range(-40, 5)]
    middle = math.log10(kld) - 0.6
    counts = [int(4000 * math.exp(-(((x - middle) / (0.55 if x < middle else 0.8)) ** 2))) for x in edges]
    text = "In spring the snow melts and the water rises.\nEvery year the"
    return replace(
        REFERENCE,
        label=label,
        type_k=label.split()[0].split("/")[0],
        type_v=label.split()[0].split("/")[-1],
        role=role,
        bytes_per_token=384 * bits,
        bits_per_value=bits,
        perplexity=8.4184 * (1 + kld),
        ratio=1 + kld,
        ratio_se=kld / 3,
        kld_mean=kld,
        kld_mean_se=kld / 40,
        kld_median=kld / 4,
        kld_p95=kld * 3,
        kld_p99=kld * 9,
        kld_p999=kld * 40,
        kld_max=kld * 700,
        same_top=1 - math.sqrt(kld) / 5,
        rms_delta_p=math.sqrt(kld) / 4,
        greedy_agreement=1 - math.sqrt(kld),
        greedy_first_divergence=40.0,
        kv_bytes=int(384 * bits * 8192),
        positions=tuple((256 * i, kld * (0.6 + 0.03 * i) * rng.uniform(0.8, 1.25), 1024) for i in range(32)),
        histogram=tuple((x, n) for x, n in zip(edges, counts, strict=True) if n),
        worst=tuple((rng.randrange(8192), kld * 700 / (i + 1), text) for i in range(5)),
        layers=tuple((4 * i + 3, 3 * math.sqrt(kld) * rng.uniform(0.3, 1.5) * (3 if i == 5 else 1)) for i in range(12)),
    )


FLOOR = result("f32 again", 32.0, 4.1e-8, "floor")
RESULTS = (REFERENCE, FLOOR, *(result(*kind) for kind in _KINDS))
