"""Lesions matched, counted by size, ranked by confidence; against literal walks over small masks."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import ndimage

from vlm3d.evaluation.lesion_matching import LesionOverlaps, lesion_overlaps
from vlm3d.evaluation.localization import (
    detection_ap,
    froc,
    lesion_figures,
    localization_figures,
    mask_record,
    size_names,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from monai.metrics import compute_dice, compute_iou

SPACING_MM = (2.0, 1.0, 1.0)


def cubes(shape: tuple[int, int, int], *corners: tuple[int, int, int, int]) -> np.ndarray:
    """A mask with a cube for each (d, h, w, side)."""
    mask = np.zeros(shape, dtype=bool)
    for d, h, w, side in corners:
        mask[d : d + side, h : h + side, w : w + side] = True
    return mask


@pytest.mark.parametrize("seed", range(4))
def test_overlaps_equal_a_walk_over_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = rng.random((6, 9, 8)) < 0.3, rng.random((6, 9, 8)) < 0.3
    probability = np.where(predicted, rng.uniform(0.5, 1, truth.shape), 0.1)
    found = lesion_overlaps(predicted, truth, SPACING_MM, probability)
    p_label, p_count = ndimage.label(predicted)
    t_label, t_count = ndimage.label(truth)
    np.testing.assert_allclose(
        found.truth_ml_T, [(t_label == t).sum() * 0.002 for t in range(1, t_count + 1)]
    )
    np.testing.assert_allclose(
        found.confidence_P, [probability[p_label == p].max() for p in range(1, p_count + 1)]
    )
    expected = {}
    for p, t in itertools.product(range(p_count), range(t_count)):
        mine, theirs = p_label == p + 1, t_label == t + 1
        if (mine & theirs).any():
            expected[p, t] = (mine & theirs).sum() / (mine | theirs).sum()
    assert dict(zip(zip(found.predicted_o, found.truth_o, strict=True), found.iou_o, strict=True)) == expected
    best = 0.0  # of all one-to-one choices among the pairs that count
    counting = [pair for pair, iou in expected.items() if iou >= 0.4]
    for size in range(min(len(counting), 4) + 1):
        for chosen in itertools.combinations(counting, size):
            if len({p for p, _ in chosen}) == len({t for _, t in chosen}) == size:
                best = max(best, sum(expected[pair] for pair in chosen))
    assert found.partners(0.4).sum() == pytest.approx(best)


def test_record_of_two_cubes() -> None:
    shape = (12, 20, 20)
    truth, predicted = cubes(shape, (1, 1, 1, 4), (6, 10, 10, 5)), cubes(shape, (1, 1, 2, 4), (0, 14, 14, 2))
    record = mask_record(predicted, truth, SPACING_MM)
    assert record.dice == pytest.approx(2 * 48 / (72 + 189))
    assert record.iou == pytest.approx(48 / (72 + 189 - 48))
    batch = [torch.from_numpy(mask)[None, None] for mask in (predicted, truth)]
    assert record.dice == pytest.approx(float(compute_dice(*batch)), abs=1e-6)
    assert record.iou == pytest.approx(float(compute_iou(*batch)), abs=1e-6)
    assert record.lesions is not None
    np.testing.assert_allclose(record.lesions.partners(), [48 / 80, 0])
    figures = localization_figures({"lung_nodule": [record]})
    nodule = figures["per_lesion"]["lung_nodule"]
    assert nodule["hd95_mm"] == record.hd95_mm == figures["macro"]["hd95_mm"]
    lesions = nodule["lesions"]
    assert (lesions["truth"], lesions["predicted"], lesions["sensitivity"], lesions["precision"]) == (
        2,
        2,
        0.5,
        0.5,
    )
    small, large = (2 * 4**3 * 6 / math.pi) ** (1 / 3), (2 * 5**3 * 6 / math.pi) ** (1 / 3)
    assert small < 10 > large
    assert lesions["by_size"]["<10 mm"] == {"truth": 2, "sensitivity": 0.5, "dice": pytest.approx(0.75 / 2)}
    assert math.isnan(lesions["by_size"]["10-30 mm"]["dice"])
    assert size_names() == ("<10 mm", "10-30 mm", ">=30 mm")


def test_empty_masks_and_unknown_spacing() -> None:
    nothing, cube = np.zeros((5, 5, 5), dtype=bool), cubes((5, 5, 5), (1, 1, 1, 2))
    both = mask_record(nothing, nothing, SPACING_MM)
    assert math.isnan(both.dice)
    assert math.isnan(both.surface_dice)
    missed = mask_record(nothing, cube, SPACING_MM)
    assert (missed.dice, missed.iou, missed.surface_dice) == (0, 0, 0)
    assert math.isnan(missed.hd95_mm)
    figures = localization_figures({"a": [both, missed], "b": [mask_record(cube, cube)], "c": []})
    assert figures["per_lesion"]["a"]["dice"] == 0
    assert figures["per_lesion"]["a"]["surface_cases"] == 0
    assert figures["per_lesion"]["a"]["lesions"]["sensitivity"] == 0
    assert math.isnan(figures["per_lesion"]["a"]["lesions"]["precision"])
    assert figures["per_lesion"]["b"] == {"dice": 1, "iou": 1, "cases": 1}
    assert math.isnan(figures["per_lesion"]["c"]["dice"])
    assert figures["macro"]["dice"] == 0.5
    with pytest.raises(ValueError, match="three positive lengths"):
        mask_record(cube, cube, (1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="against"):
        mask_record(cube, cube[1:], SPACING_MM)


def overlaps(truths: int, *predictions: tuple[float, dict[int, float]]) -> LesionOverlaps:
    """A case from (confidence, true lesion -> IoU) of each prediction."""
    pairs = [(p, t, iou) for p, (_, hits) in enumerate(predictions) for t, iou in hits.items()]
    predicted, truth, iou = zip(*pairs, strict=True) if pairs else ((), (), ())
    return LesionOverlaps(
        truth_ml_T=np.full(truths, 1.0),
        predicted_ml_P=np.full(len(predictions), 1.0),
        confidence_P=np.array([confidence for confidence, _ in predictions]),
        predicted_o=np.array(predicted, dtype=np.intp),
        truth_o=np.array(truth, dtype=np.intp),
        iou_o=np.array(iou, dtype=np.float64),
    )


def test_average_precision_of_lesions() -> None:
    cases = [overlaps(2, (0.9, {0: 0.8}), (0.7, {1: 0.3}), (0.6, {1: 0.6})), overlaps(1, (0.8, {}))]
    # ranked: hit, false (0.8), false (0.7 overlaps too little), hit -> precision 1, then 1/2 at recall 2/3
    assert detection_ap(cases) == pytest.approx((1 + 0.5) / 3)
    assert detection_ap([overlaps(2, (0.9, {0: 0.9}), (0.8, {1: 0.9}))]) == 1
    assert (
        detection_ap([overlaps(1, (0.9, {0: 0.6}), (0.8, {0: 0.55}))]) == 1
    )  # the second comes after full recall
    assert detection_ap([overlaps(2)]) == 0
    assert math.isnan(detection_ap([overlaps(0, (0.9, {}))]))
    tied = [overlaps(1, (0.5, {}), (0.5, {0: 0.9}))]
    assert detection_ap(tied) == 0.5  # equal confidences enter together


def test_froc_of_lesions() -> None:
    cases = [
        overlaps(2, (0.9, {0: 0.8}), (0.8, {0: 0.2}), (0.7, {}), (0.4, {1: 0.3})),
        overlaps(2, (0.85, {}), (0.6, {1: 0.5})),
    ]
    # ranked: hit, false, (again lesion 0), false, hit, hit; two scans
    assert froc(cases) == {"0.5": 1 / 4, "1": 3 / 4, "2": 3 / 4, "4": 3 / 4}
    assert froc([overlaps(1), overlaps(1)]) == {"0.5": 0, "1": 0, "2": 0, "4": 0}
    assert all(math.isnan(value) for value in froc([overlaps(0, (0.5, {}))]).values())
    assert lesion_figures(cases)["sensitivity"] == 3 / 4
