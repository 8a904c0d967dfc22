"""Reports for cases that have none, written from labels, masks and places; always flagged as synthetic.

What a mask shows is told with its place and size. What only a label says is told without: no place is made up. Only what
is known to be absent is denied. The same case gets the same report on every machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.measurement import Component, find_landmarks, measure_lesion
from vlm3d.anatomy.regions import LUNG_IDS, REGION_BY_ID, REGIONS
from vlm3d.datasets import synthetic_sentences as wordings
from vlm3d.datasets.case import Case, CaseData
from vlm3d.datasets.phantom.reports import ReportText, listed, write_report
from vlm3d.datasets.phantom.truth import FindingTruth
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS, LESIONS
from vlm3d.preprocessing.orientation import canonical_affine, canonical_view, regions_to_canonical
from vlm3d.volume import RegionMap, Volume, spacing_from_affine

MIN_VOLUME_ML = 0.02
MAX_NODULES = 3
DENIED_SHARE = 0.6
"""Share of the absent findings that a report denies, as radiologists deny some."""

_LUNG_REGIONS = {REGION_BY_ID[number].name for number in LUNG_IDS}
_REGION_KEYS = {region.name: region.key for region in REGIONS}
_LESION_BY_KEY = {lesion.key: lesion for lesion in LESIONS}
Rng = np.random.Generator


def with_synthetic_report(case: Case, data: CaseData, regions: RegionMap | None = None) -> Case:
    """The case with a synthetic report, where neither it nor its data have one and something is known.

    Args:
        case: With its labels, or none.
        data: Its volume and masks.
        regions: Anatomical regions on the scan's grid; None takes the data's own, and without any, places are told by
            side and level alone.
    """
    described = case.described_by(data)
    if described.report is not None:
        return described
    pieces = measure_masks(data.volume, data.lesion_masks, regions or data.regions)
    report = write_synthetic_report(case.case_id, described.labels_K, pieces)
    return described if report is None else replace(described, report=report.text, report_is_synthetic=True)


def measure_masks(
    volume: Volume, masks: Mapping[str, NDArray[np.bool_]], regions: RegionMap | None
) -> dict[str, list[Component]]:
    """The pieces of each annotated lesion, largest first; an empty list where a lesion is known to be absent.

    Args:
        volume: The scan.
        masks: Lesion key -> mask on the scan's grid and axes.
        regions: On the same grid and axes, or None.
    """
    affine, shape_DHW = canonical_affine(volume.affine, volume.shape_DHW)
    regions_DHW = None if regions is None else regions_to_canonical(regions).labels_DHW
    landmarks = find_landmarks(regions_DHW, shape_DHW)
    return {
        key: measure_lesion(
            canonical_view(masks[key], volume.affine),
            regions_DHW,
            spacing_from_affine(affine),
            min_volume_ml=MIN_VOLUME_ML,
            lesion=_LESION_BY_KEY[key],
            landmarks=landmarks,
        )
        for key in LESION_KEYS
        if key in masks
    }


def write_synthetic_report(
    case_id: str,
    labels_K: Sequence[float] | None,
    pieces: Mapping[str, Sequence[Component]],
) -> ReportText | None:
    """Write a report from what is known.

    A lesion with a piece is present whatever the label says: masks are drawn, labels are guessed from text.

    Args:
        case_id: Chooses among wordings.
        labels_K: 0, 1 or NaN (unknown) for each of the 18 diseases, or None.
        pieces: Lesion key -> measured pieces, largest first; a key that is missing was not annotated.

    Returns:
        Findings, impression and recommendations; None where nothing is known.
    """
    status = _status(labels_K, pieces)
    if not status:
        return None
    rng = np.random.default_rng(list(hashlib.sha256(case_id.encode()).digest()[:16]))
    present = [name for name in DISEASE_NAMES if status.get(name)]
    absent = [name for name in DISEASE_NAMES if status.get(name) is False]
    sentences = [_pick(rng, wordings.OPENINGS)]
    for name in rng.permutation(present) if present else []:
        sentences += _told(str(name), pieces, rng)
    denied = [name for name in absent if rng.random() < DENIED_SHARE] or ([] if present else absent[:1])
    sentences += [_pick(rng, wordings.ABSENT[name]) for name in denied]
    return ReportText(
        " ".join(sentences),
        _impression(present, len(absent), pieces, rng),
        _recommendations(present, pieces, rng),
    )


def _status(labels_K: Sequence[float] | None, pieces: Mapping[str, Sequence[Component]]) -> dict[str, bool]:
    """Disease -> present or absent; what is unknown is missing."""
    status = {
        name: value == 1
        for name, value in zip(DISEASE_NAMES, labels_K or (), strict=labels_K is not None)
        if not math.isnan(value)
    }
    for key, found in pieces.items():
        disease = _LESION_BY_KEY[key].disease
        if found:
            status[disease] = True
        elif disease == _LESION_BY_KEY[key].name:  # no ground glass does not say that there is no opacity
            status.setdefault(disease, False)
    return status


def _told(disease: str, pieces: Mapping[str, Sequence[Component]], rng: Rng) -> list[str]:
    """The sentences about a finding that is present."""
    key = next((lesion.key for lesion in LESIONS if lesion.disease == disease), "")
    found = list(pieces.get(key, ()))
    if not found:
        return [_pick(rng, wordings.PRESENT[disease])]
    if key == "lung_nodule":
        return _nodules(found, rng)
    if key == "pleural_effusion":
        return [_effusion(found, rng)]
    volume_ml = sum(piece.volume_ml for piece in found)
    amount = _amount(key, volume_ml)
    places = listed([place_of(piece) for piece in found])
    text = _pick(rng, wordings.LOCATED[key]).format(
        places=places,
        size=_size(max(piece.max_diameter_mm for piece in found)),
        volume=_volume(volume_ml),
        amount=amount,
        Amount=amount.capitalize(),
    )
    return [text]


def place_of(piece: Component) -> str:
    """Where a piece lies: "the right upper lobe", else "the upper third of the left lung", else "the lung"."""
    if piece.region in _LUNG_REGIONS:
        return f"the {piece.region}"
    if piece.side == "midline":
        return "the lung next to the mediastinum"
    return f"the {piece.level} third of the {piece.side} lung"


def _nodules(found: Sequence[Component], rng: Rng) -> list[str]:
    said = []
    for piece in found[:MAX_NODULES]:
        place = place_of(piece)
        said.append(
            _pick(rng, wordings.NODULE).format(
                place=place,
                Place_capital=place[0].upper() + place[1:],
                size=_size(piece.max_diameter_mm),
            )
        )
    more = len(found) - MAX_NODULES
    if more == 1:
        said.append("One further lung nodule is smaller.")
    elif more > 1:
        said.append(_pick(rng, wordings.FURTHER_NODULES).format(count=more))
    return said


def _effusion(found: Sequence[Component], rng: Rng) -> str:
    volume_ml = {
        side: sum(piece.volume_ml for piece in found if piece.side == side)
        for side in ("right", "left", "midline")
    }
    if volume_ml["right"] and volume_ml["left"]:
        right, left = (_volume(volume_ml[side]) for side in ("right", "left"))
        return _pick(rng, wordings.EFFUSION_BOTH_SIDES).format(right=right, left=left)
    side = "right" if volume_ml["right"] else "left" if volume_ml["left"] else ""
    total = sum(volume_ml.values())
    amount = _amount("pleural_effusion", total)
    if not side:
        return f"{amount.capitalize()} pleural effusion of about {_volume(total)}."
    return _pick(rng, wordings.EFFUSION_ONE_SIDE).format(
        side=side, amount=amount, Amount=amount.capitalize(), volume=_volume(total)
    )


def _impression(
    present: Sequence[str], absent: int, pieces: Mapping[str, Sequence[Component]], rng: Rng
) -> str:
    if not present:
        known = absent == len(DISEASE_NAMES)
        return _pick(rng, wordings.NOTHING_FOUND if known else wordings.NOTHING_AMONG_KNOWN)
    lines = []
    for name in sorted(present, key=lambda name: -_total_ml(name, pieces)):
        lesion = next((lesion for lesion in LESIONS if lesion.disease == name), None)
        found = pieces.get(lesion.key, ()) if lesion is not None else ()
        sides = {piece.side for piece in found} & {"right", "left"}
        where = " on both sides" if len(sides) == 2 else f" on the {min(sides)}" if sides else ""
        wording = lesion.name if lesion is not None and found else _IMPRESSION_NAMES.get(name, name)
        lines.append(f"{wording}{where}.")
    return " ".join(lines)


_IMPRESSION_NAMES = {"Arterial wall calcification": "Aortic wall calcification"}


def _total_ml(disease: str, pieces: Mapping[str, Sequence[Component]]) -> float:
    keys = [lesion.key for lesion in LESIONS if lesion.disease == disease]
    return sum(piece.volume_ml for key in keys for piece in pieces.get(key, ()))


def _recommendations(present: Sequence[str], pieces: Mapping[str, Sequence[Component]], rng: Rng) -> str:
    """The same advice that a phantom's report gives for these findings."""
    truth = [
        _as_truth(_LESION_BY_KEY[key].disease, key, piece) for key, found in pieces.items() for piece in found
    ]
    told = {item.finding for item in truth}
    truth += [_as_truth(name, None, None) for name in present if name not in told]
    return write_report(truth, rng=rng).recommendations


