"""Synthetic reports: what is known and nothing else, the same for a case for ever, with measured places."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.phantoms import COARSE_MM, coarse_phantom
from vlm3d.anatomy.measurement import Component
from vlm3d.config import PreprocessingConfig
from vlm3d.datasets.case import Case, CaseData
from vlm3d.datasets.phantom import generate_phantom
from vlm3d.datasets.phantom_source import phantom_data
from vlm3d.datasets.prepare import prepare
from vlm3d.datasets.store import read_manifest
from vlm3d.datasets.synthetic_reports import measure_masks, with_synthetic_report, write_synthetic_report
from vlm3d.evaluation.labeler import label_report
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS, LESIONS
from vlm3d.model.report_sections import parse_report
from vlm3d.preprocessing.orientation import from_canonical
from vlm3d.volume import RegionMap, Volume

STATUS = st.sampled_from([0.0, 1.0, math.nan])
UNKNOWN = (math.nan,) * len(DISEASE_NAMES)


def piece(**fields: Any) -> Component:
    told: dict[str, Any] = {
        "side": "right",
        "region": "right upper lobe",
        "level": "upper",
        "volume_ml": 0.9,
        "max_diameter_mm": 12.4,
        "centroid_index_dhw": (0, 0, 0),
        "key_slice": 0,
        "bounding_box": (slice(0, 1),) * 3,
    }
    return Component(**(told | fields))


def pieces_of(draw_sides: list[str]) -> list[Component]:
    return [piece(side=side, region=f"{side} lower lobe", level="lower") for side in draw_sides]


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=12),
    st.tuples(*[STATUS] * len(DISEASE_NAMES)),
    st.dictionaries(
        st.sampled_from(LESION_KEYS), st.lists(st.sampled_from(["right", "left"]), max_size=6).map(pieces_of)
    ),
)
def test_a_report_says_what_is_known_and_nothing_else(
    case_id: str, labels: tuple[float, ...], pieces: dict[str, list[Component]]
) -> None:
    report = write_synthetic_report(case_id, labels, pieces)
    shown = {lesion.disease for lesion in LESIONS if pieces.get(lesion.key)}
    present = {name for name, value in zip(DISEASE_NAMES, labels, strict=True) if value == 1} | shown
    known = {name for name, value in zip(DISEASE_NAMES, labels, strict=True) if value == value} | shown
    known |= {lesion.name for lesion in LESIONS if lesion.key in pieces} & set(DISEASE_NAMES)
    if not known:
        assert report is None
        return
    assert report is not None
    said = label_report(report.text)
    assert set(said.present) == present
    assert set(said.evidence) <= known  # nothing is denied that nobody looked at
    sections = parse_report(report.text)
    assert all(sections)
    if not shown:
        assert not re.search(r"right|left|lobe|third|\d", sections.findings + sections.impression)
    assert report == write_synthetic_report(case_id, labels, pieces)
    assert "  " not in report.text
    assert "{" not in report.text


def test_cases_are_worded_differently() -> None:
    labels = tuple(float(name in ("Emphysema", "Cardiomegaly")) for name in DISEASE_NAMES)
    texts = {write_synthetic_report(f"case_{n}", labels, {}).text for n in range(30)}
    assert len(texts) > 25


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ({"lung_nodule": [piece()]}, [r"right upper lobe", r"12 mm"]),
        ({"lung_nodule": [piece()] * 5}, [r"2 (further|smaller)"]),
        ({"lung_nodule": [piece()] * 4}, [r"One further lung nodule"]),
        (
            {"lung_nodule": [piece(region="", side="left", level="lower")]},
            [r"(?i)the lower third of the left lung"],
        ),
        (
            {
                "pleural_effusion": [
                    piece(side="right", region="right pleural space", volume_ml=612.0),
                    piece(side="left", region="left pleural space", volume_ml=88.0),
                ]
            },
            [r"(?i)bilateral|both sides", r"610 ml", r"90 ml"],
        ),
        ({"pleural_effusion": [piece(side="left", volume_ml=920.0)]}, [r"(?i)left", r"920 ml"]),
        ({"pericardial_effusion": [piece(side="midline", region="heart", volume_ml=43.0)]}, [r"45 ml"]),
        (
            {"consolidation": [piece(), piece(side="left", region="left lower lobe", volume_ml=30.0)]},
            [r"the right upper lobe and the left lower lobe"],
        ),
    ],
)
@pytest.mark.parametrize("case_id", ["a", "b", "c", "d"])
def test_places_and_sizes_are_told(pieces: dict[str, list[Component]], says: list[str], case_id: str) -> None:
    report = write_synthetic_report(case_id, None, pieces)
    assert report is not None
    for pattern in says:
        assert re.search(pattern, report.findings), report.findings


def test_a_mask_outweighs_a_label_and_an_empty_mask_denies() -> None:
    labels = tuple(0.0 for _ in DISEASE_NAMES)
    report = write_synthetic_report("a", labels, {"lung_nodule": [piece()]})
    assert label_report(report.text).present == ["Lung nodule"]
    nothing = write_synthetic_report("a", UNKNOWN, {"ground_glass_opacity": []})
    assert nothing is None  # no ground glass does not say that there is no opacity
    denied = write_synthetic_report("a", UNKNOWN, {"lung_nodule": []})
    assert re.search(r"no lung nodule", denied.findings, re.IGNORECASE)
    assert denied.impression == "None of the findings that were looked for."


def test_advice_follows_the_nodule() -> None:
    large = write_synthetic_report("a", None, {"lung_nodule": [piece(max_diameter_mm=14.0)]})
    small = write_synthetic_report("a", None, {"lung_nodule": [piece(max_diameter_mm=3.0)]})
    assert re.search(r"work-up|three months", large.recommendations)
    assert not re.search(r"work-up|three months", small.recommendations)


def case_of(data: CaseData, **fields: Any) -> Case:
    return Case("npz_17", "npz_17", "npz", lambda: data, **fields)


def bare(data: CaseData, **fields: Any) -> CaseData:
    """A phantom without what only a phantom knows."""
    return replace(data, **({"report": None, "report_is_synthetic": None, "facts": None} | fields))


def test_a_phantom_is_described_from_its_masks_as_it_was_made() -> None:
    phantom = generate_phantom(
        11,
        spacing_mm=COARSE_MM,
        findings={
            "Lung nodule": {"severity": 0.9, "region": "left_upper_lobe", "count": 1, "size_mm": 24},
            "Pleural effusion": {"severity": 0.8, "side": "right"},
        },
    )
    data = bare(phantom_data(phantom))
    described = with_synthetic_report(case_of(data), data)
    assert described.report_is_synthetic
    assert described.report is not None
    findings = parse_report(described.report).findings
    assert re.search(r"nodule[^.]*left upper lobe|left upper lobe[^.]*nodule", findings, re.IGNORECASE)
    assert re.search(r"right pleural effusion|effusion on the right|right, pleural", findings, re.IGNORECASE)
    assert label_report(described.report).present == ["Lung nodule", "Pleural effusion"]
    told = [float(number) for number in re.findall(r"(\d+) ml", findings)]
    masked_ml = phantom.lesion_masks["pleural_effusion"].sum() * math.prod(COARSE_MM) / 1000
    assert told == pytest.approx([masked_ml], rel=0.1)


def test_axes_and_missing_regions_do_not_move_a_place() -> None:
    phantom = coarse_phantom()
    data = bare(phantom_data(phantom))
    flipped_affine = phantom.volume.affine.copy()
    flipped_affine[:3, 2] *= -1
    flipped_affine[:3, 3] -= flipped_affine[:3, 2] * (phantom.volume.shape_DHW[2] - 1)
    other = CaseData(
        Volume(from_canonical(phantom.volume.voxels_DHW, flipped_affine), flipped_affine),
        RegionMap(
            np.ascontiguousarray(from_canonical(phantom.regions.labels_DHW, flipped_affine)), flipped_affine
        ),
        {key: from_canonical(mask, flipped_affine) for key, mask in phantom.lesion_masks.items()},
        labels_K=data.labels_K,
    )
    assert (
        with_synthetic_report(case_of(other), other).report
        == with_synthetic_report(case_of(data), data).report
    )
    without = measure_masks(phantom.volume, phantom.lesion_masks, None)
    within = measure_masks(phantom.volume, phantom.lesion_masks, phantom.regions)
    assert [p.side for p in without["lung_nodule"]] == [p.side for p in within["lung_nodule"]]
    assert {p.region for p in without["lung_nodule"]} == {""}


def test_a_prepared_case_carries_its_synthetic_report(tmp_path: Path) -> None:
    data = bare(phantom_data(coarse_phantom()), regions=None)
    case = case_of(data)
    preprocessing = PreprocessingConfig(spacing_mm=(8, 8, 8), max_shape=(32, 32, 32), size_multiple=(8, 8, 8))
    prepare([case], tmp_path / "store", preprocessing, anatomy="none", workers=1)
    prepared = read_manifest(tmp_path / "store")[case.case_id]
    assert prepared.report_is_synthetic
    assert prepared.report == with_synthetic_report(case, data).report


def test_a_real_report_is_kept() -> None:
    data = bare(phantom_data(coarse_phantom()))
    told = case_of(data, report="Findings: As dictated.")
    assert with_synthetic_report(told, data) == replace(told, labels_K=data.labels_K)
    nothing = CaseData(data.volume)
    assert with_synthetic_report(case_of(nothing), nothing).report is None
