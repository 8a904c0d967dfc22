"""Dice of the embedded anatomy against manual or TotalSegmentator masks on real scans, as JSON lines.

python benchmarks/anatomy.py            real scans in $VLM3D_REAL_DATA or ../shared/data
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from vlm3d.anatomy.regions import LEFT_LUNG_IDS, REGION_IDS, RIGHT_LUNG_IDS
from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.anatomy.totalsegmentator import TOTALSEGMENTATOR_CLASSES
from vlm3d.io import read_mask, read_volume
from vlm3d.preprocessing.orientation import canonical_view, to_canonical

Ids = tuple[int, ...]


def dice(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """2 |A and B| / (|A| + |B|)."""
    return float(2 * np.count_nonzero(first & second) / (np.count_nonzero(first) + np.count_nonzero(second)))


def score(scan: Path, mask_DHW: NDArray[np.int64], table: dict[str, tuple[Ids, Ids]]) -> None:
    """Print one line a region: ids in the truth, ids of ours."""
    volume = to_canonical(read_volume(scan))
    start = time.perf_counter()
    found = segment_anatomy(volume).labels_DHW
    seconds = time.perf_counter() - start
    for region, (truth_ids, our_ids) in table.items():
        truth, ours = np.isin(mask_DHW, truth_ids), np.isin(found, our_ids)
        if region.startswith("trachea above"):  # bronchi, which the truth leaves out, are not counted
            lowest = np.flatnonzero(truth.any(axis=(1, 2)))[0]
            truth, ours = truth[lowest:], ours[lowest:]
        row = {"scan": scan.parent.name, "region": region, "dice": round(dice(truth, ours), 3)}
        print(json.dumps(row | {"seconds": round(seconds, 2)}))


def truth_table() -> dict[str, tuple[Ids, Ids]]:
    """Our regions against TotalSegmentator's classes."""

    def classes(*regions: str) -> Ids:
        return tuple(
            i
            for i, (name, region) in TOTALSEGMENTATOR_CLASSES.items()
            if region in regions and name != "spinal_cord"
        )

    lungs = {
        "right lung": (classes("right_upper_lobe", "right_middle_lobe", "right_lower_lobe"), RIGHT_LUNG_IDS),
        "left lung": (classes("left_upper_lobe", "left_lower_lobe"), LEFT_LUNG_IDS),
        "trachea above its truth's lowest slice": ((16,), (REGION_IDS["airways"],)),
    }
    keys = (
        *(
            "airways",
            "heart",
            "aorta",
            "spine",
            "liver",
            "ribs",
            "esophagus",
            "great_veins",
            "pulmonary_vessels",
        ),
        *("right_upper_lobe", "right_middle_lobe", "right_lower_lobe", "left_upper_lobe", "left_lower_lobe"),
    )
    return lungs | {key: (classes(key), (REGION_IDS[key],)) for key in keys}


def main() -> None:
    """Score every scan that is there."""
    data = Path(os.environ.get("VLM3D_REAL_DATA", "../shared/data"))
    if not data.is_dir():
        print(json.dumps({"skipped": "no real scans: set VLM3D_REAL_DATA"}))
        return
    organs = read_mask(data / "lidc0001" / "organs.nii.gz")
    score(data / "lidc0001" / "ct.nii.gz", canonical_view(organs.labels_DHW, organs.affine), truth_table())
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(data / "ctchest4" / "segmentation.seg.nrrd")))
    truth_volume = read_volume(data / "ctchest4" / "ct.nrrd")
    lungs = {
        "right lung": ((5,), RIGHT_LUNG_IDS),
        "left lung": ((6,), LEFT_LUNG_IDS),
        "spine": ((2, 3, 4), (16,)),
    }
    score(
        data / "ctchest4" / "ct.nrrd",
        canonical_view(truth, truth_volume.affine),
        lungs | {"ribs": ((1,), (15,))},
    )


if __name__ == "__main__":
    main()
