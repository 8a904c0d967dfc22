"""MedSAM2-style NPZ: gray values to HU, objects to lesions, names to patients, CT-RATE's tables."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.scan_files import small_chest
from vlm3d.datasets.medsam_npz import find_npz_cases, patient_of
from vlm3d.errors import ConfigError, DataError
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS

LOW, HIGH = -1350.0, 150.0


def write_case(
    path: Path, objects: dict[int, tuple[slice, slice, slice]] | None = None, **arrays: Any
) -> None:
    hu = small_chest()
    gts = np.zeros(hu.shape, np.uint8)
    for number, part in (objects or {}).items():
        gts[part] = number
    gray = np.clip(np.rint((hu - LOW) / (HIGH - LOW) * 255), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"imgs": gray, "gts": gts, "spacing": np.array([8.0, 6.5, 6.5])} | arrays
    np.savez_compressed(path, **{key: value for key, value in stored.items() if value is not None})


BOX = (slice(2, 5), slice(10, 20), slice(8, 14))
OTHER = (slice(6, 8), slice(10, 20), slice(30, 36))


def test_a_case_is_read_in_hu_with_its_lesions(tmp_path: Path) -> None:
    write_case(tmp_path / "CT_a_001.npz", {2: BOX, 5: OTHER})
    (case,) = find_npz_cases(f"npz:{tmp_path}:window=-1350..150,split=test")
    assert (case.case_id, case.patient_id, case.split) == ("CT_a_001", "CT_a_001", "test")
    data = pickle.loads(pickle.dumps(case)).load()  # noqa: S301
    hu = np.clip(small_chest(), LOW, HIGH)
    assert np.abs(data.volume.voxels_DHW - np.maximum(hu, -1024)).max() <= (HIGH - LOW) / 255
    assert data.volume.spacing_mm == (8.0, 6.5, 6.5)
    assert list(data.lesion_masks) == list(LESION_KEYS)
    expected = np.zeros(hu.shape, bool)
    expected[BOX] = True
    np.testing.assert_array_equal(data.lesion_masks["pleural_effusion"], expected)
    assert data.lesion_masks["lung_nodule"][OTHER].all()
    assert not data.lesion_masks["consolidation"].any()


def test_the_table_beside_the_data_names_objects_window_and_patients(tmp_path: Path) -> None:
    table = {
        "objects": {"7": "lung_nodule", "9": "lung_nodule"},
        "window_hu": [LOW, HIGH],
        "patient": "^p(\\d+)",
    }
    (tmp_path / "objects.json").write_text(json.dumps(table))
    write_case(tmp_path / "p12_x.npz", {7: BOX, 9: OTHER})
    write_case(tmp_path / "deep" / "p12_y.npz", {7: BOX})
    write_case(tmp_path / "odd.npz", gts=None)
    cases = find_npz_cases(f"npz:{tmp_path}")
    assert [case.patient_id for case in cases] == ["12", "odd", "12"]
    by_id = {case.case_id: case.load() for case in cases}
    (mask,) = by_id["p12_x"].lesion_masks.values()
    assert mask[BOX].all()
    assert mask[OTHER].all()
    assert by_id["odd"].lesion_masks == {}


def test_a_window_in_the_file_wins(tmp_path: Path) -> None:
    write_case(tmp_path / "a.npz", window=np.array([LOW, HIGH]))
    data = find_npz_cases(f"npz:{tmp_path}:window=-200..300")[0].load()
    assert any("-1350..150 HU" in note for note in data.volume.notes)


@pytest.mark.parametrize(
    ("stem", "patient"),
    [
        ("CT_LUNG1-017_lesion02", "CT_LUNG1-017"),
        ("case_007", "case_007"),
        ("s4_rec1_slice12", "s4"),
        ("scan3", "scan3"),
    ],
)
def test_patients_from_names(stem: str, patient: str) -> None:
    assert patient_of(stem) == patient


def test_ct_rate_names_take_patient_split_labels_and_report(tmp_path: Path) -> None:
    write_case(tmp_path / "npz" / "CT_CT-RATE_valid_2_a_1.npz")
    write_case(tmp_path / "npz" / "train_11_b_2.npz")
    write_case(tmp_path / "npz" / "train_12_a_1.npz")
    (tmp_path / "t").mkdir()
    with (tmp_path / "t" / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["VolumeName", *DISEASE_NAMES])
        writer.writerow(["valid_2_a_1.nii.gz", 1, *[0] * 17])
    (tmp_path / "t" / "r.csv").write_text(
        "VolumeName,Findings_EN,Impressions_EN\nvalid_2_a_1.nii.gz,Port.,Port.\n"
    )
    (tmp_path / "t" / "train_no_chest.txt").write_text("train_12_a_1.nii.gz\n")
    second, first = find_npz_cases(f"npz:{tmp_path / 'npz'}:window=-1350..150,tables={tmp_path / 't'}")
    assert (first.patient_id, first.split, first.labels_K) == ("train_11", "train", None)
    assert (second.patient_id, second.split, second.labels_K) == ("valid_2", "valid", (1.0, *[0.0] * 17))
    assert second.report == "Findings: Port.\nImpression: Port."


def test_what_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no NPZ case"):
        find_npz_cases(f"npz:{tmp_path}")
    write_case(tmp_path / "a.npz", {77: BOX})
    with pytest.raises(DataError, match="window that nothing tells"):
        find_npz_cases(f"npz:{tmp_path}")[0].load()
    with pytest.raises(DataError, match="holds objects 77"):
        find_npz_cases(f"npz:{tmp_path}:window=-1350..150")[0].load()
    for window in ("150..-1350", "narrow"):
        with pytest.raises(ConfigError, match=r"LOW\.\.HIGH"):
            find_npz_cases(f"npz:{tmp_path}:window={window}")
    write_case(tmp_path / "b" / "a.npz")
    with pytest.raises(DataError, match="1 identifiers name more than one case"):
        find_npz_cases(f"npz:{tmp_path}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"objects": {"1": "tumour"}}', "names the lesion 'tumour'"),
        ('{"objects": {"x": "lung_nodule"}}', "cannot be read"),
        ('{"objects": {"300": "lung_nodule"}}', "ids are 1..255"),
        ('{"window_hu": [5, 1]}', "window_hu is"),
        ('{"window_hu": [5]}', "cannot be read"),
        ('{"patient": "p.*"}', "patient has a group"),
        ('{"patient": "("}', "cannot be read"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, text: str, says: str) -> None:
    write_case(tmp_path / "a.npz")
    (tmp_path / "objects.json").write_text(text)
    with pytest.raises(DataError, match=says):
        find_npz_cases(f"npz:{tmp_path}")
