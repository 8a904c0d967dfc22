"""TotalSegmentator's classes mapped onto the 20 regions, and TotalSegmentator itself as an extra."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.errors import MaskError
from vlm3d.extras import require
from vlm3d.volume import RegionMap, Volume

_ABDOMEN = "diaphragm_upper_abdomen"

_BLOCKS: tuple[tuple[int, str, tuple[str, ...]], ...] = (
    (1, _ABDOMEN, ("spleen", "kidney_right", "kidney_left", "gallbladder")),
    (5, "liver", ("liver",)),
    (6, _ABDOMEN, ("stomach", "pancreas", "adrenal_gland_right", "adrenal_gland_left")),
    (10, "left_upper_lobe", ("lung_upper_lobe_left",)),
    (11, "left_lower_lobe", ("lung_lower_lobe_left",)),
    (12, "right_upper_lobe", ("lung_upper_lobe_right",)),
    (13, "right_middle_lobe", ("lung_middle_lobe_right",)),
    (14, "right_lower_lobe", ("lung_lower_lobe_right",)),
    (15, "esophagus", ("esophagus",)),
    (16, "airways", ("trachea",)),
    (17, "mediastinum", ("thyroid_gland",)),
    (
        18,
        _ABDOMEN,
        (
            "small_bowel",
            "duodenum",
            "colon",
            "urinary_bladder",
            "prostate",
            "kidney_cyst_left",
            "kidney_cyst_right",
        ),
    ),
    (25, "spine", ("sacrum", "vertebrae_S1", *(f"vertebrae_L{n}" for n in range(5, 0, -1)))),
    (32, "spine", tuple(f"vertebrae_T{n}" for n in range(12, 0, -1))),
    (44, "spine", tuple(f"vertebrae_C{n}" for n in range(7, 0, -1))),
    (51, "heart", ("heart",)),
    (52, "aorta", ("aorta",)),
    (53, "pulmonary_vessels", ("pulmonary_vein",)),
    (
        54,
        "mediastinum",
        (
            "brachiocephalic_trunk",
            "subclavian_artery_right",
            "subclavian_artery_left",
            "common_carotid_artery_right",
            "common_carotid_artery_left",
        ),
    ),
    (59, "great_veins", ("brachiocephalic_vein_left", "brachiocephalic_vein_right")),
    (61, "heart", ("atrial_appendage_left",)),
    (62, "great_veins", ("superior_vena_cava", "inferior_vena_cava")),
    (
        64,
        _ABDOMEN,
        (
            "portal_vein_and_splenic_vein",
            "iliac_artery_left",
            "iliac_artery_right",
            "iliac_vena_left",
            "iliac_vena_right",
        ),
    ),
    (
        69,
        "sternum_shoulder_girdle",
        (
            "humerus_left",
            "humerus_right",
            "scapula_left",
            "scapula_right",
            "clavicula_left",
            "clavicula_right",
        ),
    ),
    (75, "body_wall", ("femur_left", "femur_right", "hip_left", "hip_right")),
    (79, "body_wall", ("spinal_cord",)),  # our spine is bone alone
    (
        80,
        "body_wall",
        (
            *(
                f"gluteus_{part}_{side}"
                for part in ("maximus", "medius", "minimus")
                for side in ("left", "right")
            ),
            "autochthon_left",
            "autochthon_right",
            "iliopsoas_left",
            "iliopsoas_right",
            "brain",
            "skull",
        ),
    ),
    (92, "ribs", tuple(f"rib_left_{n}" for n in range(1, 13))),
    (104, "ribs", tuple(f"rib_right_{n}" for n in range(1, 13))),
    (116, "sternum_shoulder_girdle", ("sternum",)),
    (117, "ribs", ("costal_cartilages",)),
)

TOTALSEGMENTATOR_CLASSES: dict[int, tuple[str, str]] = {
    first + offset: (name, region) for first, region, names in _BLOCKS for offset, name in enumerate(names)
}
"""Class id of TotalSegmentator v2's task ``total`` -> (its name, key of our region)."""

NOT_A_CLASS = ("right_pleural_space", "left_pleural_space", "mediastinum", _ABDOMEN, "body_wall")
"""Regions that TotalSegmentator does not draw, or only in part: `run_totalsegmentator` adds the classical ones."""


def map_totalsegmentator(labels_DHW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Region ids from TotalSegmentator v2 ids.

    Raises:
        MaskError: A label is none of the 117 classes.
    """
    foreign = [
        int(label) for label in np.unique(labels_DHW) if not 0 <= label <= len(TOTALSEGMENTATOR_CLASSES)
    ]
    if foreign:
        named = ", ".join(str(label) for label in foreign[:5])
        raise MaskError(f"the mask holds the labels {named}; TotalSegmentator's are 0..117")
    table = np.zeros(len(TOTALSEGMENTATOR_CLASSES) + 1, np.uint8)
    for class_id, (_, region) in TOTALSEGMENTATOR_CLASSES.items():
        table[class_id] = REGION_IDS[region]
    mapped: NDArray[np.uint8] = table[labels_DHW]
    return mapped


def run_totalsegmentator(volume: Volume, *, fast: bool = True) -> RegionMap:
    """Segment a canonical volume with TotalSegmentator, and fill in what it does not draw by classical means.

    Raises:
        MissingExtraError: TotalSegmentator is not installed.
    """
    api = require(
        "totalsegmentator.python_api", extra="totalsegmentator", purpose="segment the anatomy with it"
    )
    with tempfile.TemporaryDirectory(prefix="vlm3d_") as folder:
        scan = Path(folder) / "ct.nii.gz"
        image = nib.Nifti1Image(volume.voxels_DHW.transpose(2, 1, 0), volume.affine[:, [2, 1, 0, 3]])
        nib.save(image, scan)
        found = api.totalsegmentator(str(scan), None, ml=True, fast=fast, quiet=True)
    labels_DHW = np.asarray(found.dataobj).astype(np.int16).transpose(2, 1, 0)
    regions = map_totalsegmentator(labels_DHW)
    classical = segment_anatomy(volume).labels_DHW
    fill = (regions == 0) & np.isin(classical, [REGION_IDS[key] for key in NOT_A_CLASS])
    return RegionMap(np.where(fill, classical, regions), volume.affine, "totalsegmentator")
