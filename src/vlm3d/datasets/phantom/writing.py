"""A phantom on disk, as a data source would deliver it.

```
FOLDER/
├── ct.nii.gz              HU
├── regions.nii.gz         the 20 regions
├── masks/<lesion>.nii.gz  the lesions that are there
├── truth.json             labels and every painted piece
└── report.txt
```
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np

from vlm3d.datasets.phantom.generation import Phantom
from vlm3d.errors import OutputError
from vlm3d.io import whole_folder, write_nifti_mask
from vlm3d.labels import DISEASE_NAMES
from vlm3d.volume import Volume


def write_phantom(phantom: Phantom, folder: str | Path) -> Path:
    """Write a phantom as a new folder, complete or not at all; returns the folder.

    Raises:
        OutputError: The folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists already; name a new folder")
    truth = {
        "seed": phantom.seed,
        "patient": phantom.patient,
        "labels": dict(zip(DISEASE_NAMES, (int(v) for v in phantom.disease_labels), strict=True)),
        "findings": [asdict(item) for item in phantom.truth],
    }
    with whole_folder(folder) as fresh:
        _write_ct(phantom.volume, fresh / "ct.nii.gz")
        write_nifti_mask(phantom.regions.labels_DHW, phantom.regions.affine, fresh / "regions.nii.gz")
        (fresh / "masks").mkdir()
        for key, mask_DHW in phantom.lesion_masks.items():
            if mask_DHW.any():
                write_nifti_mask(
                    mask_DHW.astype(np.uint8), phantom.volume.affine, fresh / "masks" / f"{key}.nii.gz"
                )
        (fresh / "truth.json").write_text(json.dumps(truth, indent=2), encoding="utf-8")
        (fresh / "report.txt").write_text(phantom.report.text + "\n", encoding="utf-8")
    return folder


def _write_ct(volume: Volume, path: Path) -> None:
    """NIfTI counts (i, j, k) fastest first; the transposed view keeps every voxel where it is in the patient."""
    image = nib.Nifti1Image(volume.voxels_DHW.transpose(2, 1, 0), volume.affine[:, [2, 1, 0, 3]])
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