def _as_truth(disease: str, key: str | None, piece: Component | None) -> FindingTruth:
    """A measured piece as the phantom's report writer takes it; what is unknown is small and solid."""
    return FindingTruth(
        finding=disease,
        lesion=key,
        region=_REGION_KEYS.get(piece.region if piece else "", "mediastinum"),
        side=piece.side if piece else "midline",
        level=piece.level if piece else "middle",
        size_mm=piece.max_diameter_mm if piece else 0.0,
        volume_ml=piece.volume_ml if piece else 0.0,
        severity=0.5,
        kind="solid",
        center_zyx_mm=(0.0, 0.0, 0.0),
    )


def _amount(key: str, volume_ml: float) -> str:
    small, large = wordings.AMOUNTS_ML[key]
    return wordings.AMOUNT_WORDS[(volume_ml >= small) + (volume_ml >= large)]


def _size(diameter_mm: float) -> str:
    return f"{max(round(diameter_mm), 1)} mm"


def _volume(volume_ml: float) -> str:
    """Rounded as a reader would: 0.4 ml, 7 ml, 130 ml."""
    if volume_ml < 1:
        return f"{max(volume_ml, 0.1):.1f} ml"
    step = 1 if volume_ml < 20 else 5 if volume_ml < 100 else 10
    return f"{round(volume_ml / step) * step} ml"


def _pick(rng: Rng, among: Sequence[str]) -> str:
    return among[int(rng.integers(len(among)))]
