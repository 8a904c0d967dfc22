"""The page that explains a system's errors: one self-contained HTML file without a script or an outside request."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from vlm3d.evaluation.calibration import reliability
from vlm3d.evaluation.collected import KeySlice
from vlm3d.evaluation.error_analysis import (
    Confusion,
    Curve,
    confusion,
    noise_suspects,
    pr_curve,
    report_diffs,
    roc_curve,
    worst_cases,
)
from vlm3d.evaluation.evaluator import Evaluation
from vlm3d.evaluation.localization import SURFACE_TOLERANCE_MM
from vlm3d.evaluation.tables import comparison_rows, grounding_rows, number, short
from vlm3d.inference.prediction import DISCLAIMER, TRAINING_NOTES, UNTRAINED_TASK_NOTES
from vlm3d.labels import DISEASE_NAMES, LESIONS
from vlm3d.outputs.page_template import asset, page_template
from vlm3d.outputs.report_text import printable
from vlm3d.outputs.slice_images import LUNG, MEDIASTINUM, Figure, body_box, figure, outlines_on
from vlm3d.outputs.svg_plots import Point, curve_plot, heat_map, interval_bar, reliability_plot, scatter_plot

_NAMES = {lesion.key: lesion.name for lesion in LESIONS}
_COLORS = {lesion.key: lesion.color for lesion in LESIONS}
_SOFT_TISSUE = ("pericardial_effusion", "pleural_effusion")
_NO_SCAN_HU = -1000
_MOST_DOTS = 3000
_BINS = 10


@dataclass(frozen=True)
class DiseasePlots:
    """The curves of one disease.

    Attributes:
        name: The disease.
        positives: Of the known labels.
        cases: With a known label.
        plots: ROC, precision-recall and reliability, those that its data define.
    """

    name: str
    positives: int
    cases: int
    plots: tuple[Markup, ...]


@dataclass(frozen=True)
class KeyPicture:
    """One of the worst lesions as a picture."""

    slice: KeySlice
    name: str
    picture: Figure


def render_error_page(evaluation: Evaluation) -> str:
    """Draw the whole page.

    Args:
        evaluation: With `EvaluationSettings.key_slices` above 0 for pictures; all texts in it are escaped.

    Returns:
        HTML.
    """
    figures, cases = evaluation.figures, evaluation.cases
    classified = "classification" in figures
    errors = confusion(cases, evaluation.thresholds) if classified else None
    return _template().render(
        figures=figures,
        training=evaluation.training,
        warning=_warning(evaluation),
        disclaimer=DISCLAIMER,
        summary=_summary(figures),
        diseases=DISEASE_NAMES,
        plots=_disease_plots(evaluation) if classified else [],
        confusion=errors,
        heat_maps=_heat_maps(errors) if errors is not None else [],
        worst=worst_cases(cases, evaluation.thresholds) if classified else [],
        suspects=noise_suspects(cases) if classified or cases.reports else [],
        scatter=_scatter(evaluation),
        pictures=[_key_picture(item) for item in cases.key_slices],
        diffs=report_diffs(cases),
        grounding=grounding_rows(figures["grounding"]) if "grounding" in figures else [],
        comparison_rows=comparison_rows(figures["comparison"]) if "comparison" in figures else [],
        lesion_names=_NAMES,
        lesion_colors=_COLORS,
        tolerance_mm=SURFACE_TOLERANCE_MM,
        bar=_bar,
        style=Markup(asset("error_page.css")),
    )


def _warning(evaluation: Evaluation) -> str:
    """What a reader must know of the weights, the tasks that they never learned included."""
    if evaluation.training is None or evaluation.training_note:
        return evaluation.training_note
    notes = [TRAINING_NOTES[evaluation.training]]
    if evaluation.training != "untrained":
        notes += [UNTRAINED_TASK_NOTES[task] for task in evaluation.untrained_tasks]
    return " ".join(notes).strip()


def _summary(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The first things to read: name, figure, its interval."""
    chosen: list[tuple[str, Any]] = []
    if "classification" in figures:
        macro = figures["classification"]["macro"]
        chosen += [("macro AUROC", macro["auroc"]), ("macro AP", macro["ap"]), ("macro F1", macro["f1"])]
        chosen.append(("CRG", figures["classification"]["crg"]))
    if "localization" in figures:
        macro = figures["localization"]["macro"]
        chosen.append(("macro Dice", macro["dice"]))
        chosen.append(("lesions found", macro["single_lesions"]["sensitivity"]))
    if "boxes" in figures:
        chosen.append(("macro box IoU", figures["boxes"]["macro"]["iou"]))
    if "reports" in figures:
        reports = figures["reports"]
        chosen.append(("clinical F1 of reports", reports["clinical"]["macro"]["f1"]))
        if "words" in reports:
            chosen.append(("BLEU-4 of reports", reports["words"]["BLEU_4"]))
    return [(name, short(value), number(value).partition(" ")[2].strip("()")) for name, value in chosen]


