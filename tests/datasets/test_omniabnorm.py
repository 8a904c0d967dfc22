"""OmniAbnorm-CT: key slices with neighbors to small volumes, masks a lesion, categories to our diseases."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm3d.datasets.omniabnorm import find_omniabnorm_cases, finding_text
from vlm3d.datasets.omniabnorm_categories import CategoryTable, lesion_of
from vlm3d.errors import ConfigError, DataError
from vlm3d.labels import DISEASE_NAMES

SHAPE = (48, 64)


def gray(offset: int) -> np.ndarray:
    """A slice whose brightness tells its place."""
    return np.full(SHAPE, 100 + 10 * offset, np.uint8)


def write_entry(root: Path, key: str, context: range = range(-4, 5), **more: Any) -> dict[str, Any]:
    for folder in ("image", "mask"):
        (root / folder / key).mkdir(parents=True, exist_ok=True)
    for offset in context:
        Image.fromarray(gray(offset)).save(root / "image" / key / f"{offset}.jpeg")
    mask = np.zeros(SHAPE, np.uint8)
    mask[8:24, 16:40] = 255
    Image.fromarray(mask).save(root / "mask" / key / "0.jpg")
    abnormality = {
        "id": 0,
        "group_id": 0,
        "label": "Consolidation",
        "category": ["Thorax", "Lung", "Pulmonary consolidation"],
        "description": "Dense opacity in the right lower lobe",
        "rewritten_findings": ["The right lower lobe is airless."],
    }
    return {
        "image": f"image/{key}",
        "context": list(context),
        "mask": f"mask/{key}",
        "abnormality": [abnormality],
    } | more


def write_json(root: Path, entries: dict[str, Any], name: str = "train.json") -> None:
    (root / name).write_text(json.dumps(entries), encoding="utf-8")


def test_a_key_slice_becomes_a_small_volume_with_its_mask(tmp_path: Path) -> None:
    write_json(tmp_path, {"17": write_entry(tmp_path, "17")})
    (case,) = find_omniabnorm_cases(f"omniabnorm:{tmp_path}")
    assert (case.case_id, case.split) == ("omniabnorm_17", "train")
    assert case.report == "Findings: Dense opacity in the right lower lobe."
    present = DISEASE_NAMES.index("Consolidation")
    assert case.labels_K is not None
    assert case.labels_K[present] == 1
    assert all(math.isnan(value) for place, value in enumerate(case.labels_K) if place != present)
    data = pickle.loads(pickle.dumps(case)).load()  # noqa: S301
    assert data.volume.shape_DHW == (9, *SHAPE)
    means = data.volume.voxels_DHW.mean(axis=(1, 2))
    np.testing.assert_allclose(means, [-1350 + 1500 / 255 * (100 + 10 * k) for k in range(-4, 5)], atol=8)
    assert data.volume.spacing_mm == (5.0, 0.75, 0.75)
    assert sum("assumed" in note for note in data.volume.notes) == 2
    mask = data.lesion_masks["consolidation"]
    assert set(np.flatnonzero(mask.any(axis=(1, 2)))) == {4}
    assert abs(int(mask.sum()) - 16 * 24) < 40  # JPEG's edges
    assert set(data.lesion_masks) == {"consolidation"}
    assert data.annotated_DHW is not None
    assert set(np.flatnonzero(data.annotated_DHW.any(axis=(1, 2)))) == {4}
    assert data.annotated_DHW[4].all()


def test_window_and_spacing_come_from_the_entry_then_the_specification(tmp_path: Path) -> None:
    entries = {
        "1": write_entry(tmp_path, "1", window_hu=[-1000, 1000], spacing_mm=[2, 1, 1]),
        "2": write_entry(tmp_path, "2"),
    }
    write_json(tmp_path, entries)
    first, second = find_omniabnorm_cases(f"omniabnorm:{tmp_path}:window=-160..240,spacing=3x0.5x0.5")
    one, two = first.load().volume, second.load().volume
    assert (one.spacing_mm, two.spacing_mm) == ((2.0, 1.0, 1.0), (3.0, 0.5, 0.5))
    assert one.voxels_DHW[4].mean() == pytest.approx(-1000 + 2000 * 100 / 255, abs=8)
    assert two.voxels_DHW[4].mean() == pytest.approx(-160 + 400 * 100 / 255, abs=2)
    assert not any("assumed" in note for note in (*one.notes, *two.notes))


def test_a_gap_between_neighbors_ends_the_volume(tmp_path: Path) -> None:
    entry = write_entry(tmp_path, "5", range(-2, 4))
    entry["context"] = list(range(-4, 5))
    (tmp_path / "image" / "5" / "2.jpeg").unlink()
    write_json(tmp_path, {"5": entry})
    volume = find_omniabnorm_cases(f"omniabnorm:{tmp_path}")[0].load().volume
    assert volume.shape_DHW[0] == 4  # -2, -1, 0, 1
    assert any("4 of 9 slices" in note for note in volume.notes)


def test_unknown_categories_and_foreign_images_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    liver = {"id": 0, "group_id": 0, "label": "Hepatic cyst", "category": ["Abdomen"], "description": "Cyst."}
    entries = {
        "1": write_entry(tmp_path, "1"),
        "2": write_entry(tmp_path, "2", abnormality=[liver]),
        "3": {"image": "image/3"},
        "4": write_entry(tmp_path, "4", plane="coronal"),
        "5": {"image": "../../etc", "mask": "mask/5", "abnormality": []},
    }
    write_json(tmp_path, entries, "omni_val.json")
    with caplog.at_level("WARNING"):
        (case,) = find_omniabnorm_cases(f"omniabnorm:{tmp_path}")
    assert (case.case_id, case.split) == ("omniabnorm_1", "valid")
    told = caplog.text
    assert "1 abnormalities of a category that the table does not know: Hepatic cyst" in told
    assert "1 images without a finding among the 18, left out: 2" in told
    assert "2 entries without image, mask, usable context, window or spacing, left out: 3, 5" in told
    assert "1 images that are not axial, left out: 4" in told
    both = find_omniabnorm_cases(f"omniabnorm:{tmp_path}:keep=all,split=test")
    assert [case.case_id for case in both] == ["omniabnorm_1", "omniabnorm_2"]
    assert {case.split for case in both} == {"test"}


def test_folders_of_another_machine_are_found_by_their_ends(tmp_path: Path) -> None:
    entry = write_entry(tmp_path, "9")
    entry["image"], entry["mask"] = "/data/somewhere/image/9", "D:\\omni\\mask\\9"
    write_json(tmp_path, {"9": entry})
    assert find_omniabnorm_cases(f"omniabnorm:{tmp_path}")[0].load().volume.shape_DHW[0] == 9


def test_missing_and_broken_pictures_are_one_clear_line(tmp_path: Path) -> None:
    write_json(tmp_path, {"1": write_entry(tmp_path, "1")})
    (case,) = find_omniabnorm_cases(f"omniabnorm:{tmp_path}")
    mask = tmp_path / "mask" / "1" / "0.jpg"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(mask)
    with pytest.raises(DataError, match="mask of abnormality 0 is"):
        case.load()
    mask.unlink()
    with pytest.raises(DataError, match="no mask of its abnormality 0"):
        case.load()
    (tmp_path / "image" / "1" / "3.jpeg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(DataError, match=r"3\.jpeg is no picture"):
        case.load()
    (tmp_path / "image" / "1" / "3.jpeg").unlink()
    (tmp_path / "image" / "1" / "0.jpeg").unlink()
    with pytest.raises(DataError, match="no key slice"):
        case.load()


def test_one_sentence_a_group() -> None:
    items = [
        {"group_id": 1, "description": "Two nodules.", "rewritten_findings": ["x"]},
        {"group_id": 1, "description": "Two nodules."},
        {"group_id": 2, "description": "", "rewritten_findings": ["Fluid on the left"]},
        {"group_id": 3, "description": "", "label": "Emphysema"},
        {"group_id": 4},
    ]
    assert finding_text(items) == "Findings: Two nodules. Fluid on the left. Emphysema."
    assert finding_text([{}]) is None


def test_categories_map_by_their_most_specific_known_name(tmp_path: Path) -> None:
    table = CategoryTable()
    assert {table.disease_of([name]) for name in DISEASE_NAMES} == set(DISEASE_NAMES)
    assert table.disease_of(["Lung", "Ground-Glass Opacities"]) == "Lung opacity"
    assert table.disease_of(["Pulmonary nodule", "Cavity"]) == "Lung nodule"
    assert table.disease_of(["Atelectasis", "Lung nodule"]) == "Lung nodule"
    assert table.disease_of(["Renal cyst"]) is None
    assert lesion_of("Lung opacity", ["Ground-glass opacity"]) == "ground_glass_opacity"
    assert lesion_of("Lung opacity", ["Crazy paving"]) is None
    assert lesion_of("Emphysema", ["Emphysema"]) is None
    (tmp_path / "categories.json").write_text('{"Cavity": "Lung nodule", "Bulla": null}')
    extended = CategoryTable.of_folder(tmp_path)
    assert extended.disease_of(["Lung", "Cavity"]) == "Lung nodule"
    assert extended.disease_of(["Emphysema", "Bulla"]) == ""
    (tmp_path / "categories.json").write_text('{"Cavity": "Hole"}')
    with pytest.raises(DataError, match="names the disease 'Hole'"):
        CategoryTable.of_folder(tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("window=1", "LOW..HIGH"),
        ("spacing=1x1", "DxHxW"),
        ("spacing=axbxc", "DxHxW"),
        ("keep=some", "keep is"),
    ],
)
def test_wrong_settings_are_one_clear_line(tmp_path: Path, settings: str, says: str) -> None:
    write_json(tmp_path, {"1": write_entry(tmp_path, "1")})
    with pytest.raises(ConfigError, match=says):
        find_omniabnorm_cases(f"omniabnorm:{tmp_path}:{settings}")


def test_files_that_are_no_annotations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="holds no OmniAbnorm-CT"):
        find_omniabnorm_cases(f"omniabnorm:{tmp_path}")
    for text in ('{"1": {"image": "a", "mask": "b", "context": []}', '["image", "mask", "context"]'):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(DataError, match=r"train\.json"):
            find_omniabnorm_cases(f"omniabnorm:{tmp_path}")
