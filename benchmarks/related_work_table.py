"""Rows of the related-work benchmark as one Markdown table, the best of each column in bold, whoever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        title: Its heading.
        shown: A row's cell; None where the row has none.
        rank: What the best is found by, higher being better; None ranks nothing.
    """

    title: str
    shown: Callable[[Mapping[str, Any]], str | None]
    rank: Callable[[Mapping[str, Any]], float] | None = None


def _auroc(row: Mapping[str, Any]) -> str | None:
    if row["auroc"] is None:
        return None
    low, high = row["auroc_interval"]
    interval = "-" if low is None or high is None else f"{low:.3f}, {high:.3f}"
    return f"{row['auroc']:.3f} [{interval}]"


COLUMNS = (
    Column("row", lambda row: row["title"]),
    Column("learns from", lambda row: row["learns_from"]),
    Column(
        "trained parameters, million",
        lambda row: f"{row['parameters'] / 1e6:.2f}",
        lambda row: -round(row["parameters"] / 1e6, 2),
    ),
    Column("seconds trained", lambda row: f"{row['seconds']:.0f}"),
    Column("steps x scans", lambda row: f"{row['steps']} x {row['batch_size']}"),
    Column("macro AUROC [95 %]", _auroc, lambda row: round(row["auroc"], 3)),
    Column(
        "macro Dice",
        lambda row: None if row["dice"] is None else f"{row['dice']:.3f}",
        lambda row: round(row["dice"], 3),
    ),
    Column(
        "seconds a scan",
        lambda row: f"{row['seconds_a_scan']:.2f}",
        lambda row: -round(row["seconds_a_scan"], 2),
    ),
    Column("peak MiB", lambda row: f"{row['peak_mb']}", lambda row: -row["peak_mb"]),
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, rows in their own order; what is best of a column, or equal to it as shown, is bold."""
    lines = [
        "| " + " | ".join(column.title for column in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    best = {}
    for column in COLUMNS:
        ranks = [column.rank(row) for row in rows if column.rank and column.shown(row) is not None]
        best[column.title] = max(ranks, default=None)
    for row in rows:
        cells = []
        for column in COLUMNS:
            text = column.shown(row)
            leads = text is not None and column.rank is not None and column.rank(row) == best[column.title]
            cells.append("-" if text is None else f"**{text}**" if leads else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
