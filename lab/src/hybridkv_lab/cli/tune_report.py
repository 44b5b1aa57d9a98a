"""The result of `hybridkv tune`: as tables on stdout, as kv.toml, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv.cli.show import notice, simple_table, size, stdout_console

if TYPE_CHECKING:
    from hybridkv.cache import AttentionFacts
    from hybridkv_lab.sensitivity import Sensitivities, Storage
    from hybridkv_lab.tuner import Measured, Outcome


@dataclass(frozen=True, slots=True)
class Report:
    """A tuning.

    Attributes
    ----------
    conditions
        What was asked and what it was measured with.
    facts, storage, sensitivities, outcome
        As in `hybridkv_lab.tuner`.
    errors
        Model layer -> relative error of its attention output with the chosen types.
    """

    conditions: Mapping[str, str | int | float]
    facts: Sequence[AttentionFacts]
    storage: Storage
    sensitivities: Sensitivities
    outcome: Outcome
    errors: Mapping[int, float]

    def show(self) -> None:
        """Print sensitivities and chosen types by layer, then what was measured on held-out tokens."""
        console = stdout_console()
        names = [name for name in self.sensitivities.types if name != "f16"]
        table = simple_table("layer", "side", "chosen", "bits", "adds", *names, left=("side", "chosen"))
        for f, pair, losses in self._layers():
            for side, name, dim in zip("kv", pair, (f.head_dim_k, f.head_dim_v), strict=True):
                cells = [f"{losses[side, name]:.1e}" for name in names]
                adds = f"{losses[side, name]:.1e}"
                table.add_row(str(f.layer), side.upper(), name, f"{_bits(name, dim):g}", adds, *cells)
        console.print("Mean KLD that a type adds, alone, to one side of one layer:")
        console.print(table)
        columns = ("bits", "KV", "predicted KLD", "mean KLD", "99.9 %", "same top", "perplexity ratio")
        table = simple_table("types", *columns, left=("types",))
        for m in (self.outcome.tuned, *self.outcome.uniform):
            s = m.summary
            table.add_row(
                m.label,
                f"{m.bits:.3f}",
                size(m.kv_bytes),
                f"{m.predicted:.2e}",
                f"{m.loss:.3e} ±{s.kld_mean_se:.0e}",
                f"{s.kld_p999:.1e}",
                f"{100 * s.same_top:.2f} %",
                f"{s.ratio:.5f} ±{s.ratio_se:.5f}",
            )
        console.print(f"On {self.conditions['held_out_tokens']} held-out tokens:")
        console.print(table)
        console.print(self.verdict)

    @property
    def verdict(self) -> str:
        """The choice, and the reason for it."""
        o = self.outcome
        if o.gain is None or o.gain_se is None:
            if len(set(o.chosen.pairs)) == 1:
                return f"Uniform is best: {o.chosen.label}."
            return "Types per layer: no uniform pair of these types is as small and gives finite numbers."
        rival = o.uniform[0]
        if self.conditions["goal"] == "mean KLD":
            if o.chosen is rival:
                return f"Uniform is best: {rival.label} keeps the limit in no more bytes than types per layer."
            return f"Types per layer keep the limit of {self.conditions['limit']:g}; no uniform pair as small does."
        gain = f"{o.gain:+.2e} ±{o.gain_se:.0e}"
        if o.chosen is rival:
            return (
                f"Uniform is best: {rival.label}. Types per layer gain {gain} of mean KLD on the same tokens, "
                "which is not beyond two standard errors."
            )
        return (
            f"Types per layer: {o.tuned.loss / rival.loss:.2f} times the mean KLD of {rival.label}, the best uniform "
            f"pair within the same limit; they gain {gain} on the same tokens."
        )

    def write(self, output: Path) -> None:
        """Write kv.toml, and the figures beside it."""
        from hybridkv.policy import format_config
        from hybridkv_lab.results import write_text

        config = self.storage.config(output.name, str(self.conditions["model"]), self.facts, self.outcome.chosen.pairs)
        write_text(output, format_config(config, list(self._comment())))
        write_text(output.with_suffix(".json"), json.dumps(self._numbers(), indent=1, allow_nan=False) + "\n")
        notice(f"types: {output}; numbers: {output.with_suffix('.json')}; by token: {output.with_suffix('.npz')}")

    def _layers(self) -> Iterator[tuple[AttentionFacts, tuple[str, str], Mapping[Any, float]]]:
        return zip(self.facts, self.outcome.chosen.pairs, self.sensitivities.layers, strict=True)

    def _comment(self) -> Iterator[str]:
        c, chosen = self.conditions, self.outcome.chosen
        yield f"KV cache types for each layer of {c['model']}, found by `hybridkv tune`."
        yield "Use: hybridkv run --kv-config FILE, or quantized_cache(model, config=FILE)."
        yield ""
        yield f"Asked: {c['goal']} {c['limit']:g}, bytes at {c['context']} tokens."
        yield f"Found: {chosen.bits:.3f} bits per value, {chosen.kv_bytes} bytes of KV."
        yield f"Mean KLD from an f16 cache on {c['held_out_tokens']} held-out tokens: {_figure(chosen)}."
        for m in self.outcome.uniform:
            yield f"  beside it: {m.label}, {m.bits:.3f} bits: {_figure(m)}"
        yield self.verdict
        yield ""
        yield (
            f"Measured: {c['mode']}, windows of {c['window']} tokens of {c['text']}, {c['calibration_tokens']} tokens "
            "to choose by;"
        )
        yield (
            f"{c['backend']}, {c['threads']} threads, {c['cpu']}, hybridkv {c['hybridkv']}, torch {c['torch']}, "
            f"Transformers {c['transformers']}, {str(c['date'])[:10]}."
        )

    def _numbers(self) -> dict[str, Any]:
        """Convert everything to JSON's own types; what is not finite becomes null."""
        o = self.outcome
        layers = [
            {
                "layer": f.layer,
                "type_k": pair[0],
                "type_v": pair[1],
                "guard_error": _finite(self.errors.get(f.layer)),
                "sensitivity": {
                    side: {name: _finite(loss) for (s, name), loss in losses.items() if s == side} for side in "kv"
                },
            }
            for f, pair, losses in self._layers()
        ]
        return {
            "format": "hybridkv-tune",
            "version": 1,
            "conditions": dict(self.conditions),
            "verdict": self.verdict,
            "chosen": o.chosen.label,
            "measured_by_layer": list(self.sensitivities.measured),
            "tuned": _row(o.tuned),
            "uniform": [_row(m) for m in o.uniform],
            "gain": _finite(o.gain),
            "gain_se": _finite(o.gain_se),
            "layers": layers,
        }


def _bits(name: str, head_dim: int) -> float:
    from hybridkv.formats import get_format

    return get_format(name).bits_per_value(head_dim)


def _figure(m: Measured) -> str:
    return f"{m.loss:.3e} ±{m.summary.kld_mean_se:.0e} (predicted {m.predicted:.2e})"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _row(m: Measured) -> dict[str, Any]:
    s = m.summary
    figures = ("kld_mean_se", "kld_median", "kld_p99", "kld_p999", "same_top", "ratio", "ratio_se", "perplexity")
    return {
        "label": m.label,
        "bits": m.bits,
        "kv_bytes": m.kv_bytes,
        "predicted": _finite(m.predicted),
        "kld_mean": _finite(m.loss),
        **{name: _finite(getattr(s, name)) for name in figures},
        "types": ["/".join(pair) for pair in m.pairs],
    }
