"""The generated parts of docs/quality.md and the README's recommendation, from committed evaluations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from hybridkv_lab.plots import positions_svg, quality_svg
from hybridkv_lab.results import Conditions, Result, read_jsonl

MEASUREMENTS = Path(__file__).resolve().parent / "measurements"

MODELS = {
    "reference-hybrid-29m": "eval-reference-decode",
    "SmolLM2-135M": "eval-smollm2-decode",
    "gemma-3-270m": "eval-gemma3-decode",
}

RECOMMENDED = (
    ("close to f16", "-ctk q8_0 -ctv q8_0", "q8_0"),
    (
        "half of q8_0's bytes",
        "-ctk hq4_nl -ctv hq4_nl --kv-tail 128 --kv-sink 4 --kv-center",
        "hq4_nl+tail128+sink4+center",
    ),
    (
        "the same, readable by ggml",
        "-ctk q4_0 -ctv q4_0 -khad -vhad --kv-tail 128 --kv-sink 4 --kv-center",
        "q4_0+kv+tail128+sink4+center",
    ),
    (
        "fewer bytes, where it holds",
        "-ctk hq3_nl -ctv hq3_nl --kv-tail 256 --kv-sink 4 --kv-center",
        "hq3_nl+tail256+sink4+center",
    ),
    (
        "the fewest bytes: measure first",
        "-ctk hq2_nl -ctv hq2_nl --kv-tail 128 --kv-sink 4 --kv-center",
        "hq2_nl+tail128+sink4+center",
    ),
    ("not recommended: ggml's q4_0, plain", "-ctk q4_0 -ctv q4_0 --kv-scale absmax", "q4_0+absmax"),
)
"""What for, how it is asked for, and its label in the evaluations."""


Results = dict[str, Result]
Judge = Callable[[str, Results], tuple[str, bool | None]]


def load(name: str) -> tuple[Conditions, Results]:
    """A committed evaluation: its conditions, and its results by label."""
    conditions, results = read_jsonl(MEASUREMENTS / f"{name}.jsonl")
    return conditions, {r.label: r for r in results}


def conditions_line(c: Conditions) -> str:
    """What an evaluation was made with."""
    commit = f", commit {c.commit}" if c.commit else ""
    return (
        f"`hybridkv eval --mode {c.mode} -c {c.n_ctx} --windows {c.n_windows}`: {c.model}, {c.n_tokens} tokens of "
        f"{c.text}, {c.backend}, {c.threads} threads; {c.cpu}; hybridkv {c.hybridkv}{commit}, torch {c.torch}, "
        f"Transformers {c.transformers}, {c.date[:10]}."
    )


def quality_table(name: str) -> str:
    """All candidates of an evaluation."""
    conditions, results = load(name)
    lines = [
        "| types | bits per value | perplexity over f16's | mean KLD | 99.9 % KLD | same top token | RMS Δp | greedy text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results.values():
        ratio = "" if r.role == "reference" else f"{100 * (r.ratio - 1):+.3f} ± {100 * r.ratio_se:.3f} %"
        divergence = "" if r.role == "reference" else f"{r.kld_mean:.1e} ± {r.kld_mean_se:.0e}"
        greedy = "" if r.greedy_agreement is None else f"{100 * r.greedy_agreement:.0f} %"
        cells = (
            r.label,
            f"{r.bits_per_value:.2f}",
            ratio,
            divergence,
            f"{r.kld_p999:.1e}",
            f"{100 * r.same_top:.2f} %",
            f"{100 * r.rms_delta_p:.2f} %",
            greedy,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", conditions_line(conditions)])


def recommended_table(n: int | None = None, where_all_is: str = "") -> str:
    """Say what to ask for, and what it does to three models: the first `n` recommendations, or all."""
    evaluations = {model: load(name) for model, name in MODELS.items()}
    heads = " | ".join(f"{model}: perplexity, mean KLD" for model in evaluations)
    lines = [f"| for | options | bits per value | {heads} |", "|---|---|---|" + "---|" * len(evaluations)]
    for purpose, options, label in RECOMMENDED[:n]:
        found = [results[label] for _, results in evaluations.values()]
        cells = [purpose, f"`{options}`", f"{found[0].bits_per_value:.1f}"]
        cells += [f"{100 * (r.ratio - 1):+.2f} %, {r.kld_mean:.1e}" for r in found]
        lines.append("| " + " | ".join(cells) + " |")
    where = "; ".join(f"{model} {c.n_tokens} tokens" for model, (c, _) in evaluations.items())
    first = next(iter(evaluations.values()))[0]
    lines += [
        "",
        f"`hybridkv eval --mode decode`, token by token against an f16 cache: {where}; {first.cpu}, hybridkv {first.hybridkv}, `python bench/quality.py`.{where_all_is}",
    ]
    return "\n".join(lines)


def targets_table() -> str:
    """What was aimed at, and what was measured, model by model."""
    evaluations = {model: load(name)[1] for model, name in MODELS.items()}
    lines = ["| aim | " + " | ".join(evaluations) + " |", "|---|" + "---|" * len(evaluations)]
    for aim, judge in _AIMS:
        cells = []
        for model, results in evaluations.items():
            measured, met = judge(model, results)
            cells.append(measured if met is None else f"{measured}: {'met' if met else '**missed**'}")
        lines.append(f"| {aim} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


Q6 = "q6_0+kv+tail128+sink4+center"

PLAIN = "q4_0+absmax"
"""q4_0 as ggml stores it: no rotation, no refit."""


def _q8_0(_: str, results: Results) -> tuple[str, bool | None]:
    floor = next(r for r in results.values() if r.role == "floor")
    above = results["q8_0"].kld_mean - floor.kld_mean
    return f"{results['q8_0'].kld_mean:.1e}, floor {floor.kld_mean:.1e}", above <= 0.001


def _q6_0(_: str, results: Results, types: str = "q6_0") -> tuple[str, bool | None]:
    found = results[types]
    return f"{100 * (found.ratio - 1):+.2f} ± {100 * found.ratio_se:.2f} %", abs(found.ratio - 1) <= 0.001


def _q4_0(_: str, results: Results) -> tuple[str, bool | None]:
    plain, better = results[PLAIN], results["q4_0+kv+tail128"]
    mean, far = better.kld_mean / plain.kld_mean, better.kld_p999 / plain.kld_p999
    return f"{mean:.2f} and {far:.2f} times", max(mean, far) <= 0.5


def _hq3_nl(_: str, results: Results) -> tuple[str, bool | None]:
    ratio = results["hq3_nl+tail256+sink4+center"].kld_mean / results[PLAIN].kld_mean
    return f"{ratio:.2f} times", ratio <= 1


def _hq2_nl(model: str, results: Results) -> tuple[str, bool | None]:
    found = results["hq2_nl+tail128+sink4+center"]
    measured = f"{100 * (found.ratio - 1):+.2f} ± {100 * found.ratio_se:.2f} %"
    return measured, found.ratio - 1 <= 0.03 if model == next(iter(MODELS)) else None


def _per_layer(model: str, _: Results) -> tuple[str, bool | None]:
    if model != next(iter(MODELS)):
        return "not run", None
    found = load("eval-reference-2.9bpv")[1]["ref-2.9.toml"]
    return f"{found.bits_per_value:.2f} bits: {100 * (found.ratio - 1):+.2f} ± {100 * found.ratio_se:.2f} %", (
        found.ratio - 1 <= 0.03
    )


_AIMS: tuple[tuple[str, Judge], ...] = (
    ("q8_0: mean KLD at most 0.001 above the floor", _q8_0),
    ("q6_0, rotated, tail 128, 4 sinks, centred: perplexity within 0.1 %", partial(_q6_0, types=Q6)),
    ("q6_0, plain: perplexity within 0.1 %", _q6_0),
    ("q4_0, rotated, refit, tail 128: mean and 99.9 % KLD at most half of plain q4_0's", _q4_0),
    ("3.5 bits (hq3_nl, tail 256, 4 sinks, centred): mean KLD at most plain q4_0's at 4.5", _hq3_nl),
    ("2.5 bits (hq2_nl, tail 128, 4 sinks, centred): perplexity within 3 % on the reference model", _hq2_nl),
    (
        "under 3 bits, [types per layer](measurements/ref-2.9.toml): perplexity within 3 % on the reference model",
        _per_layer,
    ),
)


ALONG = ("q8_0", "q6_0", "q5_0", "q4_0", "q4_0+kv+tail128", "hq3_nl", "hq2_nl")


def pictures() -> dict[str, str]:
    """The README's picture, and where along the context the error lies."""
    _, results = load(MODELS["reference-hybrid-29m"])
    along = [r for r in results.values() if r.role != "candidate" or r.label in ALONG]
    return {"docs/quality.svg": quality_svg(list(results.values())), "docs/divergence.svg": positions_svg(along)}
