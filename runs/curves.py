"""Draw the losses of trainings over their own minutes: OUT.svg RUN RUN ...

A panel for each run folder: the loss of every logged step as dots, its running mean as a line, phases apart by color,
and what its last validation found.
"""

from __future__ import annotations

import json
import sys
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEIGHT, COLUMNS, PAD = 330, 190, 2, 38
MEAN_OVER = 15
COLORS = ("#2a6fb0", "#b0552a", "#3f8f4f", "#7a4fa3")


def main() -> None:
    """Write the picture."""
    out, *folders = (Path(argument) for argument in sys.argv[1:])
    rows = -(-len(folders) // COLUMNS)
    panels = "".join(
        f'<g transform="translate({index % COLUMNS * WIDTH} {index // COLUMNS * HEIGHT})">{panel(folder)}</g>'
        for index, folder in enumerate(folders)
    )
    size = f"{COLUMNS * WIDTH} {rows * HEIGHT}"
    style = "text{font:11px sans-serif;fill:#444}.t{font-weight:bold}.e{text-anchor:end}"
    out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{panels}</svg>\n',
        encoding="utf-8",
    )


def panel(folder: Path) -> str:
    """One run's losses."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/total" in line]
    minutes = np.array([line["seconds"] for line in steps]) / 60
    loss = np.array([line["train/total"] for line in steps])
    low, high = 0.0, float(np.quantile(loss, 0.99)) * 1.05
    x = PAD + minutes / minutes.max() * (WIDTH - PAD - 12)
    y = 24 + (1 - np.clip((loss - low) / (high - low), 0, 1)) * (HEIGHT - 24 - PAD)
    base, right = HEIGHT - PAD, WIDTH - 12
    parts = [
        f'<text class="t" x="{PAD}" y="14">{escape(folder.name)}{validated(lines)}</text>',
        f'<path d="M{PAD} 24V{base}H{right}" fill="none" stroke="#999"/>',
        f'<text class="e" x="{PAD - 4}" y="30">{high:.1f}</text><text class="e" x="{PAD - 4}" y="{base}">{low:.0f}</text>',
        f'<text x="{PAD}" y="{base + 15}">loss over minutes</text>',
        f'<text class="e" x="{right}" y="{base + 15}">{minutes.max():.0f}</text>',
    ]
    first = 0
    for number, (phase, group) in enumerate(groupby(steps, key=lambda line: line["phase"])):
        last = first + len(list(group))
        color = COLORS[number % len(COLORS)]
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x[first:last], y[first:last], strict=True))
        parts.append(
            f'<path d="{dots}" stroke="{color}" stroke-width="2.5" stroke-linecap="round" opacity=".25"/>'
        )
        window = min(MEAN_OVER, last - first)
        mean = np.convolve(y[first:last], np.full(window, 1 / window), "valid")
        at = x[first + window // 2 : first + window // 2 + len(mean)]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(at, mean, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts.append(
            f'<text x="{PAD + 110 + 75 * number}" y="{base + 30}" style="fill:{color}">{escape(phase)}</text>'
        )
        first = last
    return "".join(parts)


def validated(lines: list[dict[str, Any]]) -> str:
    """What the last validation found."""
    for line in reversed(lines):
        for name, words in (
            ("valid/dice", "Dice"),
            ("valid/auroc", "AUROC"),
            ("valid/report_loss", "report loss"),
        ):
            if name in line:
                return f", validation {words} {line[name]:.3f}"
    return ""


if __name__ == "__main__":
    main()
