"""Disk to `Volume` and back: NIfTI, DICOM, MetaImage, NRRD, NPZ. Nothing else opens a file of a scan."""

from vlm3d.io.dicom_series import SeriesInfo
from vlm3d.io.nifti import write_nifti_mask
from vlm3d.io.npz import NpzCase, read_npz_case
from vlm3d.io.reading import Mask, list_series, read_mask, read_volume
from vlm3d.io.writing import atomic_writer, settle_folder, whole_folder, write_atomically

__all__ = [
    "Mask",
    "NpzCase",
    "SeriesInfo",
    "atomic_writer",
    "list_series",
    "read_mask",
    "read_npz_case",
    "read_volume",
    "settle_folder",
    "whole_folder",
    "write_atomically",
    "write_nifti_mask",
]
