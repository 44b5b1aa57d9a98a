"""An evaluation as Markdown and as one HTML page that loads nothing: `lab.results` in, pictures of `lab.plots` inside.

Measures nothing. Called by `hybridkv eval` and `hybridkv report`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from hybridkv.errors import UsageError
from hybridkv_lab.results import Conditions, Result, front, write_text

_N_WORST = 3


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table: its head, what it means, and a result's cell, empty where there is nothing to say."""

    head: str
    meaning: str
    cell: Callable[[Result], str]


def write_report(conditions: Conditions, results: Sequence[Result], directory: Path, stem: str) -> tuple[Path, Path]:
    """Write `directory/stem.md` and `directory/stem.html`; the former stands even where the latter cannot be drawn.

    Raises
    ------
    UsageError
        If nothing can be written there, or matplotlib is missing.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create directory {directory}", hint="-o takes a directory") from error
    written = directory / f"{stem}.md", directory / f"{stem}.html"
    write_text(written[0], markdown(conditions, results))
    write_text(written[1], page(conditions, results))
    return written


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}"


def _with_error(value: float, error: float) -> str:
    """Format a value and its standard error, to the error's second digit."""
    if not (math.isfinite(value) and 0 < error < math.inf):
        return f"{value:.6g}"
    decimals = min(max(0, 1 - math.floor(math.log10(error))), 9)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _divergence(value: float, error: float | None = None) -> str:
    """Format nats with two digits; nothing for the reference's own zeros."""
    return f"{value:.2e}" + (f" ± {error:.0e}" if error and math.isfinite(error) else "")


def _percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _mebibytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f}"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _change(r: Result) -> str:
    return "" if r.role == "reference" else _with_error(r.ratio, r.ratio_se)


def _diverged(pick: Callable[[Result], str]) -> Callable[[Result], str]:
    """Blank the reference's cells: it does not diverge from itself."""
    return lambda r: "" if r.role == "reference" else pick(r)


COLUMNS = (
    Column("bits/value", "bits that a stored value takes, scales included", lambda r: _number(r.bits_per_value, 4)),
    Column("bytes/token", "bytes that a token takes in all KV layers", lambda r: f"{r.bytes_per_token:.0f}"),
    Column("KV MiB", "allocated for the whole context", lambda r: _mebibytes(r.kv_bytes)),
    Column("perplexity", "with its standard error", lambda r: _with_error(r.perplexity, r.perplexity_se)),
    Column("over reference", "perplexity over the reference's, on the same tokens, with its standard error", _change),
    Column(
        "mean KLD",
        "Kullback-Leibler divergence of the next token's distribution from the reference's, nats, standard error",
        _diverged(lambda r: _divergence(r.kld_mean, r.kld_mean_se)),
    ),
    Column("median", "half of the predictions diverge less, nats", _diverged(lambda r: _divergence(r.kld_median))),
    Column("95 %", "95 % of the predictions diverge less, nats", _diverged(lambda r: _divergence(r.kld_p95))),
    Column("99 %", "99 % diverge less", _diverged(lambda r: _divergence(r.kld_p99))),
    Column("99.9 %", "99.9 % diverge less", _diverged(lambda r: _divergence(r.kld_p999))),
    Column("max", "the prediction that diverges most", _diverged(lambda r: _divergence(r.kld_max))),
    Column("same top", "predictions with the reference's most likely token", _diverged(lambda r: _percent(r.same_top))),
    Column(
        "RMS Δp",
        "root mean square change of the right token's probability, percentage points",
        _diverged(lambda r: _percent(r.rms_delta_p)),
    ),
    Column(
        "not finite",
        "predictions that were NaN or infinite; they are in no other column",
        lambda r: str(r.n_non_finite) if r.n_non_finite else "",
    ),
    Column("greedy", "generated tokens equal to the reference's", lambda r: _percent(r.greedy_agreement, 1)),
    Column(
        "parts at",
        "generated token at which the texts part, on average",
        lambda r: _optional(r.greedy_first_divergence),
    ),
    Column("prefill tok/s", "prompt tokens per second", lambda r: _optional(r.prefill_tok_s)),
    Column("decode tok/s", "generated tokens per second", lambda r: _optional(r.decode_tok_s)),
)


def _columns(results: Sequence[Result]) -> tuple[Column, ...]:
    """Choose the columns in which some result has something to say."""
    return tuple(c for c in COLUMNS if any(c.cell(r) for r in results))