def _disease_plots(evaluation: Evaluation) -> list[DiseasePlots]:
    cases, threshold_K = evaluation.cases, evaluation.thresholds.value_K
    labeled = cases.labeled_N
    probability_NK, label_NK = cases.probability_NK[labeled], cases.label_NK[labeled]
    bins = reliability(probability_NK, label_NK, _BINS)
    found = []
    for k, name in enumerate(DISEASE_NAMES):
        known = ~np.isnan(label_NK[:, k])
        score_N, truth_N = probability_NK[known, k], label_NK[known, k] == 1
        plots = [
            _curve(
                roc_curve(score_N, truth_N, threshold_K[k]),
                "diagonal",
                f"ROC curve of {name}",
                ("1 - specificity", "sensitivity"),
            ),
            _curve(
                pr_curve(score_N, truth_N, threshold_K[k]),
                f"{truth_N.mean() if truth_N.size else 0:.4f}",
                f"Precision-recall curve of {name}",
                ("recall", "precision"),
            ),
        ]
        if known.any():
            plots.append(
                reliability_plot(
                    bins.mean_probability_KB[k].tolist(),
                    bins.positive_share_KB[k].tolist(),
                    bins.cases_KB[k].tolist(),
                    label=f"Reliability of {name}",
                )
            )
        shown = tuple(plot for plot in plots if plot is not None)
        found.append(DiseasePlots(name, int(truth_N.sum()), int(known.sum()), shown))
    return found


def _curve(curve: Curve | None, base: str, label: str, axes: tuple[str, str]) -> Markup | None:
    return (
        None
        if curve is None
        else curve_plot(curve.x, curve.y, at=curve.at, base=base, label=label, axes=axes)
    )


def _heat_maps(errors: Confusion) -> list[tuple[str, Markup]]:
    maps = (
        ("Missed (row) while the column's was invented", errors.missed_with_invented_KK, "cases"),
        ("Errors of either kind in both (diagonal: all errors of a disease)", errors.together_KK, "cases"),
    )
    return [
        (title, heat_map(counts.tolist(), DISEASE_NAMES, label=title, unit=unit))
        for title, counts, unit in maps
    ]


def _scatter(evaluation: Evaluation) -> Markup | None:
    points = [
        Point(
            score.truth_ml,
            score.record.dice,
            _COLORS.get(score.lesion, "#888888"),
            printable(
                f"{score.case_id}: {_NAMES.get(score.lesion, score.lesion)}, "
                f"{score.truth_ml:.2f} ml, Dice {score.record.dice:.2f}"
            ),
        )
        for score in evaluation.cases.lesions
        if score.record.true
    ]
    if not points:
        return None
    step = -(-len(points) // _MOST_DOTS)
    return scatter_plot(
        points[::step], label="Dice against the volume of the true lesion", axes=("true volume, ml", "Dice")
    )


def _key_picture(item: KeySlice) -> KeyPicture:
    name = _NAMES.get(item.lesion, item.lesion)
    shape = (1, *item.truth_HW.shape)
    hu_DHW = np.full(shape, _NO_SCAN_HU, np.int16) if item.hu_HW is None else item.hu_HW[None]
    spacing_mm = (1.0, *item.spacing_mm)
    box = body_box(hu_DHW, spacing_mm)
    outlines = outlines_on(
        {"truth": item.truth_HW[None], "predicted": item.predicted_HW[None]},
        "axial",
        0,
        box,
        spacing_mm,
        {"truth": "truth", "predicted": "predicted"},
    )
    picture = figure(
        hu_DHW,
        "axial",
        0,
        box,
        spacing_mm,
        MEDIASTINUM if item.lesion in _SOFT_TISSUE else LUNG,
        alt=f"{name} of {item.case_id}, slice {item.index + 1}: true and predicted outlines",
        outlines=outlines,
        label="no scan" if item.hu_HW is None else None,
        longest_px=420,
    )
    return KeyPicture(item, name, picture)


def _bar(value: Any, chance: float = 0.5) -> Markup:
    """A figure of 0..1 with its interval, drawn; nothing where it is not defined."""
    if isinstance(value, Mapping):
        middle, low, high = value["value"], value["low"], value["high"]
    else:
        middle, low, high = value, None, None
    return Markup("") if middle is None else interval_bar(middle, low, high, chance)


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items) or "none"


@functools.cache
def _template() -> jinja2.Template:
    return page_template("error_page.html.j2", figure=number, short=short, percent=_percent, listed=_listed)
