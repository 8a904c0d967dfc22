"""Headers that say one thing about pixels while the pixels are another."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless

from support.scan_files import affine_of, small_chest, with_values, write_dicom
from vlm3d.errors import NotAChestCTError, UnreadableFileError
from vlm3d.io import dicom_pixels, read_volume
from vlm3d.io.codestream import codestream_size

CHEST = small_chest((16, 40, 44))
AFFINE = affine_of()


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless], ids=lambda uid: uid.name)
def test_a_compressed_image_of_another_size_is_refused_before_it_is_decoded(
    tmp_path: Path, syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE, syntax=syntax)
    large = write_dicom(tmp_path / "large", np.zeros((1, 400, 440), np.int16), AFFINE, syntax=syntax)
    foreign = pydicom.dcmread(next(large.iterdir())).PixelData
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.PixelData = foreign
        dataset.save_as(path, overwrite=True)
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda _: pytest.fail("was decoded")))
    with pytest.raises(UnreadableFileError, match="400 x 440"):
        read_volume(folder)


def test_sizes_of_codestreams(tmp_path: Path) -> None:
    for syntax in (JPEG2000Lossless, JPEGLSLossless):
        folder = write_dicom(tmp_path / syntax, CHEST[:1], AFFINE, syntax=syntax)
        pixels = pydicom.dcmread(next(folder.iterdir())).PixelData
        (stream,) = generate_frames(pixels, number_of_frames=1)
        assert codestream_size(stream) == (40, 44, 1)
        assert codestream_size(stream[:9]) is None
    boxed = struct.pack(">I4sII4s", 12, b"jP  ", 0x0D0A870A, 0, b"jp2c")
    jpeg2000 = b"\xff\x4f\xff\x51" + struct.pack(">HH8IH", 41, 0, 50, 45, 6, 5, 0, 0, 0, 0, 3)
    assert codestream_size(jpeg2000) == (40, 44, 3)
    assert codestream_size(boxed + jpeg2000) == (40, 44, 3)
    assert codestream_size(b"\xff\xd8\xff\xff\xc4\0\x03x\xff\xc3\0\x0b\x10\0\x28\0\x2c\x01") == (40, 44, 1)
    for nonsense in (b"", b"\xff\xd8", b"\xff\xd8\xff\xda", bytes(64), b"\0\0\0\x0cjP  \r\n\x87\n"):
        assert codestream_size(nonsense) is None


@pytest.mark.parametrize(("stored", "high"), [(12, 15), (16, 11)])
def test_bits_that_do_not_begin_at_bit_0_are_refused(tmp_path: Path, stored: int, high: int) -> None:
    with pytest.raises(UnreadableFileError, match="HighBit"):
        read_volume(
            write_dicom(tmp_path / "s", CHEST, AFFINE, change=with_values(BitsStored=stored, HighBit=high))
        )


@pytest.mark.parametrize("unit", ["Z_EFF", "ED", "OD", "PCT"])
def test_values_in_another_unit_are_refused(tmp_path: Path, unit: str) -> None:
    with pytest.raises(NotAChestCTError, match=unit):
        read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=with_values(RescaleType=unit)))


@pytest.mark.parametrize(
    ("unit", "told"),
    [("HU", ""), ("hu", ""), ("US", "no Hounsfield"), ("HU_MOD", "modified"), ("J. Doe", "no H")],
)
def test_a_unit_that_may_be_hu_is_read_with_a_note(tmp_path: Path, unit: str, told: str) -> None:
    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=with_values(RescaleType=unit)))
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert [told in note for note in scan.notes] == ([True] if told else [])
    assert "Doe" not in "".join(scan.notes)


def test_inverted_gray_values_are_read_where_they_are_stored_plainly(tmp_path: Path) -> None:
    inverted = with_values(PhotometricInterpretation="MONOCHROME1")
    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=inverted))
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)


def test_inverted_gray_values_in_jpeg_lossless_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed(dataset: Dataset, index: int) -> Dataset:
        dataset.PhotometricInterpretation = "MONOCHROME1"
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        frame = b"\xff\xd8\xff\xc3\0\x0b\x10\0\x28\0\x2c\x01" + bytes(20)
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        return dataset

    monkeypatch.setattr(dicom_pixels, "_has_decoder", lambda _: False)
    with pytest.raises(UnreadableFileError, match="MONOCHROME1"):
        read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=packed))
