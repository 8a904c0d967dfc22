"""One prediction becomes one folder: written as a whole or not at all.

```
OUT/
├── prediction.json          everything, machine-readable (schema: vlm3d.inference.prediction)
├── report.txt               Findings, Impression, Recommendations
├── report.html              one self-contained page to read
└── masks/<lesion>.nii.gz    on the scan's own grid
```
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm3d.inference.prediction import Prediction
from vlm3d.outputs.grounded_text import report_as_text
from vlm3d.outputs.html_report import render_page
from vlm3d.outputs.nifti_masks import write_mask
from vlm3d.outputs.output_folder import (
    MASK_FOLDER,
    PAGE_FILE,
    PREDICTION_FILE,
    REPORT_FILE,
    complete_folder,
)
from vlm3d.volume import RegionMap, Volume

logger = logging.getLogger(__name__)

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


def write_prediction(
    prediction: Prediction,
    volume: Volume,
    masks: Mapping[str, NDArray[np.bool_]],
    regions: RegionMap | None,
    out_dir: Path,
    *,
    page: bool = True,
    masks_files: bool = True,
    overwrite: bool = False,
) -> dict[str, Path]:
    """Write a scan's prediction as files that a person and a program can read.

    Args:
        prediction: What the model found; its lesions' `mask_file` is set here.
        volume: The scan on its own grid, in HU.
        masks: A bool (D, H, W) mask on the scan's grid for each lesion key.
        regions: Anatomy on the scan's grid, drawn faintly on the page's overviews; None leaves it out.
        out_dir: The folder to create.
        page: Also write ``report.html``.
        masks_files: Also write ``masks/<lesion>.nii.gz``.
        overwrite: Replace an earlier output of vlm3d in `out_dir`.

    Returns:
        The files written: ``"prediction"``, ``"report"``, ``"page"``, and one entry for each lesion key.

    Raises:
        OutputError: The folder may not be used, or cannot be written (permission, full disk); nothing is left behind.
    """
    _check_grids(prediction, volume, masks, regions)
    written = masks if masks_files else {}
    prediction = _with_mask_files(prediction, written)
    names = {"prediction": PREDICTION_FILE, "report": REPORT_FILE}

    with complete_folder(Path(out_dir), overwrite=overwrite) as folder:
        if written:
            (folder / MASK_FOLDER).mkdir()
        for key, mask_DHW in written.items():
            names[key] = _mask_file(key)
            write_mask(
                mask_DHW, volume.affine, folder / names[key], description=_mask_description(prediction, key)
            )
        _write_text(folder / REPORT_FILE, report_as_text(prediction))
        if page:
            names["page"] = PAGE_FILE
            _write_text(folder / PAGE_FILE, render_page(prediction, volume, masks, regions))
        _write_text(folder / PREDICTION_FILE, prediction.model_dump_json(indent=2) + "\n")
    logger.info("wrote %d files to %s", len(names), out_dir)
    return {key: Path(out_dir) / name for key, name in names.items()}


def _check_grids(
    prediction: Prediction,
    volume: Volume,
    masks: Mapping[str, NDArray[np.bool_]],
    regions: RegionMap | None,
) -> None:
    for key, mask_DHW in masks.items():
        if not _PLAIN_NAME.fullmatch(key):
            raise ValueError(f"'{key}' cannot name a mask file; use letters, digits, _ and -")
        if mask_DHW.shape != volume.shape_DHW:
            raise ValueError(f"the mask of {key} has shape {mask_DHW.shape}, the scan {volume.shape_DHW}")
    unknown = set(masks) - {lesion.key for lesion in prediction.lesions}
    if unknown:
        raise ValueError(f"masks without a lesion in the prediction: {', '.join(sorted(unknown))}")
    if regions is not None and regions.labels_DHW.shape != volume.shape_DHW:
        raise ValueError(f"the regions have shape {regions.labels_DHW.shape}, the scan {volume.shape_DHW}")


def _with_mask_files(prediction: Prediction, written: Mapping[str, NDArray[np.bool_]]) -> Prediction:
    lesions = [
        lesion.model_copy(update={"mask_file": _mask_file(lesion.key) if lesion.key in written else None})
        for lesion in prediction.lesions
    ]
    return prediction.model_copy(update={"lesions": lesions})


def _mask_file(key: str) -> str:
    return f"{MASK_FOLDER}/{key}.nii.gz"


def _mask_description(prediction: Prediction, key: str) -> str:
    version = prediction.versions.get("vlm3d", "")
    return f"vlm3d {version} {prediction.model.training} weights: {key}".replace("  ", " ")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
