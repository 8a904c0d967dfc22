"""Phantoms are reproducible, and image, masks, labels, truth and report agree."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from support.phantoms import COARSE_MM, coarse_phantom
from vlm3d.anatomy.regions import LEFT_LUNG_IDS, LUNG_IDS, REGION_BY_ID, REGION_IDS, RIGHT_LUNG_IDS
from vlm3d.datasets.phantom import FindingSpec, Phantom, generate_phantom
from vlm3d.datasets.phantom.reports import _NEGATIVES, write_report
from vlm3d.datasets.phantom.writing import write_phantom
from vlm3d.errors import OutputError
from vlm3d.evaluation.labeler import mentions
from vlm3d.io import read_mask, read_volume
from vlm3d.labels import DISEASE_NAMES, ORGAN_OF, READING_ORDERS, STORED_LESION_KEYS, STORED_LESIONS

WORDS = {
    "Medical material": "medical material",
    "Arterial wall calcification": "calcification",
    "Cardiomegaly": ("heart is enlarged", "cardiomegaly"),
    "Pericardial effusion": "pericardial effusion",
    "Coronary artery wall calcification": "coronary",
    "Hiatal hernia": "hernia",
    "Lymphadenopathy": ("lymph nodes", "lymphadenopathy"),
    "Emphysema": "emphysema",
    "Atelectasis": "atelectasis",
    "Lung nodule": "nodule",
    "Lung opacity": "ground-glass",
    "Pulmonary fibrotic sequela": "fibrotic",
    "Pleural effusion": "pleural effusion",
    "Mosaic attenuation pattern": "mosaic",
    "Peribronchial thickening": "peribronchial",
    "Consolidation": "consolidation",
    "Bronchiectasis": "bronchiectasis",
    "Interlobular septal thickening": "interlobular",
}


def digest(phantom: Phantom) -> str:
    parts = [phantom.volume.voxels_DHW, phantom.regions.labels_DHW, *phantom.lesion_masks.values()]
    found = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    found.update(phantom.report.text.encode())
    return found.hexdigest()


def test_a_seed_is_a_phantom_in_every_process() -> None:
    code = (
        "import hashlib, sys; from vlm3d.datasets.phantom import generate_phantom; "
        "p = generate_phantom(5, spacing_mm=(8, 6, 6)); print(hashlib.sha256(p.volume.voxels_DHW.tobytes()).hexdigest())"
    )
    phantom = generate_phantom(5, spacing_mm=(8, 6, 6))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256(phantom.volume.voxels_DHW.tobytes()).hexdigest()
    assert digest(generate_phantom(5, spacing_mm=(8, 6, 6))) == digest(phantom)
    assert digest(generate_phantom(6, spacing_mm=(8, 6, 6))) != digest(phantom)


@pytest.mark.parametrize("name", DISEASE_NAMES)
def test_each_finding_alone(name: str) -> None:
    phantom = generate_phantom(11, spacing_mm=COARSE_MM, findings={name: 0.9})
    painted = {item.finding for item in phantom.truth}
    assert painted == {name}
    labeled = {disease for disease, value in zip(DISEASE_NAMES, phantom.disease_labels, strict=True) if value}
    assert name in labeled
    assert labeled <= {name, "Lung opacity"}
    words = WORDS[name] if isinstance(WORDS[name], tuple) else (WORDS[name],)
    said = phantom.report.text.lower()
    assert any(word in said and f"no {word}" not in said for word in words)
    own = {lesion.key for lesion in STORED_LESIONS if lesion.disease == name}
    for key, mask in phantom.lesion_masks.items():
        assert mask.any() == (key in own), key


@pytest.mark.parametrize(("seed", "severity"), [(0, 0.0), (2, 0.5), (4, 1.0)])
def test_all_findings_together(seed: int, severity: float) -> None:
    """What a later finding covers leaves the truth as well as the mask: both tell the same volume."""
    phantom = generate_phantom(seed, spacing_mm=COARSE_MM, findings=dict.fromkeys(DISEASE_NAMES, severity))
    found = {item.finding for item in phantom.truth}
    assert {name for name in DISEASE_NAMES if name not in found} <= {"Lung nodule", "Lung opacity"}
    for lesion in STORED_LESIONS:
        pieces = [item for item in phantom.truth if item.lesion == lesion.key]
        mask = phantom.lesion_masks[lesion.key]
        assert bool(pieces) == mask.any(), lesion.key
        volume_ml = mask.sum() * np.prod(COARSE_MM) / 1000
        told_ml = sum(item.volume_ml for item in pieces)
        assert volume_ml <= told_ml + 0.05
        assert told_ml <= 2 * volume_ml + 0.05, "pieces of one lesion overlap more than they lie apart"
    overlap = sum(phantom.lesion_masks[key].astype(int) for key in ("consolidation", "pleural_effusion"))
    assert overlap.max() == 1


def test_no_report_denies_what_is_there_or_names_what_is_not() -> None:
    for seed in range(12):
        phantom = generate_phantom(seed, spacing_mm=(12.0, 8.0, 8.0))
        found, said = {item.finding for item in phantom.truth}, phantom.report.findings
        for name, wordings in _NEGATIVES.items():
            assert not (name in found and any(wording in said for wording in wordings)), (seed, name)
        for wording in sorted({w for ws in _NEGATIVES.values() for w in ws}, key=len, reverse=True):
            said = said.replace(wording, "")
        for name, words in WORDS.items():
            if name in ("Arterial wall calcification", "Lung opacity", "Lung nodule"):
                continue  # their words serve for other findings, too
            forms = words if isinstance(words, tuple) else (words,)
            assert any(form in said.lower() for form in forms) == (name in found), (seed, name, said)


def test_findings_are_told_organ_by_organ_and_the_impression_by_urgency() -> None:
    truth = generate_phantom(3, spacing_mm=(6.0, 4.0, 4.0), findings=dict.fromkeys(DISEASE_NAMES, 0.7)).truth
    orders = set()
    for seed in range(12):
        report = write_report(truth, rng=np.random.default_rng(seed))
        told = sorted(mentions(report.findings), key=lambda mention: mention.sentence.start + mention.start)
        organs = [ORGAN_OF[mention.rule.name] for mention in told]
        order = tuple(organ for organ, _ in groupby(organs))
        assert len(set(order)) == len(order), "no organ is told twice"
        orders.add(order)
        assert report.impression.startswith("Pericardial effusion. Pleural effusion"), report.impression
        assert "contrast" not in report.text
        for sentence in report.findings.split(". "):
            if re.search(r"\d", sentence):
                assert re.search("effusion|nodule|consolidation|on the (right|left)", sentence.lower()), (
                    sentence
                )
    assert orders == set(READING_ORDERS)


def test_no_findings_means_a_normal_report() -> None:
    phantom = generate_phantom(2, spacing_mm=COARSE_MM, findings={})
    assert not phantom.truth
    assert phantom.disease_labels.sum() == 0
    assert not any(mask.any() for mask in phantom.lesion_masks.values())
    assert phantom.report.impression in ("No abnormality of the chest.", "Normal chest CT.")


def test_masks_match_what_was_painted() -> None:
    """Air-filled lung became denser under a nodule than without it, and nothing changed far away."""
    with_nodule = generate_phantom(
        3, spacing_mm=COARSE_MM, findings={"Lung nodule": FindingSpec(0.9, size_mm=28, count=1, kind="solid")}
    )
    without = generate_phantom(3, spacing_mm=COARSE_MM, findings={})
    mask = with_nodule.lesion_masks["lung_nodule"]
    difference = with_nodule.volume.voxels_DHW.astype(int) - without.volume.voxels_DHW
    assert np.median(difference[mask]) > 300
    assert abs(np.median(difference[~mask])) < 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_sides_agree(side: str) -> None:
    findings = {"Lung nodule": FindingSpec(0.9, side=side), "Pleural effusion": FindingSpec(0.8, side=side)}
    phantom = generate_phantom(4, spacing_mm=COARSE_MM, findings=findings)
    middle = np.nonzero(phantom.regions.labels_DHW == REGION_IDS["spine"])[2].mean()
    for key in ("lung_nodule", "pleural_effusion"):
        center = np.nonzero(phantom.lesion_masks[key])[2].mean()
        assert (center < middle) == (side == "right"), key
    for item in phantom.truth:
        assert item.side == side
        assert REGION_BY_ID[REGION_IDS[item.region]].side == side
    assert side in phantom.report.text
    assert ("left" if side == "right" else "right") not in phantom.report.text


def test_densities_are_those_of_tissue() -> None:
    phantom = generate_phantom(2, spacing_mm=(3.0, 3.0, 3.0), findings={})
    hu, ids = phantom.volume.voxels_DHW, phantom.regions.labels_DHW
    for keys, low, high in (
        ([REGION_BY_ID[i].key for i in LUNG_IDS], -950, -700),
        (["airways"], -1010, -500),
        (["liver"], 20, 180),
        (["spine"], 60, 600),
        (["heart"], 10, 400),
    ):
        middle = np.median(hu[np.isin(ids, [REGION_IDS[key] for key in keys])])
        assert low < middle < high, keys
    assert hu.dtype == np.int16
    assert hu.min() >= -1024


@pytest.mark.parametrize("spacing", [(5.0, 3.0, 3.0), (2.5, 4.0, 4.0), (10.0, 2.5, 5.0)])
def test_any_spacing(spacing: tuple[float, float, float]) -> None:
    phantom = generate_phantom(9, spacing_mm=spacing)
    assert phantom.volume.spacing_mm == pytest.approx(spacing, rel=1e-3)
    ids = phantom.regions.labels_DHW
    for lung in (RIGHT_LUNG_IDS, LEFT_LUNG_IDS):
        liters = np.isin(ids, lung).sum() * np.prod(spacing) / 1e6
        assert 0.8 < liters < 4.5


def test_all_regions_are_in_view() -> None:
    ids = np.unique(coarse_phantom().regions.labels_DHW)
    missing = {REGION_BY_ID[i].key for i in range(1, 21)} - {REGION_BY_ID[i].key for i in ids if i}
    assert missing == set()


def test_a_cohort_has_every_finding_at_a_plausible_rate() -> None:
    from vlm3d.datasets.phantom.cohort import sample_findings

    rng = np.random.default_rng(0)
    draws = [sample_findings(rng) for _ in range(400)]
    share = {name: np.mean([name in draw for draw in draws]) for name in DISEASE_NAMES}
    assert all(0.05 < value < 0.6 for value in share.values()), share
    both = np.mean(["Cardiomegaly" in d and "Pleural effusion" in d for d in draws])
    assert both > share["Cardiomegaly"] * share["Pleural effusion"]


def test_wrong_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match="Pneumonia"):
        generate_phantom(0, findings={"Pneumonia": 1.0})
    with pytest.raises(ValueError, match="severity"):
        generate_phantom(0, findings={"Emphysema": 2.0})
    with pytest.raises(ValueError, match="spacing_mm"):
        generate_phantom(0, spacing_mm=(0.0, 1.0, 1.0))


def test_on_disk_it_reads_back(tmp_path: Path) -> None:
    phantom = coarse_phantom()
    folder = write_phantom(phantom, tmp_path / "p")
    volume = read_volume(folder / "ct.nii.gz")
    image = nib.load(folder / "ct.nii.gz")
    corner = np.array([3, 5, 7])
    assert image.dataobj[7, 5, 3] == phantom.volume.voxels_DHW[3, 5, 7]
    np.testing.assert_allclose(image.affine @ [7, 5, 3, 1], phantom.volume.affine @ [*corner, 1], atol=1e-3)
    assert volume.voxels_DHW.size == phantom.volume.voxels_DHW.size
    regions = read_mask(folder / "regions.nii.gz")
    assert np.array_equal(np.unique(regions.labels_DHW), np.unique(phantom.regions.labels_DHW))
    written = {path.name.split(".")[0] for path in (folder / "masks").iterdir()}
    assert written == {key for key in STORED_LESION_KEYS if phantom.lesion_masks[key].any()}
    with pytest.raises(OutputError, match="exists"):
        write_phantom(phantom, folder)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm3d.datasets.phantom.writing._write_ct", full)
    with pytest.raises(OutputError, match="no space left"):
        write_phantom(coarse_phantom(), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
