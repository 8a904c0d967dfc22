"""Affines of MetaImage and NRRD headers, as SimpleITK reads them; the voxels are read by `vlm3d.io.raster`.

SimpleITK's own reading hands back damaged compressed voxels without a word, so only its header parsers are
used here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from vlm3d.errors import UnreadableFileError
from vlm3d.io.geometry import LPS_TO_RAS
from vlm3d.io.wording import reason, shown


def itk_affine(path: Path, image_io: str, sizes_WHD: tuple[int, int, int]) -> NDArray[np.float64]:
    """Index (d, h, w, 1) to RAS+ mm, as ITK understands the file's header.

    Args:
        path: The header, already checked.
        image_io: ITK's reader, such as ``"MetaImageIO"``.
        sizes_WHD: The grid that our own look at the header found; ITK must agree.

    Raises:
        UnreadableFileError: ITK cannot read the header, or reads another grid.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(image_io)
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        last = RuntimeError(lines[-1]) if lines else error
        raise UnreadableFileError(f"{shown(path)} has a damaged header: {reason(last)}.") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)
    if tuple(reader.GetSize()) != sizes_WHD:
        raise UnreadableFileError(
            f"{shown(path)} has a header that can be read in two ways. Export it again."
        )
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * np.array(reader.GetSpacing())
    affine[:3, 3] = reader.GetOrigin()
    return (LPS_TO_RAS @ affine)[:, [2, 1, 0, 3]]
