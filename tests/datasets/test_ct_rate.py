"""CT-RATE: both releases and their traps, the three tables with everything that can be wrong in them, the real ones."""

from __future__ import annotations

import csv
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from support.scan_files import canonical, small_chest
from vlm3d.datasets.ct_rate import find_ct_rate_cases, index_ct_rate, parse_volume_name
from vlm3d.datasets.ct_rate_tables import Acquisition, volume_key
from vlm3d.datasets.ct_rate_volume import affine_of, has_blank_header, read_ct_rate_volume, tell_release
from vlm3d.errors import ConfigError, DataError, InputError
from vlm3d.io import read_volume
from vlm3d.io.nifti import read_nifti
from vlm3d.labels import DISEASE_NAMES

SPACING_MM = (8.0, 6.5, 6.5)
ROW = Acquisition(1.0, -1024.0, SPACING_MM, position_mm=(-140.0, -130.0, -300.0))
PHILIPS = Acquisition(1.0, -8192.0, SPACING_MM, position_mm=(-140.0, -130.0, -300.0))


def write_v1(path: Path, row: Acquisition = ROW, dtype: type = np.int16) -> np.ndarray:
    """A file of the first release: stored values, blank header, axes (x, y, z); returns its HU (D, H, W)."""
    hu = small_chest()
    stored = ((hu.astype(np.float64) - row.intercept) / row.slope).astype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(stored.transpose(2, 1, 0), np.eye(4)), path)
    return hu


def write_v2(path: Path, row: Acquisition = ROW, hu: np.ndarray | None = None) -> np.ndarray:
    """A file of the second release: HU, true header."""
    hu = small_chest() if hu is None else hu
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = affine_of(row, hu.shape, "test")[:, [2, 1, 0, 3]]
    nib.save(nib.Nifti1Image(hu.astype(np.int16).transpose(2, 1, 0), affine), path)
    return hu


@pytest.mark.parametrize("row", [ROW, PHILIPS, Acquisition(0.5, -1024.0, SPACING_MM)])
@pytest.mark.parametrize("release", [None, "v1"])
def test_the_first_release_is_put_into_hu_on_its_grid(tmp_path: Path, row: Acquisition, release: Any) -> None:
    hu = write_v1(tmp_path / "valid_1_a_1.nii.gz", row, np.float64)
    scan = read_ct_rate_volume(tmp_path / "valid_1_a_1.nii.gz", row, release)
    np.testing.assert_array_equal(scan.voxels_DHW, hu)
    assert scan.spacing_mm == SPACING_MM
    assert any("first release" in note for note in scan.notes)
    assert any("blank header" in note for note in scan.notes)


@pytest.mark.parametrize("side_mm", [0.68, 0.7, 0.75, 0.8, 0.976, 1.0])
def test_a_header_without_a_place_is_blank_whatever_its_voxels(tmp_path: Path, side_mm: float) -> None:
    path = tmp_path / "valid_1_a_1.nii.gz"
    stored = (small_chest((20, 40, 40)).astype(np.int16) + 1024).transpose(2, 1, 0)
    nib.save(nib.Nifti1Image(stored, np.diag([side_mm, side_mm, 1.5, 1.0])), path)
    assert has_blank_header(read_nifti(path))
    moved = np.diag([side_mm, side_mm, 1.5, 1.0])
    moved[0, 3] = 0.1
    nib.save(nib.Nifti1Image(stored, moved), path)
    assert not has_blank_header(read_nifti(path))


def test_both_releases_of_a_volume_are_one_scan_in_the_patient(tmp_path: Path) -> None:
    write_v1(tmp_path / "a" / "valid_1_a_1.nii.gz")
    write_v2(tmp_path / "b" / "valid_1_a_1.nii.gz")
    first, second = (read_ct_rate_volume(tmp_path / d / "valid_1_a_1.nii.gz", ROW) for d in "ab")
    np.testing.assert_array_equal(first.affine, second.affine)
    np.testing.assert_array_equal(first.voxels_DHW, second.voxels_DHW)
    voxels, _ = canonical(first.voxels_DHW, first.affine)
    np.testing.assert_array_equal(voxels, small_chest())  # the spine behind, the smaller lung on the left


