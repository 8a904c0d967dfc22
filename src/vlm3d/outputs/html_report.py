"""The page that a radiologist reads: one self-contained HTML file, without a single outside request."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from vlm3d.inference.prediction import UNTRAINED_TASK_NOTES, DiseaseFinding, LesionFinding, Prediction
from vlm3d.labels import EXTRA_COLORS, STORED_LESIONS
from vlm3d.outputs.grounded_text import Paragraph, check_summary, report_paragraphs
from vlm3d.outputs.lesion_cards import CanonicalScan, LesionRow, key_images, lesion_rows, overviews
from vlm3d.outputs.page_template import asset, page_template
from vlm3d.outputs.report_text import report_sections, warning_line
from vlm3d.outputs.slice_images import LUNG, MEDIASTINUM, body_box
from vlm3d.outputs.slice_viewer import build_viewer
from vlm3d.preprocessing.orientation import canonical_view, to_canonical
from vlm3d.volume import RegionMap, Volume

_LONGEST_FACT = 120


def render_page(
    prediction: Prediction,
    volume: Volume,
    masks: Mapping[str, NDArray[np.bool_]],
    regions: RegionMap | None = None,
) -> str:
    """Draw the whole page.

    Args:
        prediction: What is shown; every text in it is taken for hostile and escaped.
        volume: The scan on its own grid, in HU.
        masks: A bool mask on the scan's grid for each lesion key.
        regions: Anatomy on the scan's grid; its lobes are drawn faintly on the overviews.

    Returns:
        HTML, some megabytes at most.
    """
    scan = _canonical_scan(volume, masks, regions)
    rows = lesion_rows(prediction.lesions, scan)
    cards = key_images(rows, scan)
    start = rows[0].slice_index if rows else scan.center_dhw[0]
    viewer = build_viewer(
        scan.voxels_hu_DHW,
        scan.affine,
        scan.spacing_mm,
        scan.masks_DHW,
        scan.box,
        key_slices=[*(row.slice_index for row in rows), *_slices_looked_at(prediction.diseases)],
        start_slice=start,
    )
    paragraphs = report_paragraphs(prediction.report, rows)
    ranked = _ranked(prediction.diseases)
    script = asset("report.js")
    return _template().render(
        prediction=prediction,
        warning=warning_line(prediction),
        sections=report_sections(prediction),
        paragraphs=paragraphs,
        check=check_summary(prediction),
        told_by=_told_by(paragraphs),
        finding_anchors={disease.name: f"finding-{place}" for place, disease in enumerate(ranked, start=1)},
        writer_note=_writer_note(prediction),
        diseases=ranked,
        lesions=_lesions_by_disease(prediction.lesions),
        colors=_colors(prediction.lesions),
        names={lesion.key: lesion.name for lesion in prediction.lesions},
        rows=rows,
        cards=cards,
        overviews=overviews(rows, scan),
        viewer=viewer,
        windows=(LUNG, MEDIASTINUM),
        acquisition=_facts(volume.acquisition),
        settings=_facts(prediction.settings),
        style=Markup(asset("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def _slices_looked_at(diseases: Sequence[DiseaseFinding]) -> Iterator[int]:
    for disease in diseases:
        yield from (place.key_slice for place in disease.places if place.key_slice is not None)


def _canonical_scan(
    volume: Volume, masks: Mapping[str, NDArray[np.bool_]], regions: RegionMap | None
) -> CanonicalScan:
    canonical = to_canonical(volume)
    shown = {
        key: canonical_view(mask_DHW, volume.affine).astype(bool, copy=False)
        for key, mask_DHW in masks.items()
        if mask_DHW.any()
    }
    labels = None if regions is None else canonical_view(regions.labels_DHW, volume.affine)
    return CanonicalScan(
        voxels_hu_DHW=canonical.voxels_DHW,
        affine=canonical.affine,
        spacing_mm=canonical.spacing_mm,
        masks_DHW=shown,
        labels_DHW=labels,
        box=body_box(canonical.voxels_DHW, canonical.spacing_mm),
    )


def _ranked(diseases: list[DiseaseFinding]) -> list[DiseaseFinding]:
    """Positives first, each group by falling probability."""
    return sorted(diseases, key=lambda disease: (not disease.positive, -disease.probability))


def _told_by(paragraphs: list[Paragraph]) -> dict[int, list[tuple[int, str]]]:
    """Number of a lesion's row -> (index, words) of the sentences that tell of it."""
    told: dict[int, list[tuple[int, str]]] = {}
    for paragraph in paragraphs:
        for part in paragraph.parts:
            for row in part.rows:
                if part.number is not None:
                    told.setdefault(row.number, []).append((part.number, part.text))
    return told


def _writer_note(prediction: Prediction) -> str:
    """What stands beside the report where its writer was never trained."""
    model = prediction.model
    untrained = model.training == "untrained" or "generation" in model.untrained_tasks
    return UNTRAINED_TASK_NOTES["generation"] if untrained and prediction.report.generated else ""


def _lesions_by_disease(lesions: list[LesionFinding]) -> dict[str, list[LesionFinding]]:
    nearest = {lesion.key: lesion.disease for lesion in STORED_LESIONS}
    found: dict[str, list[LesionFinding]] = {}
    for lesion in lesions:
        if lesion.components and lesion.key in nearest:
            found.setdefault(nearest[lesion.key], []).append(lesion)
    return found


def _colors(lesions: list[LesionFinding]) -> dict[str, str]:
    """The lesions' colors; those that `vlm3d.labels` does not know take the next free one."""
    known = {lesion.key: lesion.color for lesion in STORED_LESIONS}
    others = [lesion.key for lesion in lesions if lesion.key not in known]
    return known | {key: EXTRA_COLORS[place % len(EXTRA_COLORS)] for place, key in enumerate(others)}


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested settings as flat (dotted name, short text) pairs."""
    facts: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            facts += [(f"{name}.{inner}", text) for inner, text in _facts(value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            facts.append((str(name), text if len(text) <= _LONGEST_FACT else text[: _LONGEST_FACT - 1] + "…"))
    return facts


def _number(value: float, digits: int = 1) -> str:
    """A number as it is read: no minus sign before zero, a true minus sign elsewhere."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "\u2212")


@functools.cache
def _template() -> jinja2.Template:
    return page_template("report.html.j2", number=_number)


__all__ = ["LesionRow", "render_page"]
