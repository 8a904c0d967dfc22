"""A user's anatomy mask: turned to the scan's axes, mapped, or refused with what is wrong."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from support.phantoms import coarse_phantom
from support.scan_files import affine_of, reoriented, write_nifti
from vlm3d.anatomy.mask_file import read_region_mask
from vlm3d.anatomy.regions import LUNG_IDS, REGION_IDS
from vlm3d.errors import MaskError

SCAN, LABELS = coarse_phantom().volume, np.asarray(coarse_phantom().regions.labels_DHW)
AFFINE = SCAN.affine


def _as(ids: dict[str, int]) -> np.ndarray:
    """The regions with these keys, under another tool's ids."""
    labels = np.zeros_like(LABELS)
    for key, number in ids.items():
        labels[REGION_IDS[key] == LABELS] = number
    return labels


TOTALSEGMENTATORS_LOBES = _as(
    {
        "left_upper_lobe": 10,
        "left_lower_lobe": 11,
        "right_upper_lobe": 12,
        "right_middle_lobe": 13,
        "right_lower_lobe": 14,
    }
)


def test_any_axes_come_back_on_the_scans(tmp_path: Path) -> None:
    for number, order in enumerate(itertools.permutations(range(3))):
        for flips in ((False, True, False), (True, False, True)):
            path = write_nifti(
                tmp_path / f"{number}{flips[0]}.nii", *reoriented(LABELS, AFFINE, order, flips)
            )
            np.testing.assert_array_equal(read_region_mask(path, SCAN).labels_DHW, LABELS)


def test_totalsegmentators_ids_are_mapped(tmp_path: Path) -> None:
    labels = np.where(REGION_IDS["heart"] == LABELS, 51, TOTALSEGMENTATORS_LOBES).astype(np.uint8)
    found = read_region_mask(write_nifti(tmp_path / "m.nii", labels, AFFINE), SCAN).labels_DHW
    kept = [*LUNG_IDS, REGION_IDS["heart"]]
    np.testing.assert_array_equal(found, np.where(np.isin(LABELS, kept), LABELS, 0))


def test_low_ids_mean_what_the_user_says(tmp_path: Path) -> None:
    """TotalSegmentator's lobes alone have ids that are other regions of ours; naming them decides."""
    path = write_nifti(tmp_path / "m.nii", TOTALSEGMENTATORS_LOBES, AFFINE)
    named = read_region_mask(path, SCAN, "totalsegmentator").labels_DHW
    np.testing.assert_array_equal(named, np.where(np.isin(LABELS, LUNG_IDS), LABELS, 0))
    with pytest.raises(MaskError, match=r"mostly air.*--mask-labels"):
        read_region_mask(path, SCAN)


@pytest.mark.parametrize("keys", [("left_upper_lobe", "left_lower_lobe"), ("heart",), ("spine", "liver")])
def test_part_of_the_regions_is_enough(tmp_path: Path, keys: tuple[str, ...]) -> None:
    labels = _as({key: REGION_IDS[key] for key in keys})
    path = write_nifti(tmp_path / "m.nii", labels, AFFINE)
    np.testing.assert_array_equal(read_region_mask(path, SCAN).labels_DHW, labels)


@pytest.mark.parametrize(
    ("labels", "affine", "words"),
    [
        (LABELS[1:], AFFINE, "another grid"),
        (LABELS, affine_of(origin=(1.0, 2.0, 3.0)), "another grid"),
        (LABELS, affine_of((8.0, 7.0, 6.0)), "another grid"),
        (np.zeros_like(LABELS), AFFINE, "empty"),
        (np.full_like(LABELS, 200), AFFINE, "200"),
        # ids of other tools: lobes from the left upper one on, right and left lung, ours of the mirrored scan, soft tissue
        (
            _as(
                {
                    "left_upper_lobe": 1,
                    "left_lower_lobe": 2,
                    "right_upper_lobe": 3,
                    "right_middle_lobe": 4,
                    "right_lower_lobe": 5,
                }
            ),
            AFFINE,
            "to the left of",
        ),
        (
            _as({"right_upper_lobe": 1, "right_lower_lobe": 1, "left_upper_lobe": 2, "left_lower_lobe": 2}),
            AFFINE,
            "both sides",
        ),
        (LABELS[:, :, ::-1], AFFINE, "to the left of"),
        (_as({"heart": 1, "liver": 2}), AFFINE, "no air"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, labels: np.ndarray, affine: np.ndarray, words: str
) -> None:
    with pytest.raises(MaskError, match=words) as raised:
        read_region_mask(write_nifti(tmp_path / "m.nii", labels, affine), SCAN)
    assert "\n" not in str(raised.value)
