"""Over many patients: what is labeled was painted, what was painted is seen, and a lost volume shows."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from vlm3d.anatomy.measurement import axial_diameter_mm, measure_lesion
from vlm3d.anatomy.regions import LUNG_IDS, REGION_BY_ID, REGION_IDS
from vlm3d.datasets.phantom import FindingSpec, Phantom, generate_phantom, generation, paint_into_scan
from vlm3d.datasets.phantom.pose import Pose
from vlm3d.labels import DISEASE_NAMES, STORED_LESION_KEYS, STORED_LESIONS
from vlm3d.volume import RegionMap

SPACING_MM = (10.0, 6.0, 6.0)
HU_INSIDE = {
    "pericardial_effusion": (-60, 90),
    "pleural_effusion": (-60, 60),
    "consolidation": (-250, 120),
    "ground_glass_opacity": (-800, -250),
    "lung_nodule": (-700, 700),
    "atelectasis": (-750, 120),
    "pulmonary_fibrotic_sequela": (-800, 120),
    "bronchiectasis": (-980, 50),
}


@pytest.mark.parametrize(("protocol", "seeds"), [(None, range(200, 210)), ("shifted", range(300, 304))])
def test_labels_truth_and_masks_agree_over_many_patients(protocol: str | None, seeds: range) -> None:
    seen = set()
    for seed in seeds:
        phantom = generate_phantom(seed, spacing_mm=SPACING_MM, prevalence_scale=6.0, protocol=protocol)
        found = {item.finding for item in phantom.truth}
        seen |= found
        labeled = {name for name, value in zip(DISEASE_NAMES, phantom.disease_labels, strict=True) if value}
        assert labeled == found | ({"Lung opacity"} if "Consolidation" in found else set())
        assert set(phantom.lesion_masks) == set(STORED_LESION_KEYS)
        for lesion in STORED_LESIONS:
            mask = phantom.lesion_masks[lesion.key]
            assert mask.any() == any(item.lesion == lesion.key for item in phantom.truth), (seed, lesion.key)
            if mask.sum() >= 30:
                low, high = HU_INSIDE[lesion.key]
                assert low < np.median(phantom.volume.voxels_DHW[mask]) < high, (seed, lesion.key)
        assert all(item.volume_ml > 0 for item in phantom.truth)
    assert len(seen) >= 17, set(DISEASE_NAMES) - seen


def test_nothing_is_labeled_where_there_is_no_room() -> None:
    scan = healthy(17)
    nowhere = RegionMap(np.zeros_like(scan.regions.labels_DHW), scan.volume.affine)
    painted = paint_into_scan(scan.volume, nowhere, dict.fromkeys(DISEASE_NAMES, 0.9), seed=0)
    assert painted.truth == []
    assert not any(mask.any() for mask in painted.lesion_masks.values())
    assert np.array_equal(painted.volume.voxels_DHW, scan.volume.voxels_DHW)


@cache
def healthy(seed: int) -> Phantom:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "sample_pose", lambda *_: Pose())
        return generate_phantom(seed, spacing_mm=SPACING_MM, findings={})


def collapsed(seed: int, lobe: str, severity: float = 0.9) -> Phantom:
    spec = FindingSpec(severity, region=lobe, kind="lobar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "sample_pose", lambda *_: Pose())
        return generate_phantom(seed, spacing_mm=SPACING_MM, findings={"Atelectasis": spec})


@pytest.mark.parametrize("lobe", [REGION_BY_ID[i].key for i in LUNG_IDS])
def test_a_collapsed_lobe_loses_volume(lobe: str) -> None:
    before, after = healthy(17), collapsed(17, lobe)
    side = REGION_BY_ID[REGION_IDS[lobe]].side
    toward = 1 if side == "left" else -1
    ids, was = after.regions.labels_DHW, before.regions.labels_DHW
    (item,) = after.truth
    assert (item.kind, item.region, item.side) == ("lobar", lobe, side)
    assert (ids == REGION_IDS[lobe]).sum() < 0.6 * (was == REGION_IDS[lobe]).sum()
    for fixed in ("spine", "ribs", "sternum_shoulder_girdle"):
        assert np.array_equal(ids == REGION_IDS[fixed], was == REGION_IDS[fixed]), fixed

    def heart(labels: np.ndarray) -> float:
        return float(np.argwhere(labels == REGION_IDS["heart"])[:, 2].mean())

    assert 0.1 < toward * (heart(ids) - heart(was)) * SPACING_MM[2] < 16, "the mediastinum moves to that side"
    wedge = ids == REGION_IDS[lobe]
    assert np.median(after.volume.voxels_DHW[wedge]) > -100
    assert np.median(before.volume.voxels_DHW[was == REGION_IDS[lobe]]) < -700
    assert "atelectasis" in after.report.text.lower()
    assert REGION_BY_ID[REGION_IDS[lobe]].name in after.report.text


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_diaphragm_rises_on_the_side_of_a_collapse_only(side: str) -> None:
    below = [REGION_IDS["diaphragm_upper_abdomen"], REGION_IDS["liver"]]

    def heights(phantom: Phantom) -> dict[str, float]:
        labels = phantom.regions.labels_DHW
        middle = int(np.argwhere(labels == REGION_IDS["spine"])[:, 2].mean())
        margin = round(40 / SPACING_MM[2])
        halves = {"right": labels[:, :, : middle - margin], "left": labels[:, :, middle + margin :]}
        volume = {name: np.isin(half, below).sum() for name, half in halves.items()}
        return {name: float(value) for name, value in volume.items()}

    before, after = heights(healthy(17)), heights(collapsed(17, f"{side}_lower_lobe"))
    other = "left" if side == "right" else "right"
    assert after[side] > 1.04 * before[side]
    assert after[other] == pytest.approx(before[other], rel=0.02)


def test_a_collapse_in_a_real_scan_displaces_nothing() -> None:
    scan = healthy(17)
    spec = FindingSpec(0.9, region="left_lower_lobe", kind="lobar")
    painted = paint_into_scan(scan.volume, scan.regions, {"Atelectasis": spec}, seed=3)
    changed = painted.volume.voxels_DHW != scan.volume.voxels_DHW
    assert painted.truth[0].kind == "lobar"
    lung_side = np.isin(
        scan.regions.labels_DHW, [REGION_IDS[k] for k in ("left_lower_lobe", "left_pleural_space")]
    )
    beside = np.isin(scan.regions.labels_DHW, [REGION_IDS[k] for k in ("heart", "spine", "liver", "ribs")])
    assert changed[lung_side].sum() > 100
    assert not changed[beside].any()


def test_later_findings_avoid_collapsed_lung() -> None:
    """Haze, nodules and consolidation go where there is air, not unseen into a lobe that has none."""
    for seed in range(4):
        findings = {
            "Atelectasis": FindingSpec(0.8, region="right_lower_lobe", kind="lobar"),
            "Lung nodule": FindingSpec(0.5, count=3),
            "Lung opacity": FindingSpec(0.5, count=3),
        }
        phantom = generate_phantom(seed, spacing_mm=SPACING_MM, findings=findings)
        others = [item for item in phantom.truth if item.finding != "Atelectasis"]
        assert others
        assert all(item.region != "right_lower_lobe" for item in others)


def test_a_told_size_is_what_the_mask_measures() -> None:
    measured = 0
    for seed in range(3000, 3010):
        phantom = generate_phantom(seed, spacing_mm=SPACING_MM, findings={"Consolidation": 0.8})
        mask = phantom.lesion_masks["consolidation"]
        items = [item for item in phantom.truth if item.lesion == "consolidation"]
        if len(items) == 1:
            pieces = measure_lesion(mask, None, phantom.volume.spacing_mm)
            assert items[0].size_mm == pytest.approx(
                axial_diameter_mm(mask, phantom.volume.spacing_mm), abs=0.1
            )
            assert items[0].size_mm >= pieces[0].max_diameter_mm - 0.1
            measured += 1
    assert measured


def test_sentences_agree_in_number() -> None:
    texts = [
        generate_phantom(
            seed, spacing_mm=(16.0, 12.0, 12.0), findings={"Consolidation": 0.9, "Medical material": 0.9}
        ).report.findings
        for seed in range(3000, 3016)
    ]
    told = " ".join(texts)
    assert not re.search(r"\bA (?:[aeio]|sternal wires)", told)
    assert not re.search(r"lobe and [a-z ]+ lobe (?:shows|has)\b", told)
    assert "Sternal wires are in place" in told
    assert re.search(r"lobe shows consolidation", told)
