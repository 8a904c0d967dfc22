"""The challenge's box figures against a literal walk, over random and degenerate cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm3d.evaluation.boxes import box_figures, box_froc, iou_of_boxes, match_boxes
from vlm3d.evaluation.official_boxes import LesionBox, boxes_of_mask
from vlm3d.labels import LESION_KEYS

KEYS = LESION_KEYS[:3]


def box(*values: float, probability: float = 1.0) -> LesionBox:
    return LesionBox(tuple(float(value) for value in values), probability)  # type: ignore[arg-type]


def literal_iou(a: LesionBox, b: LesionBox) -> float:
    shared = 1.0
    for axis in range(3):
        low = max(a.bbox_mm[axis], b.bbox_mm[axis])
        high = min(a.bbox_mm[axis] + a.bbox_mm[axis + 3], b.bbox_mm[axis] + b.bbox_mm[axis + 3])
        shared *= max(0.0, high - low)
    volumes = sum(float(np.prod(one.bbox_mm[3:])) for one in (a, b))
    return shared / (volumes - shared) if shared else 0.0


def random_case(rng: np.random.Generator, most: int) -> dict[str, list[LesionBox]]:
    return {
        key: [
            box(*rng.integers(0, 8, 3), *rng.integers(1, 7, 3), probability=float(rng.random()))
            for _ in range(rng.integers(0, most + 1))
        ]
        for key in KEYS
    }


def literal_figures(predicted: dict, truth: dict) -> tuple[dict, dict]:
    """Best assignment by trying all; IoU and distance of each lesion."""
    ious, distances = {}, {}
    for key in KEYS:
        pairs = []
        for case in set(predicted) | set(truth):
            p, t = predicted.get(case, {}).get(key, []), truth.get(case, {}).get(key, [])
            fewer = min(len(p), len(t))
            choices = [
                list(zip(rows, columns, strict=True))
                for rows in itertools.combinations(range(len(p)), fewer)
                for columns in itertools.permutations(range(len(t)), fewer)
            ]
            best = max(choices, key=lambda chosen: sum(literal_iou(p[r], t[c]) for r, c in chosen))
            for r, c in best:
                read_back = 1.0 - (
                    1.0 - literal_iou(p[r], t[c])
                )  # the official scorer reads it from the costs
                if read_back >= 0.10:
                    ends = [np.array(one.bbox_mm[:3]) + np.array(one.bbox_mm[3:]) / 2 for one in (p[r], t[c])]
                    pairs.append((read_back, float(np.linalg.norm(ends[0] - ends[1]))))
        exists = any(case.get(key) for case in truth.values())
        ious[key] = np.mean([one for one, _ in pairs]) if pairs else (0.0 if exists else None)
        distances[key] = np.mean([one for _, one in pairs]) if pairs else (768.0 if exists else None)
    return ious, distances


def literal_froc(predicted: dict, truth: dict, budget: float) -> float:
    """One walk over the boxes of all scans."""
    rows = [(case, key, one) for case in predicted for key in KEYS for one in predicted[case].get(key, [])]
    rows.sort(key=lambda row: -row[2].probability)
    found, alarms = set(), dict.fromkeys(predicted, 0)
    for case, key, one in rows:
        if alarms[case] >= budget:
            continue
        best, where = 0.0, None
        for place, other in enumerate(truth.get(case, {}).get(key, [])):
            if (case, key, place) not in found and literal_iou(one, other) > best:
                best, where = literal_iou(one, other), (case, key, place)
        if best >= 0.10:
            found.add(where)
        else:
            alarms[case] += 1
    total = sum(len(boxes) for case in truth.values() for boxes in case.values())
    return len(found) / total if total else 0.0


@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_figures_equal_a_literal_walk(seed: int, most_predicted: int, most_true: int) -> None:
    rng = np.random.default_rng(seed)
    predicted = {case: random_case(rng, most_predicted) for case in ("s1", "s2", "s3")}
    truth = {case: random_case(rng, most_true) for case in ("s1", "s2", "s4")}
    found = box_figures(predicted, truth, {key: key for key in KEYS})
    iou, distance = literal_figures(predicted, truth)
    for figure, expected in (("iou", iou), ("distance", distance)):
        assert set(found[figure]["per_pathology"]) == set(KEYS)
        for key in KEYS:
            if expected[key] is None:
                assert found[figure]["per_pathology"][key] is None
            elif figure == "iou":
                assert found[figure]["per_pathology"][key] == pytest.approx(expected[key], abs=1e-9)
        known = [value for value in found[figure]["per_pathology"].values() if value is not None]
        assert found[figure]["macro"] == (pytest.approx(np.mean(known), abs=1e-9) if known else None)
    for budget in (0.5, 1, 2, 4):
        assert found["froc"][f"{budget:g}"] == literal_froc(predicted, truth, budget)


def test_distance_runs_between_centers() -> None:
    predicted, truth = box(0, 0, 0, 4, 4, 4), box(1, 0, 0, 4, 4, 6)
    ((iou, distance),) = match_boxes([predicted], [truth])
    assert iou == pytest.approx(48 / (64 + 96 - 48))
    assert distance == pytest.approx(np.sqrt(2))


def test_threshold_and_worst_figures() -> None:
    truth = {"s": {"lung_nodule": [box(0, 0, 0, 10, 1, 1)]}}
    at = {"s": {"lung_nodule": [box(0, 0, 0, 1, 1, 1)]}}  # IoU 0.1
    below = {"s": {"lung_nodule": [box(0, 0, 0, 0.99, 1, 1)]}}
    assert box_froc(at, truth, 1) == 1
    assert box_froc(below, truth, 1) == 0
    found = box_figures(below, truth)
    assert found["iou"]["per_pathology"]["Lung nodule"] == 0.0
    assert found["distance"]["macro"] == 768.0
    assert found["iou"]["per_pathology"]["Consolidation"] is None
    nothing = box_figures({}, {})
    assert (nothing["iou"]["macro"], nothing["froc"]["4"]) == (None, 0.0)
    assert iou_of_boxes(np.zeros((0, 6)), np.zeros((2, 6))).shape == (0, 2)


def test_a_scan_stops_at_its_own_budget() -> None:
    hit, miss = (0, 0, 0, 2, 2, 2), (50, 50, 50, 2, 2, 2)
    truth = {"a": {"lung_nodule": [box(*hit)]}, "b": {"consolidation": [box(*hit)]}}
    predicted = {
        "a": {"lung_nodule": [box(*hit, probability=0.2)], "consolidation": [box(*miss, probability=0.9)]},
        "b": {"consolidation": [box(*hit, probability=0.1)]},
    }
    assert [box_froc(predicted, truth, budget) for budget in (0.5, 1, 2)] == [0.5, 0.5, 1.0]


def test_boxes_of_equal_masks_match_perfectly() -> None:
    mask = np.zeros((8, 9, 10), dtype=bool)
    mask[1:3, 2:4, 3:5] = mask[5:7, 6:8, 1:2] = True
    boxes = boxes_of_mask(mask, np.diag([-0.7, -0.8, 2.5, 1.0])[:, [2, 1, 0, 3]])
    found = box_figures({"s": {"lung_nodule": boxes}}, {"s": {"lung_nodule": boxes}})
    assert (found["iou"]["macro"], found["distance"]["macro"], found["froc"]["0.5"]) == (1.0, 0.0, 1.0)