def _named(r: Result, best: Sequence[Result], label: str) -> str:
    """Label a line of the table, and say what it is."""
    if r in best:
        return f"◆ {label}"
    return label + {"reference": " (reference)", "floor": " (noise floor)"}.get(r.role, "")


def _facts(c: Conditions) -> tuple[tuple[str, str], ...]:
    decode = "token by token" if c.mode == "decode" else "in prompt chunks"
    facts = (
        ("model", c.model),
        ("text", f"{c.text}: {c.n_tokens} predictions in {c.n_windows} windows of {c.n_ctx} tokens, {decode}"),
        ("reference", f"cache of {c.reference}"),
        ("greedy", f"{c.greedy_tokens} generated tokens" if c.greedy_tokens else ""),
        ("backend", f"{c.backend}, kernel {c.kernel}"),
        ("machine", f"{c.cpu}, {c.threads} threads"),
        ("versions", f"hybridkv {c.hybridkv}, torch {c.torch}, Transformers {c.transformers}"),
        ("commit", c.commit or ""),
        ("date", c.date),
    )
    return tuple((name, text) for name, text in facts if text)


def _remarks(c: Conditions, results: Sequence[Result]) -> tuple[str, ...]:
    """Write what a reader must know before any number."""
    broken = [r.label for r in results if r.n_non_finite]
    return (
        *(() if c.complete else ("The run was stopped early: the figures are of what was measured until then.",)),
        *((f"Predictions that are not finite: {', '.join(broken)}.",) if broken else ()),
    )


_FRONT = "◆: no other candidate is both smaller and closer to the reference."


