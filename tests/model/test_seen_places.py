"""Where the classifier saw a finding: sides and lobes of patches, mirrored with the scan."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.model.seen_places import seen_places

GRID = (4, 4, 9)
PATCH = (2, 3, 4)


def lungs() -> NDArray[np.uint8]:
    """Regions (8, 12, 36): right lung at low w, upper lobes above, a mediastinum of three patches between the lungs."""
    regions = np.zeros(tuple(n * p for n, p in zip(GRID, PATCH, strict=True)), np.uint8)
    for side, columns in (("right", slice(0, 12)), ("left", slice(24, 36))):
        regions[:4, :, columns] = REGION_IDS[f"{side}_lower_lobe"]
        regions[4:, :, columns] = REGION_IDS[f"{side}_upper_lobe"]
    regions[:, :, 12:24] = REGION_IDS["mediastinum"]
    return regions


def looked(*patches: tuple[int, int, int, float]) -> NDArray[np.float32]:
    weight = np.zeros(GRID, np.float32)
    for z, y, x, much in patches:
        weight[z, y, x] = much
    return weight


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("z", "lobe"), [(0, "lower"), (1, "lower"), (2, "upper"), (3, "upper")])
def test_a_sign_is_told_in_its_lobe(z: int, lobe: str, mirrored: bool) -> None:
    (place,) = seen_places("Atelectasis", looked((z, 1, 8 if mirrored else 0, 0.4)), lungs())
    side = "left" if mirrored else "right"
    assert (place.side, place.region, place.patch_z) == (side, f"{side} {lobe} lobe", z)
    assert place.words == f"{side} {lobe} lobe, {place.level} third"


def test_the_place_most_looked_at_comes_first_and_glances_are_not_told() -> None:
    weight = looked((3, 0, 1, 0.2), (3, 1, 1, 0.25), (0, 0, 6, 0.5), (0, 0, 1, 0.2), (3, 2, 6, 0.04))
    places = seen_places("Bronchiectasis", weight, lungs())
    assert [place.region for place in places] == ["left lower lobe", "right upper lobe"]
    known = seen_places("Bronchiectasis", weight > 0, lungs())
    assert [place.region for place in known] == [
        "right upper lobe",
        "right lower lobe",
        "left lower lobe",
        "left upper lobe",
    ]


def test_what_lies_in_no_lobe_keeps_its_side_and_votes_nothing_beside_lobes() -> None:
    assert [
        p.words for p in seen_places("Atelectasis", looked((1, 1, 4, 1.0)), lungs())
    ] == []  # on the midline
    beside = seen_places("Atelectasis", looked((1, 1, 4, 0.9), (1, 1, 2, 0.4)), lungs())
    assert [place.region for place in beside] == ["right lower lobe"]


def test_nodes_and_devices_are_told_by_their_sides() -> None:
    both = looked((2, 2, 3, 0.5), (2, 2, 5, 0.45), (2, 2, 4, 0.1))
    assert [place.words for place in seen_places("Lymphadenopathy", both, lungs())] == ["right", "left"]
    assert [place.words for place in seen_places("Medical material", both, None)] == ["right", "left"]
    assert [place.side for place in seen_places("Atelectasis", both, None)] == ["right", "left"]


def test_what_fills_lungs_is_told_by_the_lungs_that_are_looked_at() -> None:
    weight = looked(
        (3, 0, 1, 0.5), (2, 0, 1, 0.4), (3, 0, 7, 0.2), (1, 1, 4, 0.9)
    )  # the last lies between the lungs
    assert [place.words for place in seen_places("Emphysema", weight, lungs())] == ["right", "left"]
    weight[3, 0, 7] = 0.1
    assert [place.words for place in seen_places("Emphysema", weight, lungs())] == ["right"]
    assert [place.words for place in seen_places("Emphysema", weight[:, :, ::-1], lungs())] == ["left"]
    assert [place.words for place in seen_places("Mosaic attenuation pattern", weight > 0, None)] == [
        "right",
        "left",
    ]


def test_what_has_no_place_is_told_none() -> None:
    assert seen_places("Cardiomegaly", looked((0, 0, 0, 1.0)), lungs()) == []
    assert seen_places("Atelectasis", np.zeros(GRID, bool), lungs()) == []
