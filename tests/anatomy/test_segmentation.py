"""The embedded anatomy: sides, robustness, and the bars on real scans."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from support.phantoms import coarse_phantom
from support.scan_files import affine_of
from vlm3d.anatomy.regions import LEFT_LUNG_IDS, LUNG_IDS, NUM_REGIONS, REGION_IDS, REGIONS, RIGHT_LUNG_IDS
from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.anatomy.totalsegmentator import TOTALSEGMENTATOR_CLASSES, map_totalsegmentator
from vlm3d.datasets.phantom import generate_phantom
from vlm3d.errors import MaskError
from vlm3d.io import read_mask, read_volume
from vlm3d.preprocessing.orientation import canonical_view, to_canonical
from vlm3d.volume import Volume


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


@pytest.fixture(scope="module")
def found() -> np.ndarray:
    return segment_anatomy(coarse_phantom().volume).labels_DHW


def test_a_phantoms_organs_are_found_where_they_are(found: np.ndarray) -> None:
    truth = coarse_phantom().regions.labels_DHW
    for ids in (RIGHT_LUNG_IDS, LEFT_LUNG_IDS):
        assert dice(np.isin(found, ids), np.isin(truth, ids)) > 0.85
    for key, bar in (("spine", 0.6), ("heart", 0.5), ("aorta", 0.3)):
        assert dice(found == REGION_IDS[key], truth == REGION_IDS[key]) > bar, key


def test_right_lies_right(found: np.ndarray) -> None:
    """W grows to the patient's left."""
    right, left = (np.nonzero(np.isin(found, ids))[2].mean() for ids in (RIGHT_LUNG_IDS, LEFT_LUNG_IDS))
    assert right < left
    liver, heart = (np.nonzero(found == REGION_IDS[key])[2].mean() for key in ("liver", "heart"))
    assert liver < heart


def test_a_mirrored_body_swaps_its_lungs() -> None:
    volume = coarse_phantom().volume
    mirrored = segment_anatomy(
        volume.with_voxels(np.ascontiguousarray(volume.voxels_DHW[:, :, ::-1]))
    ).labels_DHW
    plain = segment_anatomy(volume).labels_DHW
    back = mirrored[:, :, ::-1]
    assert dice(np.isin(plain, RIGHT_LUNG_IDS), np.isin(back, LEFT_LUNG_IDS)) > 0.95
    assert dice(np.isin(plain, LEFT_LUNG_IDS), np.isin(back, RIGHT_LUNG_IDS)) > 0.95


