"""A user's anatomy mask: turned to the scan's axes, mapped, or refused with what is wrong."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from support.scan_files import affine_of, reoriented, small_chest, write_nifti
from vlm3d.anatomy.mask_file import read_region_mask
from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.errors import MaskError
from vlm3d.volume import Volume

SCAN = Volume(small_chest(), affine_of())
LABELS = np.random.default_rng(0).integers(0, 21, SCAN.shape_DHW).astype(np.uint8)


def test_any_axes_come_back_on_the_scans(tmp_path: Path) -> None:
    for number, order in enumerate(itertools.permutations(range(3))):
        for flips in ((False, True, False), (True, False, True)):
            path = write_nifti(
                tmp_path / f"{number}{flips[0]}.nii", *reoriented(LABELS, affine_of(), order, flips)
            )
            np.testing.assert_array_equal(read_region_mask(path, SCAN).labels_DHW, LABELS)


def test_totalsegmentators_ids_are_mapped(tmp_path: Path) -> None:
    labels = np.zeros_like(LABELS)
    labels[3], labels[4] = 51, 12
    found = read_region_mask(write_nifti(tmp_path / "m.nii", labels, affine_of()), SCAN).labels_DHW
    assert (found[3] == REGION_IDS["heart"]).all()
    assert (found[4] == REGION_IDS["right_upper_lobe"]).all()


def test_low_ids_mean_what_the_user_says(tmp_path: Path) -> None:
    """TotalSegmentator's lobes alone look like our ids; naming them decides."""
    path = write_nifti(tmp_path / "m.nii", np.full_like(LABELS, 10), affine_of())
    assert (read_region_mask(path, SCAN).labels_DHW == 10).all()
    named = read_region_mask(path, SCAN, "totalsegmentator").labels_DHW
    assert (named == REGION_IDS["left_upper_lobe"]).all()


@pytest.mark.parametrize(
    ("labels", "affine", "words"),
    [
        (LABELS[1:], affine_of(), "another grid"),
        (LABELS, affine_of(origin=(0.0, 0.0, 0.0)), "another grid"),
        (LABELS, affine_of((8.0, 7.0, 6.0)), "another grid"),
        (np.zeros_like(LABELS), affine_of(), "empty"),
        (np.full_like(LABELS, 200), affine_of(), "200"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, labels: np.ndarray, affine: np.ndarray, words: str
) -> None:
    with pytest.raises(MaskError, match=words) as raised:
        read_region_mask(write_nifti(tmp_path / "m.nii", labels, affine), SCAN)
    assert "\n" not in str(raised.value)
