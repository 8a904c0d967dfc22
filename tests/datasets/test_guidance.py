"""Where a disease can be seen: from masks to the voxel, from stated places coarsely."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support.training_store import SPACING
from vlm3d.anatomy.regions import LUNG_IDS, REGION_IDS
from vlm3d.config import PreprocessingConfig
from vlm3d.datasets.guidance import guidance_bits, patch_guidance
from vlm3d.datasets.phantom_source import find_phantom_cases
from vlm3d.datasets.prepare import prepare
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.labels import DISEASE_NAMES, STORED_LESION_KEYS, STORED_LESIONS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("guidance") / "store"
    config = PreprocessingConfig(spacing_mm=(6.0, 4.0, 4.0), max_shape=(48, 96, 96))
    cases = find_phantom_cases(f"phantom:0-6:spacing={SPACING},split=train,prevalence_scale=2")
    prepare(cases, folder, config, anatomy="given", workers=1)
    return PreparedDataset(folder)


def _bit(bits_DHW: np.ndarray, disease: str) -> np.ndarray:
    return (bits_DHW >> np.uint32(DISEASE_NAMES.index(disease))) & 1 > 0


def test_marks_are_the_masks_where_there_are_masks_and_lie_in_the_stated_region_elsewhere(
    dataset: PreparedDataset,
) -> None:
    seen = set()
    for index, case in enumerate(dataset.cases):
        arrays = dataset.read(index)
        bits_DHW = guidance_bits(case, arrays.regions_DHW, arrays.lesion_bits_DHW)
        for lesion in STORED_LESIONS:
            mask_DHW = (arrays.lesion_bits_DHW >> STORED_LESION_KEYS.index(lesion.key)) & 1 > 0
            if lesion.disease != "Lung opacity" and mask_DHW.any():
                np.testing.assert_array_equal(_bit(bits_DHW, lesion.disease), mask_DHW)
        for disease, region in (("Cardiomegaly", "heart"), ("Lymphadenopathy", "mediastinum")):
            if case.labels_K is not None and case.labels_K[DISEASE_NAMES.index(disease)]:
                marked = _bit(bits_DHW, disease)
                assert marked.any()
                inside = (arrays.regions_DHW[marked] == REGION_IDS[region]).mean()
                assert inside > 0.9
                seen.add(disease)
        for disease in ("Emphysema", "Mosaic attenuation pattern"):
            if case.labels_K is not None and case.labels_K[DISEASE_NAMES.index(disease)]:
                np.testing.assert_array_equal(_bit(bits_DHW, disease), np.isin(arrays.regions_DHW, LUNG_IDS))
                seen.add(disease)
        for disease, label in zip(DISEASE_NAMES, case.labels_K or (), strict=False):
            if not label:
                assert not _bit(bits_DHW, disease).any(), disease
    assert len(seen) >= 3


def test_consolidated_lung_is_marked_as_the_opacity_that_it_is(dataset: PreparedDataset) -> None:
    seen = 0
    for index, case in enumerate(dataset.cases):
        arrays = dataset.read(index)
        bits_DHW = guidance_bits(case, arrays.regions_DHW, arrays.lesion_bits_DHW)
        consolidated_DHW = _bit(bits_DHW, "Consolidation")
        assert (_bit(bits_DHW, "Lung opacity") >= consolidated_DHW).all()
        seen += int(consolidated_DHW.any())
    assert seen


@pytest.mark.parametrize("annotated", ["consolidation", "ground_glass_opacity"])
def test_an_opacity_is_placed_only_where_all_that_shows_it_is_annotated(
    dataset: PreparedDataset, annotated: str
) -> None:
    seen = 0
    for index, case in enumerate(dataset.cases):
        bits_DHW = dataset.read(index).lesion_bits_DHW & (1 << STORED_LESION_KEYS.index(annotated))
        partly = replace(
            case,
            known_lesions=(annotated,),
            lesion_voxels={annotated: case.lesion_voxels.get(annotated, 0)},
            facts={},
        )
        assert case.labels_K is not None
        consolidated = case.labels_K[DISEASE_NAMES.index("Consolidation")] == 1
        marks_DHW = guidance_bits(partly, None, bits_DHW)
        if annotated == "consolidation" or consolidated:
            assert (
                not _bit(marks_DHW, "Lung opacity").any()
                or case.labels_K[DISEASE_NAMES.index("Lung opacity")] != 1
            )
            seen += int(bits_DHW.any())
        else:
            np.testing.assert_array_equal(_bit(marks_DHW, "Lung opacity"), bits_DHW > 0)
    assert seen


def test_a_stated_center_is_found_on_the_grid(dataset: PreparedDataset) -> None:
    for index, case in enumerate(dataset.cases):
        arrays = dataset.read(index)
        nodules = [f for f in case.facts["findings"] if f["finding"] == "Lung nodule"]
        without_masks = guidance_bits(
            case.__class__(**{**vars(case), "lesion_voxels": {}}), None, np.zeros_like(arrays.lesion_bits_DHW)
        )
        for nodule in nodules:
            z, y, x = nodule["center_zyx_mm"]
            voxel = np.rint(np.linalg.solve(np.array(case.affine), [-x, -y, z, 1.0])[:3]).astype(int)
            if (voxel >= 0).all() and (voxel < case.shape_DHW).all():
                assert _bit(without_masks, "Lung nodule")[tuple(voxel)]


def test_a_patch_is_marked_if_any_of_its_voxels_is() -> None:
    bits_DHW = np.zeros((8, 32, 32), np.uint32)
    bits_DHW[5, 17, 3] = 1 << 9
    touched_KZYX = patch_guidance(bits_DHW, (4, 16, 16), 18)
    assert touched_KZYX.shape == (18, 2, 2, 2)
    assert np.argwhere(touched_KZYX).tolist() == [[9, 1, 1, 0]]