@pytest.mark.parametrize("kind", ["air", "noise", "water", "head"])
def test_what_is_no_chest_gives_no_lungs_and_a_warning(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    voxels = np.full((20, 40, 40), -1000, np.int16)
    if kind == "noise":
        voxels = rng.integers(-1000, 1000, voxels.shape).astype(np.int16)
    elif kind != "air":
        h, w = np.ogrid[-1:1:40j, -1:1:40j]
        voxels[:, (h**2 + w**2 < 0.7).squeeze()] = 40
        if kind == "head":
            voxels[:, ((h**2 + w**2 < 0.7) & (h**2 + w**2 > 0.55)).squeeze()] = 900
    with caplog.at_level(logging.WARNING):
        labels = segment_anatomy(Volume(voxels, affine_of((5.0, 5.0, 5.0)))).labels_DHW
    assert not np.isin(labels, LUNG_IDS).any()
    assert labels.shape == voxels.shape
    assert any("no lungs" in record.message for record in caplog.records)


def test_parts_of_a_chest_are_accepted() -> None:
    volume = coarse_phantom().volume
    for cut in (np.s_[:25], np.s_[25:], np.s_[:, :, : volume.shape_DHW[2] // 2]):
        part = volume.with_voxels(np.ascontiguousarray(volume.voxels_DHW[cut]))
        assert segment_anatomy(part).labels_DHW.max() <= NUM_REGIONS


@pytest.mark.parametrize(("own", "other"), [(RIGHT_LUNG_IDS, LEFT_LUNG_IDS), (LEFT_LUNG_IDS, RIGHT_LUNG_IDS)])
@pytest.mark.parametrize("seed", [11, 14])
def test_the_only_lung_of_a_narrow_scan_is_told_on_its_own_side(
    own: tuple[int, ...], other: tuple[int, ...], seed: int
) -> None:
    phantom = generate_phantom(seed, spacing_mm=(5.0, 4.0, 4.0), findings={})
    lung = np.isin(phantom.regions.labels_DHW, own)
    rows, columns = (np.flatnonzero(lung.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    narrow = np.s_[:, max(0, rows[0] - 3) : rows[-1] + 4, max(0, columns[0] - 3) : columns[-1] + 4]
    voxels = np.ascontiguousarray(np.asarray(phantom.volume.voxels_DHW)[narrow])
    labels = segment_anatomy(Volume(voxels, phantom.volume.affine)).labels_DHW
    assert np.isin(labels, own)[lung[narrow]].mean() > 0.9
    assert not np.isin(labels, other)[lung[narrow]].any()


def test_a_turned_volume_is_refused() -> None:
    volume = coarse_phantom().volume
    turned = Volume(volume.voxels_DHW.transpose(1, 0, 2), volume.affine[:, [1, 0, 2, 3]])
    with pytest.raises(ValueError, match="canonical"):
        segment_anatomy(turned)


def test_the_table_covers_all_117_classes() -> None:
    assert sorted(TOTALSEGMENTATOR_CLASSES) == list(range(1, 118))
    assert len({name for name, _ in TOTALSEGMENTATOR_CLASSES.values()}) == 117
    mapped = map_totalsegmentator(np.arange(118).reshape(1, 1, 118))
    assert mapped[0, 0, 0] == 0
    assert mapped[0, 0, 51] == REGION_IDS["heart"]
    assert mapped[0, 0, 10] == REGION_IDS["left_upper_lobe"]
    assert mapped[0, 0, 104] == REGION_IDS["ribs"]
    with pytest.raises(MaskError, match="118"):
        map_totalsegmentator(np.array([[[118]]]))


def test_regions_mirror_each_other() -> None:
    by_key = {region.key: region for region in REGIONS}
    assert [region.id for region in REGIONS] == list(range(1, NUM_REGIONS + 1))
    for region in REGIONS:
        if region.mirror is not None:
            assert {region.side, by_key[region.mirror].side} == {"right", "left"}


@pytest.mark.real_data
def test_the_bars_on_a_contrast_scan(real_data: Path) -> None:
    organs = read_mask(real_data / "lidc0001" / "organs.nii.gz")
    truth = canonical_view(organs.labels_DHW, organs.affine)
    found = segment_anatomy(to_canonical(read_volume(real_data / "lidc0001" / "ct.nii.gz"))).labels_DHW
    names = {name: class_id for class_id, (name, _) in TOTALSEGMENTATOR_CLASSES.items()}
    spine = [class_id for name, class_id in names.items() if name.startswith("vertebrae")]
    lungs = {
        side: [c for n, c in names.items() if n.startswith("lung") and n.endswith(side)]
        for side in ("right", "left")
    }
    for classes, ids, bar in (
        (lungs["right"], RIGHT_LUNG_IDS, 0.95),
        (lungs["left"], LEFT_LUNG_IDS, 0.95),
        ([names["heart"]], (REGION_IDS["heart"],), 0.75),
        ([names["trachea"]], (REGION_IDS["airways"],), 0.75),
        (spine, (REGION_IDS["spine"],), 0.80),
        ([names["aorta"]], (REGION_IDS["aorta"],), 0.60),
    ):
        assert dice(np.isin(truth, classes), np.isin(found, ids)) >= bar, ids


@pytest.mark.real_data
def test_the_bar_on_a_coarse_scan(real_data: Path) -> None:
    import SimpleITK as sitk

    volume = read_volume(real_data / "ctchest4" / "ct.nrrd")
    masks = sitk.GetArrayFromImage(sitk.ReadImage(str(real_data / "ctchest4" / "segmentation.seg.nrrd")))
    truth = canonical_view(masks, volume.affine)
    found = segment_anatomy(to_canonical(volume)).labels_DHW
    for class_id, ids in ((5, RIGHT_LUNG_IDS), (6, LEFT_LUNG_IDS)):
        assert dice(truth == class_id, np.isin(found, ids)) >= 0.93
