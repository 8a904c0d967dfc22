"""The model's window: never longer than allowed, always whole patches, around the lungs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.preprocessing.cropping import choose_window, cut_core, lung_box


@given(
    full=st.integers(1, 300),
    blocks=st.integers(1, 20),
    multiple=st.integers(1, 16),
    fixed=st.booleans(),
    core=st.none() | st.tuples(st.floats(0, 300), st.floats(1, 100)),
    margin=st.floats(0, 30),
)
@settings(max_examples=300, deadline=None)
def test_every_window_is_whole_patches_within_its_limit_and_holds_the_lungs_if_they_fit(
    full: int, blocks: int, multiple: int, fixed: bool, core: tuple[float, float] | None, margin: float
) -> None:
    longest = blocks * multiple
    if core is not None:
        start = min(core[0], full - 1.0)
        core = (start, min(full, start + core[1]))
    window = choose_window(full, longest, multiple, fixed=fixed, core=core, margin=margin)
    assert window.size % multiple == 0
    assert window.size == longest if fixed else 0 < window.size <= longest
    first, last = window.content
    assert 0 <= first < last <= window.size
    if window.size >= full:
        assert last - first == full
        assert abs(first - (window.size - last)) <= 1
    else:
        assert (first, last) == (0, window.size)
    if core is not None and core[1] - core[0] <= window.size - 1:
        assert cut_core(window, core) < 1e-6


@pytest.mark.parametrize("full", [7, 8, 9, 30, 31])
def test_the_middle_is_ct_clips_middle(full: int) -> None:
    window = choose_window(full, 8, 4, fixed=True)
    if full >= 8:
        assert window.start == (full - 8) // 2
    else:
        assert window.start == -((8 - full) // 2)


def test_margin_is_kept_where_it_fits_and_given_up_first() -> None:
    window = choose_window(200, 96, 8, fixed=False, core=(60.0, 110.0), margin=20.0)
    assert (window.start, window.size) == (37, 96)
    window = choose_window(200, 56, 8, fixed=False, core=(60.0, 110.0), margin=20.0)
    assert (window.start, window.size) == (57, 56)
    window = choose_window(200, 40, 8, fixed=False, core=(60.0, 110.0), margin=20.0)
    assert (window.start, window.size) == (65, 40)
    assert cut_core(window, (60.0, 110.0)) == 10.0


def test_lung_box_holds_lungs_and_pleural_spaces_and_nothing_else() -> None:
    regions = np.full((20, 41, 50), REGION_IDS["body_wall"], np.uint8)
    regions[5:9, 11:20, 13:21] = REGION_IDS["right_lower_lobe"]
    regions[8:12, 13:28, 30:37] = REGION_IDS["left_pleural_space"]
    box = lung_box(regions)
    assert box is not None
    assert box[0] == (5, 12)
    for (start, stop), (first, last) in zip(box[1:], ((11, 28), (13, 37)), strict=True):
        assert first - 1 <= start <= first
        assert last <= stop <= last + 1
    assert lung_box(np.full((3, 4, 5), REGION_IDS["heart"], np.uint8)) is None
