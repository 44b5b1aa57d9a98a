"""Pictures of an evaluation, as SVG text: the only importer of matplotlib.

Every picture is drawn for a width in CSS pixels, so that its text has the same size on a phone and on a desk. Text is
text, in the colour that surrounds it (`currentColor`); the same results give the same bytes. Knows nothing of pages:
called by `lab.report`, and for the README's picture.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from hybridkv.errors import UsageError
from hybridkv_lab.results import Result, candidates, front

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise UsageError("the HTML page needs matplotlib, which is missing", hint="pip install matplotlib") from error

WIDE, NARROW = 760, 350

_INK = "#010203"  # stands for currentColor, which matplotlib cannot say
_ACCENT, _QUIET = "#d5742a", "#5b8fb0"
_HUES = (
    *("#d5742a", "#3d8fd1", "#2f9e77", "#c96fa8", "#a98f1f"),
    *("#8a7fd8", "#cf5552", "#5d9c3c", "#3fa7b5", "#94806f"),
)
_DASHES = ("-", "--", ":")
_MAX_LABEL = 34

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hybridkv",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # matplotlib's own: the layout is the same everywhere
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.color": _INK,
    "hatch.linewidth": 0.4,
}

_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_STANDALONE = """<style>
svg { color: #24292f; --paper: #fbfbf9 } text { font-family: %s !important }
@media (prefers-color-scheme: dark) { svg { color: #e6e6e0; --paper: #1b1d20 } }
</style><rect x="-12" y="-12" width="%g" height="%g" rx="10" style="fill: var(--paper)"/>"""


def quality_svg(results: Sequence[Result], *, width: int = WIDE) -> str:
    """Draw quality against size as a file of its own, with a background, for a README in light and in dark.

    Raises
    ------
    UsageError
        If there is no candidate to draw.
    """
    return _standalone(quality(results, width))


def positions_svg(results: Sequence[Result], *, width: int = WIDE) -> str:
    """Draw divergence along the window as a file of its own; see `quality_svg`."""
    return _standalone(positions(results, width))


def _standalone(svg: str | None) -> str:
    """Turn a picture within a page into one by itself."""
    if svg is None:
        raise UsageError("nothing to draw: no candidate has a finite divergence")
    head, _, rest = svg.partition(">")
    x, y, w, h = (float(v) for v in head.split('"')[1].split())
    size = (w + 24, h + 24)
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{x - 12:g} {y - 12:g} {size[0]:g} {size[1]:g}" width="{size[0]:g}" height="{size[1]:g}" '
        f"{head[head.index('role=') :]}"
    )
    return f"{head}>{_STANDALONE % (_FONT, *size)}{rest}\n"


def quality(results: Sequence[Result], width: int) -> str | None:
    """Draw mean KLD against bits per value, with the front; None without a finite candidate."""
    drawn = [r for r in candidates(results) if math.isfinite(r.kld_mean)]
    if not drawn:
        return None
    best, least = front(drawn), _least(r.kld_mean for r in drawn)
    with _drawing():
        figure, axes = _figure(width, 0.62 * width if width >= 600 else 1.25 * width)
        x, y = [r.bits_per_value for r in best], [max(r.kld_mean, least) for r in best]
        axes.plot(x, y, drawstyle="steps-post", color=_ACCENT, linewidth=1.4, alpha=0.6, zorder=2)
        for r in drawn:
            at, color = (r.bits_per_value, max(r.kld_mean, least)), _ACCENT if r in best else _QUIET
            error = r.kld_mean_se if 0 < r.kld_mean_se < at[1] else None
            axes.errorbar(*at, yerr=error, fmt="o", markersize=5.5, color=color, elinewidth=1, zorder=3)
        axes.margins(0.13, 0.09)
        _log_y(axes)
        _floor_line(axes, results)
        axes.set_xlabel("bits per value")
        axes.set_ylabel("mean KLD from the reference, nats")
        _label_points(figure, axes, drawn, least)
        title = "Quality against size: mean KLD over bits per value"
        detail = "; ".join(f"{r.label}: {r.bits_per_value:.3g} bits, {r.kld_mean:.2g} nats" for r in drawn)
        return _svg(figure, f"quality-{width}", title, detail)


def positions(results: Sequence[Result], width: int) -> str | None:
    """Draw mean KLD along the window, a line for each candidate; None where there are no two buckets."""
    drawn = [r for r in candidates(results) if sum(_seen(v) for _, v, _ in r.positions) > 1]
    if not drawn:
        return None
    with _drawing():
        legend_rows = len(drawn) + 1
        figure, axes = _figure(width, 380 if width >= 600 else 300 + 15 * legend_rows)
        order = sorted(drawn, key=lambda r: next(v for _, v, _ in reversed(r.positions) if _seen(v)), reverse=True)
        for r in order:
            i = drawn.index(r)
            x, y = zip(*((p, v if _seen(v) else math.nan) for p, v, _ in r.positions), strict=True)
            dash = _DASHES[i // len(_HUES) % len(_DASHES)]
            axes.plot(x, y, color=_HUES[i % len(_HUES)], linestyle=dash, linewidth=1.6, label=_short(r.label))
        _log_y(axes)
        _floor_line(axes, results)
        axes.margins(x=0.02)
        axes.set_xlabel("position in the window, tokens")
        axes.set_ylabel("mean KLD, nats")
        place = "outside right upper" if width >= 600 else "outside lower left"
        figure.legend(loc=place, handlelength=2.6, labelspacing=0.35, borderaxespad=0.2)
        ends = "; ".join(f"{r.label}: {r.positions[0][1]:.2g} to {r.positions[-1][1]:.2g}" for r in order)
        return _svg(figure, f"positions-{width}", "Divergence by position in the window", ends)


def layers(results: Sequence[Result], width: int) -> str | None:
    """Draw each layer's relative error of attention output, candidates by layers; None where nothing was measured."""
    drawn = [r for r in candidates(results) if r.layers]
    columns = sorted({layer for r in drawn for layer, _ in r.layers})
    seen = [e for r in drawn for _, e in r.layers if _seen(e)]
    if not seen:
        return None
    cells = [[dict(r.layers).get(layer, math.nan) for layer in columns] for r in drawn]
    low, high = math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen)))
    height = 105 + 21 * len(drawn)
    with _drawing():
        figure, axes = _figure(width, height)
        norm = LogNorm(10.0**low, 10.0 ** max(high, low + 1))  # whole decades, so that the bar always has its numbers
        shown = [[v if _seen(v) else math.nan for v in row] for row in cells]
        axes.set_facecolor("none")
        edges = [i - 0.5 for i in range(len(columns) + 1)], [i - 0.5 for i in range(len(drawn) + 1)]
        colors = matplotlib.colormaps["viridis"].resampled(24)  # from 50 on the bar would be an image, not shapes
        mesh = axes.pcolormesh(*edges, shown, norm=norm, cmap=colors, edgecolor="none")
        for i, row in enumerate(cells):
            for j, value in enumerate(row):
                if not math.isfinite(value) and columns[j] in dict(drawn[i].layers):
                    axes.text(j, i, "×", ha="center", va="center")
        every = -(-len(columns) // max(1, int((width - 170) / 22)))
        axes.set_xticks(range(0, len(columns), every), [str(c) for c in columns[::every]])
        _rows(axes, [r.label for r in drawn])
        axes.spines[:].set_visible(False)
        axes.set_xlabel("model layer")
        bar = figure.colorbar(mesh, ax=axes, location="top", aspect=(width - 170) / 8, pad=0.02, fraction=8 / height)
        bar.set_label("relative error of the attention output")
        _plain_numbers(bar.ax.xaxis)
        bar.outline.set_visible(False)
        worst = [(r, *max(r.layers, key=lambda p: math.inf if math.isnan(p[1]) else p[1])) for r in drawn]
        detail = "; ".join(f"{r.label}: worst in layer {layer}, {e:.2g}" for r, layer, e in worst)
        return _svg(figure, f"layers-{width}", "Error of each layer's attention output", detail)


def histogram(results: Sequence[Result], width: int) -> str | None:
    """Draw how the KLD of single predictions is spread, a ridge for each candidate; None where nothing was counted."""
    drawn = [r for r in candidates(results) if sum(n for _, n in r.histogram)]
    if not drawn:
        return None
    with _drawing():
        figure, axes = _figure(width, 60 + 26 * len(drawn))
        for i, r in enumerate(drawn):
            bins = sorted(r.histogram)
            starts = [x for x, _ in bins]
            step = min((b - a for a, b in zip(starts, starts[1:], strict=False) if b > a), default=1.0)
            peak = max(n for _, n in bins)
            heights = [i - 0.85 * n / peak for _, n in bins]
            axes.stairs(heights, [*starts, starts[-1] + step], baseline=i, fill=True, color=_QUIET, alpha=0.75)
            if _seen(r.kld_mean):
                axes.plot([math.log10(r.kld_mean)] * 2, [i, i - 0.85], color=_ACCENT, linewidth=1.6)
        _rows(axes, [r.label for r in drawn])
        axes.set_ylim(len(drawn) - 0.9, -1)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(8 if width >= 600 else 4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{10**v:g}"))
        axes.set_xlabel("KLD of one prediction, nats")
        detail = "; ".join(f"{r.label}: median {r.kld_median:.2g}, 99.9 % {r.kld_p999:.2g}" for r in drawn)
        return _svg(figure, f"histogram-{width}", "How the KLD of single predictions is spread", detail)


@contextmanager
def _drawing() -> Iterator[None]:
    """Draw in our style, whatever the user's own is."""
    plain = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context({**plain, **_STYLE}), warnings.catch_warnings():
        # A script that DejaVu lacks is drawn by the reader's own fonts; only its width is a guess.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure at 72 dots per inch: a point is a pixel of the SVG."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _seen(value: float) -> bool:
    """Check whether a logarithmic axis has a place for it."""
    return 0 < value < math.inf


def _least(values: Any) -> float:
    """Choose where a value of 0 is drawn: a little under the smallest positive one."""
    return min((v for v in values if _seen(v)), default=1e-9) / 2


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _short(label: str) -> str:
    """Shorten a label so that it is safe in XML and leaves room for the plot; the table has the whole."""
    text = _printable(label)
    return text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"


def _log_y(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.grid()
    _plain_numbers(axes.yaxis)


def _plain_numbers(axis: Any) -> None:
    """Write powers of ten as 0.01 and 1e-05; label the steps between only where there is no power of ten in sight."""
    low, high = sorted(axis.get_view_interval())
    powers = math.floor(math.log10(high)) - math.ceil(math.log10(low)) + 1
    axis.set_major_locator(LogLocator(subs=(1.0,) if powers > 1 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def _floor_line(axes: Axes, results: Sequence[Result]) -> None:
    """Draw the reference measured against itself: nothing under this line means anything. Only name one far below."""
    bottom, _ = axes.get_ylim()
    for r in results:
        if r.role == "floor" and _seen(r.kld_mean):
            near = r.kld_mean > bottom / 10
            if near:
                axes.axhline(r.kld_mean, color=_INK, alpha=0.55, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
            axes.annotate(
                "noise floor" if near else f"↓ noise floor {r.kld_mean:.1g}",
                (0, r.kld_mean if near else 0),
                xycoords=("axes fraction", "data" if near else "axes fraction"),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=10,
                alpha=0.75,
            )


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


Box = tuple[float, float, float, float]
"""Left, low, right and high, in pixels."""

_OFFSETS = tuple(
    (dx, dy)
    for dy in (0, 7, -7, 10, -10, 13, -13, 18, -18, 26, -26, 34, -34, 44, -44, 56, -56)
    for dx in (8, -8, 20, -20, 40, -40)
)


def _label_points(figure: Figure, axes: Axes, drawn: Sequence[Result], least: float) -> None:
    """Write each label at the first place near its point that covers nothing, with a line to the point if far."""
    figure.draw_without_rendering()  # places the axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    best = front(drawn)
    points = {r: (r.bits_per_value, max(r.kld_mean, least)) for r in drawn}
    pixels = {r: axes.transData.transform(point) for r, point in points.items()}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in pixels.values()]
    taken += [t.get_window_extent(renderer).extents for t in axes.texts]
    taken += _strokes(axes)
    frame = axes.get_window_extent().extents
    for r in (*best, *sorted((r for r in drawn if r not in best), key=points.__getitem__)):
        (x, y), point = pixels[r], points[r]
        text = axes.annotate(
            _short(r.label), point, xytext=(0, 0), textcoords="offset points", va="center", fontsize=10
        )
        text.set_in_layout(False)
        box = text.get_window_extent(renderer)
        w, h = box.width, box.height
        corners = [(x + dx - (w if dx < 0 else 0), y + dy - h / 2) for dx, dy in _OFFSETS]
        places = [(left, low, left + w, low + h) for left, low in corners]
        # Under the front there is nothing, so that its own labels go there.
        ideal = (8, -10) if r in best else (8, 0)
        costs = [
            4 * _covered(place, taken, frame) + math.hypot(dx - ideal[0], 1.5 * (dy - ideal[1]))
            for place, (dx, dy) in zip(places, _OFFSETS, strict=True)
        ]
        chosen = costs.index(min(costs))
        dx, dy = _OFFSETS[chosen]
        text.set_horizontalalignment("right" if dx < 0 else "left")
        text.set_position((dx, dy))
        taken.append(places[chosen])
        if math.hypot(dx, dy) > 13:
            x, y = zip(point, axes.transData.inverted().transform((x + dx, y + dy)), strict=True)
            axes.plot(x, y, color=_INK, alpha=0.4, linewidth=0.7, scalex=False, scaley=False)


def _strokes(axes: Axes) -> list[Box]:
    """List the steps of the front as thin boxes, in pixels."""
    corners = [axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_drawstyle() != "default"]
    boxes: list[Box] = []
    for (x0, y0), (x1, y1) in (pair for line in corners for pair in zip(line, line[1:], strict=False)):
        boxes += [(x0, y0 - 0.5, x1, y0 + 0.5), (x1 - 0.5, min(y0, y1), x1 + 0.5, max(y0, y1))]
    return boxes


def _covered(place: Box, taken: Sequence[Box], frame: Box) -> float:
    """Measure what a label would cover of others, square pixels; a pixel outside the frame counts as ten."""
    left, low, right, high = place
    x0, y0, x1, y1 = frame
    outside = max(0.0, x0 - left) + max(0.0, right - x1) + max(0.0, y0 - low) + max(0.0, high - y1)
    shared = ((min(right, x1) - max(left, x0), min(high, y1) - max(low, y0)) for x0, y0, x1, y1 in taken)
    return 10 * outside + sum(w * h for w, h in shared if w > 0 and h > 0)


def _svg(figure: Figure, name: str, title: str, detail: str) -> str:
    """Write the figure as an `svg` element without a namespace, whose ids are its own on a page of several."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(_INK, "currentColor")
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box
    width, height = (float(v) for v in box[1].split()[2:])
    words = f"{title}. {_printable(detail)}"
    head = f'<svg viewBox="{box[1]}" width="{width:g}" height="{height:g}" role="img" aria-label="{escape(words)}">'
    return f"{head}<title>{escape(title)}</title>{svg.partition('>')[2]}"
