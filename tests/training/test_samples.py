"""The picture shows truth and prediction where they are, the text says what both are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageColor

from vlm3d.labels import DISEASE_NAMES, LESIONS
from vlm3d.training.samples import CaseSample, draw_sample, sample_text, telling_slice, track_sample
from vlm3d.training.tracking import Tracker

SHAPE = (12, 40, 60)
NODULE, EFFUSION = "lung_nodule", "pleural_effusion"
COLORS = {lesion.key: np.array(ImageColor.getrgb(lesion.color)) for lesion in LESIONS}


def box(depth: slice, rows: slice, columns: slice) -> NDArray[np.bool_]:
    mask = np.zeros(SHAPE, bool)
    mask[depth, rows, columns] = True
    return mask


def case() -> CaseSample:
    true = {NODULE: box(slice(7, 8), slice(10, 20), slice(5, 20)), EFFUSION: np.zeros(SHAPE, bool)}
    predicted = {NODULE: box(slice(7, 8), slice(10, 20), slice(40, 55)), EFFUSION: np.zeros(SHAPE, bool)}
    return CaseSample(
        "case_1", np.full(SHAPE, -600, np.int16), (3.0, 2.0, 1.0), true, predicted,
        true_labels_K=[0.0] * 9 + [1.0, float("nan")] + [0.0] * 7,
        probabilities_K=[k / 20 for k in range(18)],
        true_report="A nodule in the right lung.", predicted_report="",
    )  # fmt: skip


def colored(rgb_HWC: NDArray[np.uint8], key: str) -> NDArray[np.bool_]:
    return (rgb_HWC == COLORS[key]).all(axis=-1)


def test_true_lesions_are_drawn_on_the_left_and_predicted_ones_on_the_right() -> None:
    picture = draw_sample(case())
    assert picture.dtype == np.uint8
    found = colored(picture[:-16], NODULE)  # without the legend
    half = picture.shape[1] // 2
    truth, prediction = found[:, :half], found[:, half:]
    assert truth.any()
    assert prediction.any()
    # true in the slice's left third, predicted in its right third
    assert np.nonzero(truth)[1].max() < half * 0.45
    assert np.nonzero(prediction)[1].min() > half * 0.55
    assert not colored(picture[:-16], EFFUSION).any()


def test_pixels_are_square_whatever_the_spacing() -> None:
    picture = draw_sample(case())  # 80 mm high, 60 mm wide
    rows, columns = np.nonzero(colored(picture[: picture.shape[0] // 2, : picture.shape[1] // 2], NODULE))
    assert np.ptp(rows) / np.ptp(columns) == pytest.approx(20 / 15, rel=0.1)


def test_only_edges_are_drawn() -> None:
    with_lesion, without = (
        draw_sample(case()),
        draw_sample(replace(case(), true_masks={}, predicted_masks={})),
    )
    found = colored(with_lesion[:-16], NODULE)
    rows, columns = np.nonzero(found[: found.shape[0] // 2, : found.shape[1] // 2])
    middle = (rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2
    assert not found[middle]
    assert with_lesion.shape[1:] == without.shape[1:]


def test_air_is_black_and_bone_white_in_the_soft_tissue_window() -> None:
    hu = np.full(SHAPE, -1000, np.int16)
    hu[:, :, 30:] = 1000
    picture = draw_sample(CaseSample("c", hu, (1.0, 1.0, 1.0)))
    soft = picture[picture.shape[0] * 3 // 4]
    quarter = picture.shape[1] // 4
    assert soft[quarter // 2].tolist() == [0, 0, 0]
    assert soft[quarter + quarter // 2].tolist() == [255, 255, 255]


@settings(max_examples=50, deadline=None)
@given(
    true=st.none() | st.integers(0, 11), predicted=st.none() | st.integers(0, 11), large=st.integers(0, 11)
)
def test_the_slice_follows_the_truth_and_small_lesions_count(
    true: int | None, predicted: int | None, large: int
) -> None:
    def at(index: int | None) -> dict[str, NDArray[np.bool_]]:
        return {} if index is None else {NODULE: box(slice(index, index + 1), slice(3, 5), slice(3, 5))}

    assert telling_slice(at(true), at(predicted), 12) == (
        true if true is not None else predicted if predicted is not None else 6
    )
    effusion = box(slice(0, 12), slice(0, 30), slice(0, 30))
    effusion[large, :, 30:40] = True
    if true is not None and true != large:
        assert telling_slice({**at(true), EFFUSION: effusion}, {}, 12) == true


def test_the_text_tells_diseases_lesions_and_both_reports() -> None:
    text = sample_text(case())
    diseases = text.split("\n\n")[1]
    lines = {line[:36].strip(): line[36:].split() for line in diseases.splitlines()}
    assert lines[DISEASE_NAMES[9]] == ["yes", "0.45"]
    assert lines[DISEASE_NAMES[10]] == ["?", "0.50"]
    assert lines[DISEASE_NAMES[0]] == ["no", "0.00"]
    # lesions of 10 x 15 voxels of 6 mm3, apart from one another
    assert "0.9 ml     0.9 ml   0.00" in text
    assert "--- True report ---\nA nodule in the right lung." in text
    assert "--- Predicted report ---\n(empty)" in text


def test_a_case_that_is_known_in_part_is_told_in_part() -> None:
    text = sample_text(CaseSample("c", np.zeros(SHAPE, np.float32), (1, 1, 1), probabilities_K=[0.25] * 18))
    assert "report" not in text
    assert "0.25" in text
    assert text.count("?") == 18


def test_dice_of_equal_masks_is_one_and_unannotated_lesions_have_none() -> None:
    whole = case()
    text = sample_text(
        replace(whole, predicted_masks={NODULE: whole.true_masks[NODULE], EFFUSION: whole.true_masks[NODULE]},
                true_masks={NODULE: whole.true_masks[NODULE]})
    )  # fmt: skip
    assert "0.9 ml     0.9 ml   1.00" in text
    assert "?     0.9 ml      -" in text


def test_the_tracker_keeps_both(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        track_sample(tracker, 5, case())
    folder = tmp_path / "samples" / "00000005"
    assert np.array_equal(np.asarray(Image.open(folder / "case_1.png")), draw_sample(case()))
    assert (folder / "case_1.txt").read_text(encoding="utf-8") == sample_text(case())
