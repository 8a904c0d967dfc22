"""A phantom on disk, as a data source would deliver it.

```
FOLDER/
├── ct.nii.gz              HU
├── regions.nii.gz         the 20 regions
├── masks/<lesion>.nii.gz  the lesions that are there
├── truth.json             seed, settings, labels and every painted piece
└── report.txt
```
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vlm3d.datasets.phantom.generation import DEFAULT_SPACING_MM, Phantom, generate_phantom, settings_of
from vlm3d.datasets.workers import KILLED, each_finished
from vlm3d.errors import OutputError, ResourceError
from vlm3d.io import whole_folder, write_nifti_mask
from vlm3d.labels import DISEASE_NAMES
from vlm3d.volume import Volume

TRUTH_FILE = "truth.json"


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
        "settings": phantom.settings,
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
        (fresh / TRUTH_FILE).write_text(json.dumps(truth, indent=2), encoding="utf-8")
        (fresh / "report.txt").write_text(phantom.report.text + "\n", encoding="utf-8")
    return folder


def write_phantoms(
    out: Path,
    seeds: Sequence[int],
    *,
    single: bool = False,
    jobs: int = 1,
    spacing_mm: tuple[float, float, float] = DEFAULT_SPACING_MM,
    protocol: str | None = None,
    prevalence_scale: float = 1.0,
) -> Iterator[tuple[Path, bool]]:
    """Write a phantom a seed as ``out/phantom_NNNNNN``, in several processes; the number of them changes no voxel.

    Folders that are complete and hold the phantom that is asked for are kept. Memory is that of one phantom a process.

    Args:
        out: Folder of the cohort.
        seeds: Each once.
        single: Write the only seed to ``out`` itself.
        jobs: Processes.
        spacing_mm: As for `generate_phantom`.
        protocol: As for `generate_phantom`.
        prevalence_scale: As for `generate_phantom`.

    Yields:
        Each folder as soon as it is complete, and whether it was there before; kept ones first.

    Raises:
        OutputError: A folder of that name holds something else, or nothing can be written.
        ResourceError: A process was killed.
    """
    settings = settings_of(spacing_mm, protocol, prevalence_scale)
    folders = {seed: out if single else out / f"phantom_{seed:06d}" for seed in seeds}
    missing = []
    for seed, folder in folders.items():
        if holds_phantom(folder, seed, settings):
            yield folder, True
        else:
            missing.append((seed, folder))
    write = partial(_write_one, spacing_mm=spacing_mm, protocol=protocol, prevalence_scale=prevalence_scale)
    for job, result in each_finished(write, missing, workers=max(min(jobs, len(missing)), 1)):
        if result is KILLED:
            raise ResourceError(
                f"the process that made phantom {job[0]} was killed, most likely for want of memory; take fewer --jobs"
            )
        yield job[1], False


def holds_phantom(folder: Path, seed: int, settings: Mapping[str, Any]) -> bool:
    """Whether a folder holds exactly this phantom; False where there is no such folder.

    Raises:
        OutputError: The folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        truth = json.loads((folder / TRUTH_FILE).read_text(encoding="utf-8"))
        same = truth["seed"] == seed and truth["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise OutputError(
            f"{folder} exists already and is not the phantom of seed {seed} with these settings; name a new folder"
        )
    return True


def _write_one(
    job: tuple[int, Path],
    *,
    spacing_mm: tuple[float, float, float],
    protocol: str | None,
    prevalence_scale: float,
) -> None:
    seed, folder = job
    phantom = generate_phantom(
        seed, spacing_mm=spacing_mm, protocol=protocol, prevalence_scale=prevalence_scale
    )
    write_phantom(phantom, folder)


def _write_ct(volume: Volume, path: Path) -> None:
    """NIfTI counts (i, j, k) fastest first; the transposed view keeps every voxel where it is in the patient."""
    image = nib.Nifti1Image(volume.voxels_DHW.transpose(2, 1, 0), volume.affine[:, [2, 1, 0, 3]])
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