def test_the_second_release_is_read_as_it_is_without_a_row(tmp_path: Path) -> None:
    hu = write_v2(tmp_path / "valid_1_a_1.nii.gz")
    for release in (None, "v2"):
        np.testing.assert_array_equal(
            read_ct_rate_volume(tmp_path / "valid_1_a_1.nii.gz", None, release).voxels_DHW, hu
        )


@pytest.mark.parametrize("row", [ROW, PHILIPS])
def test_slope_on_the_second_release_is_refused(tmp_path: Path, row: Acquisition) -> None:
    write_v2(tmp_path / "valid_1_a_1.nii.gz", row)
    with pytest.raises(DataError, match="would be applied twice"):
        read_ct_rate_volume(tmp_path / "valid_1_a_1.nii.gz", row, "v1")


@pytest.mark.parametrize("row", [ROW, PHILIPS])
@pytest.mark.parametrize("release", [None, "v1", "v2"])
def test_values_rescaled_twice_are_refused(tmp_path: Path, row: Acquisition, release: Any) -> None:
    write_v2(tmp_path / "valid_1_a_1.nii.gz", row, small_chest() + int(row.intercept))
    with pytest.raises(DataError, match="applied twice"):
        read_ct_rate_volume(tmp_path / "valid_1_a_1.nii.gz", row, release)


def test_the_first_release_read_as_the_second_is_refused(tmp_path: Path) -> None:
    write_v1(tmp_path / "valid_1_a_1.nii.gz")
    with pytest.raises(DataError, match="not applied yet"):
        read_ct_rate_volume(tmp_path / "valid_1_a_1.nii.gz", ROW, "v2")


def test_stored_values_or_a_blank_header_without_a_row_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "valid_1_a_1.nii.gz"
    write_v1(path)
    with pytest.raises(DataError, match="no usable row"):
        read_ct_rate_volume(path, None)
    nib.save(nib.Nifti1Image(small_chest().transpose(2, 1, 0), np.eye(4)), path)
    with pytest.raises(DataError, match="blank header"):
        read_ct_rate_volume(path, None)
    assert read_ct_rate_volume(path, ROW).spacing_mm == SPACING_MM  # HU already, only the header is blank


def test_a_row_of_another_scan_is_refused_and_another_spacing_told(tmp_path: Path) -> None:
    path = tmp_path / "valid_1_a_1.nii.gz"
    write_v1(path)
    with pytest.raises(InputError, match="neither as it is nor"):
        read_ct_rate_volume(path, Acquisition(1.0, -5000.0, SPACING_MM))
    write_v2(path)
    scan = read_ct_rate_volume(path, Acquisition(1.0, -1024.0, (5.0, 6.5, 6.5)))
    assert scan.spacing_mm == SPACING_MM
    assert any("the header is believed" in note for note in scan.notes)


def test_a_small_offset_is_decided_by_the_header(tmp_path: Path) -> None:
    row = Acquisition(1.0, -3.0, SPACING_MM)
    assert tell_release(small_chest(), 1.0, -3.0) == "either"
    hu = write_v1(tmp_path / "valid_1_a_1.nii.gz", row)
    np.testing.assert_array_equal(read_ct_rate_volume(tmp_path / "valid_1_a_1.nii.gz", row).voxels_DHW, hu)
    write_v2(tmp_path / "valid_1_a_1.nii.gz", row)
    np.testing.assert_array_equal(read_ct_rate_volume(tmp_path / "valid_1_a_1.nii.gz", row).voxels_DHW, hu)


# ----- tables


def volume_path(root: Path, name: str, fixed: bool = False) -> Path:
    split, patient, scan, _ = name.split("_")
    folder = f"{split}_fixed" if fixed else split
    return root / folder / f"{split}_{patient}" / f"{split}_{patient}_{scan}" / f"{name}.nii.gz"


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]], **kwargs: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=kwargs.pop("encoding", "utf-8")) as file:
        csv.writer(file, **kwargs).writerows([header, *rows])


LABELS = ("VolumeName", *DISEASE_NAMES)
REPORTS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
METADATA = ("VolumeName", "Manufacturer", "XYSpacing", "RescaleIntercept", "RescaleSlope", "ZSpacing")


def label_row(name: str, *positive: str) -> list[Any]:
    return [f"{name}.nii.gz", *(int(disease in positive) for disease in DISEASE_NAMES)]


