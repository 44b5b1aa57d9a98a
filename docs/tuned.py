"""The generated part of docs/tuning.md, from committed tunings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASUREMENTS = Path(__file__).resolve().parent / "measurements"


def tuning_table() -> str:
    """What types per layer gain over the best uniform pair, by model and budget."""
    lines = [
        "| model | budget | best uniform pair: mean KLD | types per layer: bits, predicted and measured mean KLD | ratio | "
        "gain on the same tokens | written |",
        "|---|---|---|---|---|---|---|",
    ]
    conditions: dict[str, None] = {}
    for path in sorted(MEASUREMENTS.glob("tune-*.json")):
        data: dict[str, Any] = json.loads(path.read_text())
        c, tuned = data["conditions"], data["tuned"]
        per_layer = len(set(tuned["types"])) > 1
        rival = data["uniform"][0] if per_layer else tuned
        found = f"{tuned['bits']:.2f}, {tuned['predicted']:.2e}, {tuned['kld_mean']:.2e} ± {tuned['kld_mean_se']:.0e}"
        cells = (
            c["model"],
            f"{c['limit']:g} bits",
            f"{rival['label']}: {rival['kld_mean']:.2e} ± {rival['kld_mean_se']:.0e}",
            found if per_layer else "the search ends at the uniform pair",
            f"{tuned['kld_mean'] / rival['kld_mean']:.2f}" if per_layer else "",
            "" if data["gain"] is None else f"{data['gain']:.1e} ± {data['gain_se']:.0e}",
            f"[{data['chosen']}](measurements/{path.with_suffix('.toml').name})",
        )
        lines.append("| " + " | ".join(cells) + " |")
        layers = ", ".join(data["measured_by_layer"])
        conditions[
            f"{c['model']}: {c['mode']}, windows of {c['window']} tokens of {c['text']}, {c['calibration_tokens']} to choose "
            f"by and {c['held_out_tokens']} held out; {layers} measured layer by layer; {c['backend']}, {c['threads']} "
            f"thread, {c['cpu']}; hybridkv {c['hybridkv']}, torch {c['torch']}, Transformers {c['transformers']}, "
            f"{c['date'][:10]}."
        ] = None
    return "\n".join([*lines, "", "`python bench/tune.py`. " + " ".join(conditions)])
