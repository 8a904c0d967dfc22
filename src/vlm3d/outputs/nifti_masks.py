"""Lesion masks as NIfTI files that lie exactly on the scan, in any viewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from numpy.typing import NDArray

_GZIP_LEVEL = 1
_SCANNER_SPACE = 1
_DESCRIP_BYTES = 80
_ROTATION_TOLERANCE = 1e-4


def write_mask(
    mask_DHW: NDArray[Any], affine: NDArray[np.float64], path: Path, *, description: str = "vlm3d mask"
) -> None:
    """Write one mask on the scan's own grid, so that a viewer lays it over the scan.

    NIfTI's first index runs fastest, the array's last one does: the axes are written in reverse order, and the affine's
    columns with them, so every voxel keeps its place in mm and nothing is copied.

    Args:
        mask_DHW: bool, or integers of which all but 0 count as lesion.
        affine: (4, 4); maps (d, h, w, 1) to RAS+ mm.
        path: Ends in ``.nii.gz``.
        description: Goes into the header; shortened to 79 ASCII characters.

    Raises:
        ValueError: The mask is not 3D.
        OSError: The file cannot be written.
    """
    if mask_DHW.ndim != 3:
        raise ValueError(f"a mask is 3D, got shape {mask_DHW.shape}")
    lesion_DHW = np.ascontiguousarray(mask_DHW if mask_DHW.dtype == np.bool_ else mask_DHW != 0)
    lesion_ijk = lesion_DHW.view(np.uint8).transpose(2, 1, 0)
    affine_ijk = np.asarray(affine, dtype=np.float64)[:, [2, 1, 0, 3]]

    image = nib.Nifti1Image(lesion_ijk, affine_ijk)
    image.set_sform(affine_ijk, code=_SCANNER_SPACE)
    image.set_qform(affine_ijk, code=_SCANNER_SPACE, strip_shears=True)
    if not np.allclose(image.get_qform(), affine_ijk, atol=_ROTATION_TOLERANCE):
        image.set_qform(None, code=0)  # a sheared grid has no quaternion; a wrong one would displace the mask
    header: Any = image.header
    header.set_xyzt_units("mm")
    header["cal_max"] = 1
    header["descrip"] = description.encode("ascii", "replace")[: _DESCRIP_BYTES - 1]
    with (
        path.open("wb") as file,
        igzip.GzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=file, mtime=0) as packed,
    ):
        image.to_stream(packed)