def metadata_row(name: str) -> list[Any]:
    return [f"{name}.nii.gz", "Philips", "[6.5, 6.5]", -1024, 1, 8.0]


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """Two patients; the second has two scans, one with two reconstructions."""
    for name in ("valid_1_a_1", "train_7_a_1", "train_7_b_1", "train_7_b_2"):
        volume_path(tmp_path, name).parent.mkdir(parents=True, exist_ok=True)
        volume_path(tmp_path, name).touch()
    names = ("valid_1_a_1", "train_7_a_1", "train_7_b_1", "train_7_b_2")
    write_table(tmp_path / "labels.csv", LABELS, [label_row(name, "Emphysema") for name in names])
    write_table(
        tmp_path / "reports.csv",
        REPORTS,
        [[f"{name}.nii.gz", "", "", f"Findings of {name[:7]}.", "Emphysema."] for name in names],
    )
    write_table(tmp_path / "meta.csv", METADATA, [metadata_row(name) for name in names])
    return tmp_path


def test_a_complete_download_joins_without_a_word(download: Path) -> None:
    index = index_ct_rate(download)
    assert index.summary.problems == {}
    assert index.summary.counts == {
        "volumes": 4,
        "studies": 3,
        "patients": 2,
        "with labels": 4,
        "with a report": 4,
        "tables": 3,
    }
    by_id = {case.case_id: case for case in index.cases}
    assert by_id["train_7_b_2"].patient_id == by_id["train_7_a_1"].patient_id == "train_7"
    assert by_id["train_7_b_2"].facts["study"] == "train_7_b"
    assert by_id["valid_1_a_1"].split == "valid"
    assert by_id["valid_1_a_1"].report == "Findings: Findings of valid_1.\nImpression: Emphysema."
    assert by_id["valid_1_a_1"].labels_K == tuple(float(name == "Emphysema") for name in DISEASE_NAMES)
    assert not by_id["valid_1_a_1"].report_is_synthetic


def test_a_joined_case_loads_in_another_process(download: Path) -> None:
    hu = write_v1(volume_path(download, "valid_1_a_1"))
    (case,) = find_ct_rate_cases(f"ct_rate:{download}:split=valid")
    data = pickle.loads(pickle.dumps(case)).load()  # noqa: S301
    np.testing.assert_array_equal(data.volume.voxels_DHW, hu)
    assert data.volume.spacing_mm == SPACING_MM
    assert data.lesion_masks == {}
    (claimed,) = find_ct_rate_cases(f"ct_rate:{download}:split=valid,release=v2")
    with pytest.raises(DataError, match="not applied yet"):
        claimed.load()


def test_of_two_releases_the_second_is_read_and_both_are_counted(download: Path) -> None:
    write_v2(volume_path(download, "valid_1_a_1", fixed=True))
    write_v1(volume_path(download, "valid_1_a_1"))
    index = index_ct_rate(download, split="valid")
    assert index.summary.count_of("volumes found in two places, one read") == 1
    assert not any("first release" in note for note in index.cases[0].load().volume.notes)
    first = index_ct_rate(download, split="valid", release="v1").cases[0].load().volume
    assert any("first release" in note for note in first.notes)