def markdown(conditions: Conditions, results: Sequence[Result]) -> str:
    """Write the evaluation in Markdown."""
    columns, best = _columns(results), front(results)
    lines = [f"# KV cache types: {_md(conditions.model)}", ""]
    for remark in _remarks(conditions, results):
        lines += [f"**{_md(remark)}**", ""]
    lines += [f"- {name}: {_md(text)}" for name, text in _facts(conditions)]
    lines += ["", _row(["cache", *(c.head for c in columns)]), _row(["---", *("---:" for _ in columns)])]
    lines += [_row([_named(r, best, _md(r.label)), *(c.cell(r) for c in columns)]) for r in results]
    lines += ["", _FRONT, "", *(f"- **{c.head}**: {c.meaning}." for c in columns)]
    if any(r.worst for r in results):
        lines += ["", "## Where it diverges most", "", "The text before the token in question ends the line.", ""]
        lines += [_row(["cache", "position", "KLD", "text"]), _row(["---", "---:", "---:", "---"])]
        lines += [
            _row([_md(r.label), str(p), _number(kld), _md(text)])
            for r in results
            for p, kld, text in r.worst[:_N_WORST]
        ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _md(text: str) -> str:
    """Escape text from a file for Markdown: in one line, without markup."""
    return re.sub(r"[\\`*{}\[\]<>|~$&#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", _line(text))


def _line(text: str) -> str:
    """Reduce text to one line of characters that can be shown."""
    text = re.sub(r"\s*\n\s*", " ⏎ ", text.strip())
    return "".join(c if c.isprintable() else "\ufffd" for c in re.sub(r"[ \t]+", " ", text))


_CSS = """
:root { color-scheme: light dark; --paper: #fbfbf9; --ink: #24292f; --quiet: #656a70; --line: #dcdcd6; --card: #fff;
  --accent: #b2571a }
@media (prefers-color-scheme: dark) { :root { --paper: #141618; --ink: #e6e6e0; --quiet: #9da3a8; --line: #33373b;
  --card: #1b1d20; --accent: #e8935a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem }
p, dl, ul { margin: .5rem 0; max-width: 46rem }
.remark { border-left: 4px solid var(--accent); padding: .2rem .8rem; font-weight: 600 }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem }
dt { color: var(--quiet) } dd { margin: 0 }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card) }
.scroll:focus-visible { outline: 2px solid var(--accent) }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
tbody tr:last-child > * { border-bottom: 0 }
thead th { color: var(--quiet); font-weight: 600 }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); max-width: 17rem;
  overflow: hidden; text-overflow: ellipsis }
tbody th { font-weight: 500 } .front > th { color: var(--accent); font-weight: 700 }
.other > * { font-style: italic; color: var(--quiet) }
details { margin: .6rem 0; font-size: .9rem } summary { cursor: pointer; color: var(--quiet) }
figure { margin: .5rem 0; padding: .6rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  max-width: 50rem }
figure svg { display: block; width: 100%; height: auto }
figure text { font-family: inherit !important }
figcaption { color: var(--quiet); font-size: .9rem; margin-bottom: .4rem }
.narrow { display: none }
@media (max-width: 640px) { body { padding: .7rem } .wide { display: none } .narrow { display: block }
  figure { padding: .4rem } th, td { padding: .3rem .5rem } th:first-child { max-width: 9rem }
  dl.facts { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .3rem } }
ol.worst { padding-left: 0; list-style: none } ol.worst li { margin: .3rem 0 }
ol.worst q { quotes: none; font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .8rem }
"""

_FIGURES = (
    ("quality", "Quality against size", "Left and low is better. The line joins the types that none beats in both."),
    ("positions", "Along the window", "A line that rises: the error grows with the context."),
    (
        "layers",
        "Layer by layer",
        "Relative error of each attention layer's output; a bright column is a layer to keep wide.",
    ),
    (
        "histogram",
        "How the divergence is spread",
        "A long right tail under a small mean: rare predictions change much. Bars: the means.",
    ),
)


def page(conditions: Conditions, results: Sequence[Result]) -> str:
    """Write the evaluation as one HTML page without a script, which loads nothing.

    Raises
    ------
    UsageError
        If matplotlib is missing.
    """
    title = f"KV cache types: {escape(_line(conditions.model))}"
    body = [f"<h1>{title}</h1>"]
    body += [f'<p class="remark" role="note">{escape(_line(r))}</p>' for r in _remarks(conditions, results)]
    facts = "".join(f"<dt>{name}</dt><dd>{escape(_line(text))}</dd>" for name, text in _facts(conditions))
    body += [f'<dl class="facts">{facts}</dl>', *_table(results), *_figures(results), *_worst(results)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _table(results: Sequence[Result]) -> list[str]:
    columns, best = _columns(results), front(results)
    heads = "".join(f'<th scope="col" title="{escape(c.meaning)}">{escape(c.head)}</th>' for c in columns)
    lines = []
    for r in results:
        kind = "other" if r.role != "candidate" else "front" if r in best else "plain"
        label = escape(_line(r.label))
        cells = "".join(f"<td>{escape(c.cell(r))}</td>" for c in columns)
        lines.append(f'<tr class="{kind}"><th scope="row" title="{label}">{_named(r, best, label)}</th>{cells}</tr>')
    meanings = "".join(f"<dt>{escape(c.head)}</dt><dd>{escape(c.meaning)}</dd>" for c in columns)
    return [
        "<h2>All measurements</h2>",
        '<div class="scroll" tabindex="0" role="region" aria-label="All measurements">',
        f'<table><thead><tr><th scope="col">cache</th>{heads}</tr></thead>',
        f"<tbody>{''.join(lines)}</tbody></table></div>",
        f"<p>{_FRONT}</p>",
        f'<details><summary>What the columns mean</summary><dl class="facts">{meanings}</dl></details>',
    ]


def _figures(results: Sequence[Result]) -> list[str]:
    from hybridkv_lab import plots  # without matplotlib this is an error, and Markdown needs none

    parts = []
    for name, title, caption in _FIGURES:
        draw: Callable[[Sequence[Result], int], str | None] = getattr(plots, name)
        for kind, width in (("wide", plots.WIDE), ("narrow", plots.NARROW)):
            if (svg := draw(results, width)) is None:
                continue
            if kind == "wide":
                parts.append(f"<h2>{title}</h2>\n<figure><figcaption>{caption}</figcaption>")
            parts.append(f'<div class="{kind}">{svg}</div>' + ("</figure>" if kind == "narrow" else ""))
    return parts


def _worst(results: Sequence[Result]) -> list[str]:
    parts = ["<h2>Where it diverges most</h2>"] if any(r.worst for r in results) else []
    for r in results:
        if r.worst:
            items = "".join(
                f"<li>position {position}, KLD {_number(kld)}: <q>{escape(_line(text))}</q></li>"
                for position, kld, text in r.worst
            )
            label = escape(_line(r.label))
            parts.append(f'<details><summary>{label}</summary><ol class="worst">{items}</ol></details>')
    return parts
