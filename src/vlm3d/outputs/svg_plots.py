"""Small plots as SVG, drawn by hand: they take their colors from the page, so they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

SIDE = 120
_PAD_LEFT, _PAD_BOTTOM, _PAD = 22, 18, 6


@dataclass(frozen=True)
class Point:
    """One dot of a scatter plot.

    Attributes:
        x: On the logarithmic axis.
        y: 0..1.
        color: ``#rrggbb``.
        name: What it is, told when pointed at.
    """

    x: float
    y: float
    color: str
    name: str


def curve_plot(
    x: Sequence[float],
    y: Sequence[float],
    *,
    at: tuple[float, float] | None,
    base: str,
    label: str,
    axes: tuple[str, str],
) -> Markup:
    """A curve in the unit square with the point of the threshold.

    Args:
        x: Rising, 0..1.
        y: 0..1.
        at: The point in use.
        base: What chance looks like: ``"diagonal"``, or the height of a level line as a number in text.
        label: Read by those who cannot see the plot.
        axes: Names of the axes.
    """
    steps = " ".join(f"{_x(a):.1f},{_y(b):.1f}" for a, b in zip(x, y, strict=True))
    low, high = (0.0, 1.0) if base == "diagonal" else (float(base), float(base))
    parts = [
        f'<line class="chance" x1="{_x(0):.1f}" y1="{_y(low):.1f}" x2="{_x(1):.1f}" y2="{_y(high):.1f}"/>',
        f'<polyline class="curve" points="{steps}"/>',
    ]
    if at is not None:
        parts.append(f'<circle class="at" cx="{_x(at[0]):.1f}" cy="{_y(at[1]):.1f}" r="3"/>')
    return _unit_plot("".join(parts), label, axes)


def reliability_plot(
    predicted: Sequence[float], observed: Sequence[float], cases: Sequence[int], *, label: str
) -> Markup:
    """Observed share against predicted probability: a dot a bin, larger where it holds more cases."""
    most = max([*cases, 1])
    dots = [
        f'<circle class="bin" cx="{_x(p):.1f}" cy="{_y(o):.1f}" r="{1.5 + 4.5 * math.sqrt(n / most):.1f}">'
        f"<title>{n} cases: predicted {p:.2f}, observed {o:.2f}</title></circle>"
        for p, o, n in zip(predicted, observed, cases, strict=True)
        if n
    ]
    line = f'<line class="chance" x1="{_x(0):.1f}" y1="{_y(0):.1f}" x2="{_x(1):.1f}" y2="{_y(1):.1f}"/>'
    return _unit_plot(line + "".join(dots), label, ("predicted", "observed"))


def heat_map(values: Sequence[Sequence[int]], names: Sequence[str], *, label: str, unit: str) -> Markup:
    """A square table of counts as shades, rows and columns named alike.

    Args:
        values: Row by row.
        names: Of rows and columns.
        label: Read by those who cannot see it.
        unit: What is counted, as in "cases: row missed, column invented".
    """
    cell, left, top = 20, 196, 176
    size = cell * len(names)
    most = max([value for row in values for value in row] + [1])
    parts = []
    for i, name in enumerate(names):
        place = i * cell + cell / 2
        parts.append(f'<text class="row" x="{left - 6}" y="{top + place + 3.5}">{escape(name)}</text>')
        parts.append(
            f'<text class="column" transform="translate({left + place + 3.5} {top - 6}) rotate(-60)">{escape(name)}</text>'
        )
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = left + j * cell, top + i * cell
            title = f"{escape(names[i])} / {escape(names[j])}: {value} {escape(unit)}"
            share = value / most
            parts.append(
                f'<g><title>{title}</title><rect class="cell" x="{x}" y="{y}" width="{cell - 1}" '
                f'height="{cell - 1}" fill-opacity="{0.04 + 0.96 * share:.3f}"/>'
            )
            if value:
                tone = "strong" if share > 0.5 else "weak"
                parts.append(
                    f'<text class="count {tone}" x="{x + (cell - 1) / 2}" y="{y + cell / 2 + 3}">{value}</text>'
                )
            parts.append("</g>")
    width, height = left + size + 76, top + size + 4
    return _svg(width, height, "".join(parts), label, "heat")


def scatter_plot(points: Sequence[Point], *, label: str, axes: tuple[str, str]) -> Markup:
    """Dots over a logarithmic x axis from the least to the greatest x, y from 0 to 1."""
    width, height, left, bottom = 640, 300, 44, 40
    xs = [math.log10(point.x) for point in points if point.x > 0]
    low, high = (math.floor(min(xs)), math.ceil(max(xs))) if xs else (0, 1)
    high = max(high, low + 1)

    def place(log_x: float, y: float) -> tuple[float, float]:
        across = left + (log_x - low) / (high - low) * (width - left - 14)
        return across, 10 + (1 - y) * (height - bottom - 10)

    parts = []
    for power in range(low, high + 1):
        x, y = place(power, 0)
        tick = f"{10.0**power:g}"
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="10" x2="{x:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{y + 14:.1f}">{tick}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(low, share)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{width - 14}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{x - 5:.1f}" y="{y + 3.5:.1f}">{share:g}</text>')
    for point in points:
        if point.x > 0:
            x, y = place(math.log10(point.x), point.y)
            parts.append(
                f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{escape(point.color)}">'
                f"<title>{escape(point.name)}</title></circle>"
            )
    parts.append(
        f'<text class="tick middle" x="{(width + left) / 2}" y="{height - 6}">{escape(axes[0])}</text>'
    )
    parts.append(
        f'<text class="tick middle" transform="translate(11 {(height - bottom) / 2}) rotate(-90)">{escape(axes[1])}</text>'
    )
    return _svg(width, height, "".join(parts), label, "scatter")


def interval_bar(value: float, low: float | None, high: float | None, chance: float) -> Markup:
    """A figure between 0 and 1 as a dot with its interval, over a line of the whole range."""
    width, middle = 110, 7

    def x(share: float) -> float:
        return 3 + min(max(share, 0.0), 1.0) * (width - 6)

    parts = [
        f'<line class="range" x1="3" y1="{middle}" x2="{width - 3}" y2="{middle}"/>',
        f'<line class="chance" x1="{x(chance):.1f}" y1="1" x2="{x(chance):.1f}" y2="13"/>',
    ]
    if low is not None and high is not None:
        parts.append(
            f'<line class="interval" x1="{x(low):.1f}" y1="{middle}" x2="{x(high):.1f}" y2="{middle}"/>'
        )
    parts.append(f'<circle class="at" cx="{x(value):.1f}" cy="{middle}" r="3.2"/>')
    return Markup(
        f'<svg class="bar" viewBox="0 0 {width} 14" width="{width}" height="14" aria-hidden="true">{"".join(parts)}</svg>'
    )


def _x(share: float) -> float:
    return _PAD_LEFT + share * (SIDE - _PAD_LEFT - _PAD)


def _y(share: float) -> float:
    return _PAD + (1 - share) * (SIDE - _PAD_BOTTOM - _PAD)


def _unit_plot(content: str, label: str, axes: tuple[str, str]) -> Markup:
    left, right, bottom, top = _x(0), _x(1), _y(0), _y(1)
    frame = (
        f'<rect class="frame" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
        f'<text class="tick middle" x="{(left + right) / 2}" y="{SIDE - 4}">{escape(axes[0])}</text>'
        f'<text class="tick middle" transform="translate(9 {(top + bottom) / 2}) rotate(-90)">{escape(axes[1])}</text>'
        f'<text class="tick end" x="{left - 3}" y="{top + 6}">1</text>'
        f'<text class="tick end" x="{left - 3}" y="{bottom}">0</text>'
    )
    return _svg(SIDE, SIDE, frame + content, label, "unit")


def _svg(width: float, height: float, content: str, label: str, kind: str) -> Markup:
    # every text in it went through escape
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{content}</svg>'
    )