def reorder(download: Path) -> None:
    with (download / "labels.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    order = [*range(1, len(rows[0])), 0]
    write_table(
        download / "labels.csv", [rows[0][i] for i in order], [[row[i] for i in order] for row in rows[1:]]
    )


def rewrite(encoding: str, **kwargs: Any) -> Callable[[Path], None]:
    def change(download: Path) -> None:
        for path in download.glob("*.csv"):
            with path.open(newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            write_table(path, header, rows, encoding=encoding, **kwargs)

    return change


def without_endings(download: Path) -> None:
    for path in download.glob("*.csv"):
        path.write_text(path.read_text().replace(".nii.gz", ""))


@pytest.mark.parametrize(
    "change",
    [
        reorder,
        rewrite("utf-8-sig"),
        rewrite("utf-8", delimiter=";"),
        rewrite("utf-8", quoting=csv.QUOTE_ALL, lineterminator="\n"),
        rewrite("utf-16", delimiter="\t"),
        without_endings,
    ],
)
def test_the_way_a_table_is_written_does_not_matter(download: Path, change: Callable[[Path], None]) -> None:
    before = index_ct_rate(download)
    change(download)
    after = index_ct_rate(download)
    assert after.summary == before.summary
    for one, other in zip(after.cases, before.cases, strict=True):
        assert (one.labels_K, one.report, one.facts) == (other.labels_K, other.report, other.facts)


def test_quoted_line_breaks_and_not_given_sections(download: Path) -> None:
    write_table(
        download / "reports.csv",
        REPORTS,
        [
            ["valid_1_a_1.nii.gz", "", "", 'A "small"\nnodule;\r\n two, lines', "Not given."],
            ["train_7_a_1.nii.gz", "", "", "Not given.", " nan "],
        ],
    )
    index = index_ct_rate(download)
    by_id = {case.case_id: case for case in index.cases}
    assert by_id["valid_1_a_1"].report == 'Findings: A "small" nodule; two, lines'
    assert by_id["train_7_a_1"].report is None
    assert index.summary.problems["reports without a word, left out"] == ["train_7_a_1"]
    assert index.summary.count_of("volumes without reports") == 3


def test_every_oddity_of_the_tables_is_counted_and_named(download: Path) -> None:
    names = ("valid_1_a_1", "train_7_a_1")
    rows = [label_row(name, "Emphysema") for name in names]
    rows += [
        label_row("valid_1_a_1", "Emphysema"),  # twice alike
        label_row("train_7_a_1", "Cardiomegaly"),  # contradicts
        label_row("train_7_b_1"),
        label_row("train_99_a_1"),  # no file
        label_row("brain_1"),  # no volume of CT-RATE
        ["train_7_b_2.nii.gz", 1, 0],  # too short
    ]
    rows[4][1] = "yes"
    write_table(download / "labels.csv", LABELS, rows)
    broken = metadata_row("train_7_a_1")
    broken[2] = "[6.5]"
    write_table(download / "meta.csv", METADATA, [metadata_row("valid_1_a_1"), broken])
    (download / "train" / "extra.nii.gz").touch()
    (download / "no_chest_train.txt").write_text("train_7/train_7_b/train_7_b_1.nii.gz\n\n")
    index = index_ct_rate(download)
    assert index.summary.problems == {
        "image files that are not named as CT-RATE names volumes, left out": ["extra.nii.gz"],
        "rows with another number of columns, left out": ["labels.csv line 9"],
        "volumes with labels that are neither 0 nor 1, taken as unknown": ["train_7_b_1"],
        "rows of labels given twice alike, counted once": ["valid_1_a_1"],
        "volumes whose rows of labels contradict each other, left out": ["train_7_a_1"],
        "rows of metadata without usable slope, intercept or spacing, left out": ["train_7_a_1"],
        "volumes without a chest, left out": ["train_7_b_1"],
        "volumes with the labels of another reconstruction of their study": ["train_7_b_2"],
        "volumes without labels": ["train_7_a_1"],
        "volumes of the tables without a file": ["train_99_a_1"],
        "rows of the tables that name no CT-RATE volume": ["brain_1"],
        "volumes without metadata": ["train_7_a_1", "train_7_b_2"],
    }
    by_id = {case.case_id: case for case in index.cases}
    assert sorted(by_id) == ["train_7_a_1", "train_7_b_2", "valid_1_a_1"]
    assert math.isnan(by_id["train_7_b_2"].labels_K[0])
    assert by_id["train_7_b_2"].labels_K[1:] == (0.0,) * 17
    assert by_id["train_7_a_1"].labels_K is None
    lines = index.summary.lines()
    assert lines[0].startswith("3 volumes, 3 studies, 2 patients")
    assert "1 volumes without labels: train_7_a_1" in lines


def test_reconstructions_that_disagree_are_named(download: Path) -> None:
    rows = [label_row("train_7_b_1", "Emphysema"), label_row("train_7_b_2")]
    write_table(download / "labels.csv", LABELS, rows)
    problems = index_ct_rate(download, split="train").summary.problems
    assert problems["studies whose reconstructions have different labels, each kept"] == ["train_7_b"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("labels.csv", "VolumeName," + ",".join(DISEASE_NAMES[:-1]), "lacks 1 of its columns"),
        ("reports.csv", "VolumeName,Findings_EN", "lacks 1 of its columns: Impressions_EN"),
        ("meta.csv", "VolumeName,RescaleSlope", "lacks 3 of its columns"),
        ("meta.csv", "VolumeName,RescaleSlope,RescaleSlope", "more than once"),
    ],
)
def test_a_table_without_its_columns_is_refused(download: Path, name: str, content: str, says: str) -> None:
    (download / name).write_text(content + "\n")
    with pytest.raises(DataError, match=says):
        index_ct_rate(download)


def test_bytes_that_are_no_text_are_refused(download: Path) -> None:
    with (download / "reports.csv").open("ab") as file:
        file.write(b"valid_1_a_1.nii.gz,,,caf\xe9,x\n")
    with pytest.raises(DataError, match=r"reports\.csv cannot be read"):
        index_ct_rate(download)
    (download / "reports.csv").unlink()
    (download / "notes.csv").write_bytes(b"caf\xe9,b\n1,2\n")  # not CT-RATE's, left alone
    assert index_ct_rate(download).summary.counts["with a report"] == 0


def test_wrong_folders_and_settings_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no CT-RATE volume"):
        find_ct_rate_cases(f"ct_rate:{tmp_path}")
    with pytest.raises(DataError, match="there is no folder"):
        find_ct_rate_cases(f"ct_rate:{tmp_path / 'x'}")
    with pytest.raises(ConfigError, match="release is one of v1, v2"):
        find_ct_rate_cases(f"ct_rate:{tmp_path}:release=3")


def test_names() -> None:
    assert volume_key("a/b\\train_1_a_2.NII.GZ ") == "train_1_a_2"
    for name in ("train_1_a", "test_1_a_1", "train_x_a_1", "train_1_a_1_2", ""):
        assert parse_volume_name(name) is None


@pytest.mark.real_data
def test_every_study_of_the_real_tables_joins(real_data: Path, tmp_path: Path) -> None:
    tables = real_data / "ct_rate_layout"
    with (tables / "valid_predicted_labels.csv").open(newline="", encoding="utf-8") as file:
        names = [volume_key(row["VolumeName"]) for row in csv.DictReader(file)]
    for name in names:
        path = volume_path(tmp_path, name, fixed=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (example,) = (name for name in names if name == "valid_2_a_1")
    index = index_ct_rate(tmp_path, tables_folder=tables)
    assert index.summary.counts == {
        "volumes": 1921,
        "studies": 992,
        "patients": 818,
        "with labels": 1921,
        "with a report": 1921,
        "tables": 3,
    }
    assert index.summary.problems == {}
    by_study: dict[str, set[Any]] = {}
    for case in index.cases:
        assert case.report is not None
        assert case.report.startswith("Findings: ")
        by_study.setdefault(case.facts["study"], set()).add((case.labels_K, case.report))
    assert {len(told) for told in by_study.values()} == {1}
    # one file of each release with the real row
    case = next(case for case in index.cases if case.case_id == example)
    acquisition = case.load.args[1]
    assert (acquisition.slope, acquisition.intercept, acquisition.kernel) == (1.0, -1024.0, "Bl57d")
    assert acquisition.spacing_mm == (1.5, 0.751953125, 0.751953125)
    volume = small_chest((48, 80, 84))
    path = volume_path(tmp_path, example, fixed=True)
    for stored in (volume, volume - int(acquisition.intercept)):
        affine = (
            affine_of(acquisition, volume.shape, "test")[:, [2, 1, 0, 3]] if stored is volume else np.eye(4)
        )
        nib.save(nib.Nifti1Image(stored.transpose(2, 1, 0), affine), path)
        np.testing.assert_array_equal(case.load().volume.voxels_DHW, volume)
        assert case.load().volume.spacing_mm == acquisition.spacing_mm


@pytest.mark.real_data
@pytest.mark.parametrize("scan", ["lidc0001/ct.nii.gz", "lung_dx_a0001/dicom", "ctchest4/ct.nrrd"])
def test_real_scans_tell_how_often_they_were_rescaled(real_data: Path, scan: str) -> None:
    hu = read_volume(real_data / scan).voxels_DHW[::2, ::4, ::4].astype(np.int32)
    padded = np.where(hu <= -1024, -3024, hu)  # what a round field of view leaves outside
    upper = hu[hu.shape[0] // 2 :]
    for intercept in (-1024, -8192):
        for whole in (hu, padded, upper):
            assert tell_release(whole, 1.0, intercept) == "hounsfield"
            assert tell_release(whole - intercept, 1.0, intercept) == "stored"
            assert tell_release(whole + intercept, 1.0, intercept) == "twice"
