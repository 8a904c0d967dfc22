"""Pictures as radiologists look at them: right on the left, head up, true proportions, windows in HU."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vlm3d.outputs.slice_images import (
    LUNG,
    MEDIASTINUM,
    Plane,
    body_box,
    figure,
    outlines_on,
    slice_of,
    to_gray,
)
from vlm3d.outputs.slice_viewer import build_viewer, choose_slices

SHAPE = (20, 30, 40)
SPACING = (3.0, 1.0, 2.0)
WHOLE = (slice(0, 20), slice(0, 30), slice(0, 40))


def decoded(uri: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[-1]))))


def quadrant(picture: NDArray[np.uint8]) -> tuple[str, str]:
    """Where a picture's bright spot lies."""
    row, column = np.argwhere(picture > 200).mean(axis=0)
    return (
        "top" if row < picture.shape[0] / 2 else "bottom",
        "left" if column < picture.shape[1] / 2 else "right",
    )


@pytest.mark.parametrize(
    ("plane", "index", "place"),
    [
        ("axial", 16, ("top", "left")),
        ("coronal", 5, ("top", "left")),
        ("sagittal", 8, ("top", "left")),
    ],
)
def test_a_spot_superior_anterior_and_right(plane: Plane, index: int, place: tuple[str, str]) -> None:
    """The patient's right is on the left, anterior on top or on the left, the head on top."""
    voxels = np.full(SHAPE, -1000, np.int16)
    voxels[14:19, 3:8, 5:11] = 1000
    shown = figure(voxels, plane, index, WHOLE, SPACING, MEDIASTINUM, alt="spot")
    assert quadrant(decoded(shown.image)) == place
    assert shown.markers[:2] == (("A", "P") if plane == "sagittal" else ("R", "L"))
    assert shown.markers[2:] == (("A", "P") if plane == "axial" else ("S", "I"))


@pytest.mark.parametrize(
    ("plane", "width_mm", "height_mm"), [("axial", 80, 30), ("coronal", 80, 60), ("sagittal", 30, 60)]
)
def test_proportions_are_those_of_the_patient(plane: Plane, width_mm: float, height_mm: float) -> None:
    shown = figure(np.zeros(SHAPE, np.int16), plane, 0, WHOLE, SPACING, LUNG, alt="")
    assert (shown.width_mm, shown.height_mm) == (width_mm, height_mm)
    assert shown.view_box == f"0 0 {width_mm * 10} {height_mm * 10}"


def test_a_large_slice_shrinks_and_keeps_its_proportions() -> None:
    voxels = np.zeros((1, 500, 1000), np.int16)
    whole = (slice(0, 1), slice(0, 500), slice(0, 1000))
    shown = figure(voxels, "axial", 0, whole, (1.0, 1.0, 1.0), LUNG, alt="", longest_px=640)
    assert decoded(shown.image).shape == (320, 640)
    assert (shown.width_mm, shown.height_mm) == (1000, 500)


def test_windows_keep_lungs_apart_from_air_and_ignore_padding() -> None:
    hu = np.array([[-3024, -2048, -1350, -600, 150, 3000, np.nan]])
    assert to_gray(hu, LUNG).tolist() == [[0, 0, 0, 128, 255, 255, 55]]
    assert to_gray(np.array([[-160, 40, 240]]), MEDIASTINUM).tolist() == [[0, 128, 255]]
    assert "−600" in LUNG.label


def test_the_body_is_found_and_the_table_is_not() -> None:
    voxels = np.full((4, 120, 120), -1000, np.int16)
    voxels[:, 20:80, 30:90] = 0
    voxels[:, 100:102, :] = 200
    box = body_box(voxels, (4.0, 3.0, 3.0))
    assert box[0] == slice(0, 4)
    assert 0 < box[1].start <= 20
    assert 80 <= box[1].stop < 100
    assert 0 < box[2].start <= 30
    assert 90 <= box[2].stop < 120


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (5, 64, 64)])
def test_air_is_shown_whole(shape: tuple[int, int, int]) -> None:
    box = body_box(np.full(shape, -1000, np.int16), (1.0, 1.0, 1.0))
    assert box == tuple(slice(0, size) for size in shape)


def test_outlines_follow_the_cropped_slice() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[10, 12:18, 20:30] = True
    box = (WHOLE[0], slice(10, 30), slice(20, 40))
    found = outlines_on(
        {"a": mask, "b": ~mask & False}, "axial", 10, box, SPACING, {"a": "main", "b": "other"}
    )
    assert [(outline.lesion, outline.style) for outline in found] == [("a", "main")]
    assert found[0].path.startswith("M")
    assert outlines_on({"a": mask}, "axial", 11, box, SPACING, {"a": "main"}) == ()
    np.testing.assert_array_equal(slice_of(mask, "axial", 10, box)[2:8, :10], True)


@pytest.mark.parametrize(
    ("depth", "keys"), [(1, [0]), (80, [3, 79]), (300, [7, 8, 9, 150, 299]), (81, range(81))]
)
def test_the_viewer_shows_key_slices(depth: int, keys: list[int]) -> None:
    chosen = choose_slices(depth, keys)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(depth, 80)
    assert set(list(keys)[:80]) <= set(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < depth


def test_the_viewer_goes_from_head_to_feet() -> None:
    voxels = np.repeat(np.linspace(-1000, 200, 20).astype(np.int16)[:, None, None], 30 * 40, 1).reshape(SHAPE)
    mask = np.zeros(SHAPE, bool)
    mask[5:10, 10:20, 10:20] = True
    affine = np.array([[0, 0, -2.0, 9], [0, -1, 0, 9], [3, 0, 0, -100], [0, 0, 0, 1]])
    viewer = build_viewer(voxels, affine, SPACING, {"a": mask}, WHOLE, key_slices=[7], start_slice=7)
    assert [entry["index"] for entry in viewer.slices] == list(range(19, -1, -1))
    assert [entry["z"] for entry in viewer.slices[:2]] == [-43.0, -46.0]
    assert viewer.slices[viewer.start]["index"] == 7
    assert [entry["index"] for entry in viewer.slices if entry["outlines"]] == [9, 8, 7, 6, 5]
    assert viewer.tracks[0].spans == ((50.0, 25.0),)
    brightness = [decoded(entry["lung"]).mean() for entry in viewer.slices]
    assert brightness[0] > brightness[-1]
