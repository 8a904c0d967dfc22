"""What is written: a page that shows everything and asks nobody, masks that overlay, folders that are whole."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from support.predictions import SHAPE, component, make_prediction
from support.scan_files import affine_of, canonical, reoriented, small_chest
from vlm3d.errors import OutputError
from vlm3d.inference.prediction import TRAINING_NOTES, Prediction
from vlm3d.labels import DISEASE_NAMES, LESIONS
from vlm3d.outputs.writer import write_prediction
from vlm3d.volume import Volume


def nodule_prediction(
    training: str = "untrained", report: str = "Clear lungs.", source: str = "ct.nii.gz"
) -> Prediction:
    return make_prediction(
        {"lung_nodule": [component()]},
        training,
        notes=("a note from reading",),
        source=source,
        text=report,
        findings=report,
    )


def make_masks() -> dict[str, np.ndarray]:
    masks = {lesion.key: np.zeros(SHAPE, bool) for lesion in LESIONS}
    masks["lung_nodule"][5:8, 13:18, 10:15] = True
    return masks


def write(out: Path, prediction: Prediction | None = None, **options: Any) -> dict[str, Path]:
    volume = Volume(small_chest(SHAPE), affine_of())
    return write_prediction(prediction or nodule_prediction(), volume, make_masks(), None, out, **options)


def test_all_files_and_the_schema(tmp_path: Path) -> None:
    files = write(tmp_path / "out")
    assert all(path.is_file() for path in files.values())
    read = Prediction.model_validate_json(files["prediction"].read_text())
    assert read.lesions[4].mask_file == "masks/lung_nodule.nii.gz"
    assert read.diseases == nodule_prediction().diseases


def test_the_page_shows_every_disease_and_measurement(tmp_path: Path) -> None:
    page = write(tmp_path / "out")["page"].read_text()
    assert all(name in page for name in DISEASE_NAMES)
    assert "right upper lobe" in page
    assert "17" in page
    assert "a note from reading" in page
    assert "not a medical device" in page


@pytest.mark.parametrize("training", ["untrained", "synthetic", "trained"])
def test_the_banner_stands_exactly_when_it_must(tmp_path: Path, training: str) -> None:
    files = write(tmp_path / "out", nodule_prediction(training))
    page, report = files["page"].read_text(), files["report"].read_text()
    note = TRAINING_NOTES[training]  # type: ignore[index]
    header = nib.load(files["lung_nodule"]).header["descrip"].tobytes()
    assert training.encode() in header
    if training == "trained":
        assert "UNTRAINED" not in page + report
    else:
        assert note in page
        assert note in report


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    page = write(tmp_path / "out", nodule_prediction(report=attack, source=attack))["page"].read_text()
    assert attack not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page


def test_the_page_asks_nobody(tmp_path: Path) -> None:
    page = write(tmp_path / "out")["page"].read_text()
    outside = re.findall(r"(?:src|href)\s*=\s*[\"']?(?!data:|#)([^\"'> ]+)", page)
    assert outside == []
    assert "@import" not in page
    assert not re.findall(r"url\((?!['\"]?data:)", page)
    assert not [found for found in re.findall(r"https?://[^\s\"'<)]+", page) if "www.w3.org" not in found]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_masks_overlay_the_scan_on_any_axes(tmp_path: Path, order: tuple[int, ...]) -> None:
    for number, flips in enumerate(itertools.product([False, True], repeat=3)):
        voxels, affine = reoriented(small_chest(SHAPE), affine_of(), order, flips)
        mask, _ = reoriented(make_masks()["lung_nodule"], affine_of(), order, flips)
        files = write_prediction(
            nodule_prediction(),
            Volume(voxels, affine),
            {"lung_nodule": mask},
            None,
            tmp_path / str(number),
            page=False,
        )
        image = nib.load(files["lung_nodule"])
        written = np.asarray(image.dataobj).transpose(2, 1, 0) > 0
        back, home = canonical(written, image.affine[:, [2, 1, 0, 3]])
        np.testing.assert_array_equal(back, make_masks()["lung_nodule"])
        np.testing.assert_allclose(home, affine_of(), atol=1e-3)


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm3d.outputs.writer.render_page", full)
    with pytest.raises(OutputError, match="disk is full"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path / "out")
    before = {key: path.read_bytes() for key, path in files.items()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm3d.outputs.writer.render_page", full)
    with pytest.raises(OutputError):
        write(tmp_path / "out", overwrite=True)
    assert {key: path.read_bytes() for key, path in files.items()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_only_our_own(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(OutputError):
        write(tmp_path / "out")
    write(tmp_path / "out", nodule_prediction(report="New."), overwrite=True)
    assert json.loads((tmp_path / "out" / "prediction.json").read_text())["report"]["text"] == "New."
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError):
        write(tmp_path / "out")
    with pytest.raises(OutputError):
        write(tmp_path / "out" / "deeper")
    assert (tmp_path / "out").read_text() == "mine"


def test_no_page_and_no_masks_when_not_wanted(tmp_path: Path) -> None:
    files = write(tmp_path / "out", page=False, masks_files=False)
    assert sorted(files) == ["prediction", "report"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["prediction.json", "report.txt"]
