"""Findings painted into a scan that exists: on its own axes, with masks and truth that agree."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from support.phantoms import COARSE_MM
from vlm3d.anatomy.regions import LUNG_IDS, REGION_BY_ID, REGION_IDS
from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.datasets.phantom import FindingSpec, Phantom, generate_phantom, paint_into_scan
from vlm3d.io import read_volume
from vlm3d.labels import DISEASE_NAMES, LESIONS, STORED_LESIONS
from vlm3d.preprocessing.orientation import to_canonical
from vlm3d.volume import CANONICAL_AXES, RegionMap, Volume


@cache
def healthy() -> Phantom:
    """A patient without findings, to be painted into as if it were a real scan: no trees are handed over."""
    return generate_phantom(17, spacing_mm=COARSE_MM, findings={})


@pytest.mark.parametrize("name", DISEASE_NAMES)
def test_each_finding_can_be_painted(name: str) -> None:
    scan = healthy()
    before = scan.volume.voxels_DHW.copy()
    painted = paint_into_scan(scan.volume, scan.regions, {name: 0.8}, seed=1)
    assert {item.finding for item in painted.truth} == {name}
    own = {lesion.key for lesion in STORED_LESIONS if lesion.disease == name}
    assert {key for key, mask in painted.lesion_masks.items() if mask.any()} == own
    assert np.array_equal(scan.volume.voxels_DHW, before), "the given scan was changed"
    assert (painted.volume.voxels_DHW != before).any()
    again = paint_into_scan(scan.volume, scan.regions, {name: 0.8}, seed=1)
    assert np.array_equal(painted.volume.voxels_DHW, again.volume.voxels_DHW)


def test_what_is_painted_lies_where_it_is_said_to_lie() -> None:
    scan = healthy()
    findings = {
        "Lung nodule": FindingSpec(0.9, region="left_upper_lobe", count=1, size_mm=26, kind="solid"),
        "Pleural effusion": FindingSpec(0.6, side="right"),
    }
    painted = paint_into_scan(scan.volume, scan.regions, findings, seed=2)
    ids = scan.regions.labels_DHW
    nodule, fluid = (painted.lesion_masks[key] for key in ("lung_nodule", "pleural_effusion"))
    assert np.mean(ids[nodule] == REGION_IDS["left_upper_lobe"]) > 0.9
    assert {REGION_BY_ID[i].side for i in np.unique(ids[fluid]) if i in LUNG_IDS} == {"right"}
    for item in painted.truth:
        volume_ml = painted.lesion_masks[item.lesion or ""].sum() * np.prod(COARSE_MM) / 1000
        assert item.volume_ml == pytest.approx(volume_ml, abs=0.02)
    hu = painted.volume.voxels_DHW.astype(float)
    assert -30 < np.median(hu[fluid]) < 60
    posterior = np.argwhere(fluid)[:, 1].mean()
    assert posterior > np.argwhere(np.isin(ids, (1, 2, 3)))[:, 1].mean() + 5


def test_other_axes_give_the_same_patient() -> None:
    scan = healthy()
    turn = ornt_transform(axcodes2ornt(CANONICAL_AXES), axcodes2ornt(("R", "A", "I")))
    voxels = np.ascontiguousarray(apply_orientation(scan.volume.voxels_DHW, turn))
    labels = np.ascontiguousarray(apply_orientation(scan.regions.labels_DHW, turn))
    affine = scan.volume.affine @ inv_ornt_aff(turn, scan.volume.shape_DHW)
    turned = paint_into_scan(
        Volume(voxels, affine), RegionMap(labels, affine), {"Consolidation": 0.8}, seed=3
    )
    straight = paint_into_scan(scan.volume, scan.regions, {"Consolidation": 0.8}, seed=3)
    assert turned.volume.voxels_DHW.shape == voxels.shape
    assert np.array_equal(to_canonical(turned.volume).voxels_DHW, straight.volume.voxels_DHW)
    assert turned.truth == straight.truth


def test_regions_of_another_scan_are_refused() -> None:
    scan = healthy()
    other = RegionMap(np.zeros((2, 3, 4), np.uint8), scan.volume.affine)
    with pytest.raises(ValueError, match="read_region_mask"):
        paint_into_scan(scan.volume, other, {"Consolidation": 0.5}, seed=0)


@pytest.mark.slow
@pytest.mark.real_data
def test_all_five_lesions_fit_a_real_scan(real_data: Path) -> None:
    fine = to_canonical(read_volume(real_data / "lung_dx_a0001" / "dicom"))
    scan = Volume(fine.voxels_DHW[:, ::3, ::3], fine.affine @ np.diag([1.0, 3.0, 3.0, 1.0]))
    regions = segment_anatomy(scan)
    findings = {lesion.disease: 0.6 for lesion in LESIONS}
    painted = paint_into_scan(scan, regions, findings, seed=4)
    assert {item.finding for item in painted.truth} == set(findings)
    assert all(painted.lesion_masks[lesion.key].any() for lesion in LESIONS)
    fluid = painted.lesion_masks["pleural_effusion"]
    assert np.median(painted.volume.voxels_DHW[fluid]) > np.median(scan.voxels_DHW[fluid]) + 400
