"""Phantoms as a data source: seeds in a specification, folders on disk, and the same truth from both."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.phantoms import COARSE_MM, coarse_phantom
from vlm3d.datasets import phantom_source
from vlm3d.datasets.phantom import generate_phantom
from vlm3d.datasets.phantom.writing import write_phantom
from vlm3d.datasets.phantom_source import find_phantom_cases
from vlm3d.errors import ConfigError, DataError
from vlm3d.labels import DISEASE_NAMES, STORED_LESION_KEYS

COARSE = "spacing=6x4x4"


def test_seeds_become_cases_without_making_phantoms() -> None:
    cases = find_phantom_cases("phantom:3-6:split=train")
    assert [case.patient_id for case in cases] == ["phantom_000003", "phantom_000004", "phantom_000005"]
    assert {case.split for case in cases} == {"train"}
    assert {case.labels_K for case in cases} == {None}
    assert len(pickle.dumps(cases[0])) < 2000


def test_a_loaded_phantom_carries_its_truth() -> None:
    case = pickle.loads(pickle.dumps(find_phantom_cases(f"phantom:5-6:{COARSE}")[0]))  # noqa: S301
    data = case.load()
    made = generate_phantom(5, spacing_mm=COARSE_MM)
    np.testing.assert_array_equal(data.volume.voxels_DHW, made.volume.voxels_DHW)
    np.testing.assert_array_equal(data.regions.labels_DHW, made.regions.labels_DHW)
    assert set(data.lesion_masks) == set(STORED_LESION_KEYS)
    described = case.described_by(data)
    assert described.labels_K == tuple(made.disease_labels)
    assert described.report == made.report.text
    assert described.report_is_synthetic
    assert [item["finding"] for item in described.facts["findings"]] == [t.finding for t in made.truth]
    assert json.loads(json.dumps(described.facts)) == described.facts


def test_only_given_settings_reach_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, dict[str, Any]]] = []

    def generate(seed: int, **settings: Any) -> Any:
        asked.append((seed, settings))
        return coarse_phantom()

    monkeypatch.setattr(phantom_source, "generate_phantom", generate)
    find_phantom_cases("phantom:7-8:protocol=default")[0].load()
    find_phantom_cases("phantom:7-8:prevalence_scale=1.6,protocol=shifted,spacing=2x1x0.7")[0].load()
    assert asked == [
        (7, {}),
        (7, {"prevalence_scale": 1.6, "protocol": "shifted", "spacing_mm": (2.0, 1.0, 0.7)}),
    ]


def test_one_seed_with_other_settings_is_another_scan_of_the_patient() -> None:
    plain, coarse = (find_phantom_cases(spec)[0] for spec in ("phantom:1-2", f"phantom:1-2:{COARSE}"))
    assert plain.patient_id == coarse.patient_id
    assert plain.case_id != coarse.case_id


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("phantom:5-5", "names 0 phantoms"),
        ("phantom:9-5", "names 0 phantoms"),
        ("phantom:0-99999999999", "names 99999999999 phantoms"),
        ("phantom:0-5:colour=red", "unknown setting 'colour'"),
        ("phantom:0-5:split=test,split=train", "given twice"),
        ("phantom:0-5:split=dev", "split is one of train, valid, test"),
        ("phantom:0-5:spacing=3x2", "spacing is DxHxW"),
        ("phantom:0-5:spacing=0x1x1", "spacing is DxHxW"),
        ("phantom:0-5:prevalence_scale=nan", "prevalence_scale is a number"),
        ("phantom:0-5:protocol=fast", "protocol is None or 'shifted', got 'fast'"),
        ("phantom:0-5:split=", "key=value"),
        ("phantom:", "names no data"),
    ],
)
def test_a_wrong_specification_is_one_clear_line(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_phantom_cases(spec)


def test_settings_that_the_generator_refuses_are_one_clear_line() -> None:
    with pytest.raises(DataError, match="phantom seed 0 cannot be made: spacing_mm must be above zero"):
        phantom_source.load_phantom(0, {"spacing_mm": (0.0, 1.0, 1.0)})


def test_folders_tell_the_same_as_the_phantoms_they_were_written_from(tmp_path: Path) -> None:
    made = coarse_phantom()
    for number in range(2):
        write_phantom(made, tmp_path / f"phantom_{number:06d}")
    (case, again) = find_phantom_cases(f"phantom:{tmp_path}:split=valid")
    assert case.split == "valid"
    assert case.labels_K == tuple(made.disease_labels)
    assert case.report == made.report.text
    live = phantom_source.phantom_data(made)
    assert case.facts == live.facts
    data = case.load()
    np.testing.assert_array_equal(data.volume.voxels_DHW, made.volume.voxels_DHW)
    assert data.regions is not None
    np.testing.assert_array_equal(data.regions.labels_DHW, made.regions.labels_DHW)
    for key in STORED_LESION_KEYS:
        np.testing.assert_array_equal(data.lesion_masks[key], made.lesion_masks[key])
    assert find_phantom_cases(f"phantom:{tmp_path / 'phantom_000001'}")[0].patient_id == again.patient_id


def test_a_mask_that_a_folder_lacks_is_unknown_only_where_the_truth_names_the_finding(tmp_path: Path) -> None:
    """Folders written before lung signs had masks say nothing of where these lie."""
    phantom = generate_phantom(5, spacing_mm=COARSE_MM, findings={"Atelectasis": 0.8, "Lung nodule": 0.8})
    folder = write_phantom(phantom, tmp_path / "p")
    (folder / "masks" / "atelectasis.nii.gz").unlink()
    masks = find_phantom_cases(f"phantom:{folder}")[0].load().lesion_masks
    assert set(STORED_LESION_KEYS) - set(masks) == {"atelectasis"}
    assert masks["lung_nodule"].any()
    assert not masks["bronchiectasis"].any()


def test_a_folder_without_phantoms_or_with_a_broken_truth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no phantom"):
        find_phantom_cases(f"phantom:{tmp_path}")
    labels = dict.fromkeys(DISEASE_NAMES, 0)
    broken = {"seed": 1, "patient": {}, "findings": [], "labels": {**labels, "Emphysema": 3}}
    for text in ("{", json.dumps(broken), "[]"):
        (tmp_path / "truth.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"truth\.json"):
            find_phantom_cases(f"phantom:{tmp_path}")
