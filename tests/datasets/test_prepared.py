"""Reading a store: whole or in crops, from threads and forks, and never a damaged case without a word."""

from __future__ import annotations

import math
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.small_cases import GRID, case, small_cases
from vlm3d.datasets.prepare import prepare
from vlm3d.datasets.prepared import PreparedDataset, lesion_masks
from vlm3d.errors import ConfigError, DataError
from vlm3d.labels import STORED_LESION_KEYS

BOX = ((2, 20), (5, 30), (0, 17))


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "store"
    cases = small_cases(2)
    cases.append(case("in_test", cases[0].load, split="test"))
    cases.append(case("of_no_split", cases[0].load, split=None))
    prepare(cases, folder, GRID, anatomy="given", workers=1)
    return folder


@pytest.fixture
def damaged_store(whole_store: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole_store, tmp_path / "copy"))


def test_splits_choose_cases_and_none_takes_all(whole_store: Path) -> None:
    assert [c.case_id for c in PreparedDataset(whole_store).cases] == ["case_0", "case_1"]
    assert [c.case_id for c in PreparedDataset(whole_store, ("test",)).cases] == ["in_test"]
    assert len(PreparedDataset(whole_store, ("train", "test"))) == 3
    assert len(PreparedDataset(whole_store, None)) == 4
    assert len(PreparedDataset(whole_store, ("valid",))) == 0


def test_some_are_of_patients_drawn_the_same_each_time(whole_store: Path) -> None:
    dataset = PreparedDataset(whole_store, None)
    some = dataset.some_of_patients(2)
    assert len(some) == 2
    assert len(dataset) == 4
    assert [c.case_id for c in some.cases] == [c.case_id for c in dataset.some_of_patients(3).cases[:2]]
    assert {c.case_id for c in dataset.some_of_patients(9).cases} == {c.case_id for c in dataset.cases}
    for index, found in enumerate(some.cases):
        place = next(i for i, c in enumerate(dataset.cases) if c.case_id == found.case_id)
        np.testing.assert_array_equal(some.read(index).hu_DHW, dataset.read(place).hu_DHW)


def test_a_box_is_that_part_of_the_whole(whole_store: Path) -> None:
    dataset = PreparedDataset(whole_store)
    whole, part = dataset.read(0), dataset.read(0, BOX)
    place = tuple(slice(*side) for side in BOX)
    assert whole.hu_DHW.shape == dataset.cases[0].shape_DHW
    np.testing.assert_array_equal(part.hu_DHW, whole.hu_DHW[place])
    np.testing.assert_array_equal(part.regions_DHW, whole.regions_DHW[place])
    np.testing.assert_array_equal(part.lesion_bits_DHW, whole.lesion_bits_DHW[place])
    assert (part.hu_DHW.dtype, part.regions_DHW.dtype, part.lesion_bits_DHW.dtype) == (
        np.int16,
        np.uint8,
        np.uint8,
    )


@pytest.mark.parametrize(
    "box", [((0, 33), (0, 9), (0, 9)), ((-1, 4), (0, 9), (0, 9)), ((4, 4), (0, 9), (0, 9))]
)
def test_a_box_beyond_the_case_is_refused(
    whole_store: Path, box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
) -> None:
    with pytest.raises(ValueError, match="does not lie in the shape"):
        PreparedDataset(whole_store).read(0, box)


def test_threads_forks_and_pickles_read_alike(whole_store: Path) -> None:
    dataset = PreparedDataset(whole_store)
    wanted = dataset.read(0, BOX).hu_DHW
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: dataset.read(0, BOX).hu_DHW, range(16)))
    assert all(np.array_equal(hu_DHW, wanted) for hu_DHW in found)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 (our own bytes)
    np.testing.assert_array_equal(copy.read(0, BOX).hu_DHW, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_reads_after_its_parent_did(whole_store: Path) -> None:
    dataset = PreparedDataset(whole_store)
    wanted = dataset.read(0, BOX).hu_DHW
    child = os.fork()
    if child == 0:
        same = np.array_equal(dataset.read(0, BOX).hu_DHW, wanted)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_changed_bit_is_found_by_its_checksum(damaged_store: Path) -> None:
    path = damaged_store / "cases" / "case_1" / "image.b2nd"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    dataset = PreparedDataset(damaged_store, verify="sha256")
    dataset.read(0)
    with pytest.raises(DataError, match=r"case case_1 of .* image.b2nd does not have its checksum"):
        dataset.read(1, BOX)


@pytest.mark.parametrize("verify", ["sizes", "sha256"])
def test_a_cut_or_missing_file_is_named(damaged_store: Path, verify: str) -> None:
    folder = damaged_store / "cases"
    (folder / "case_0" / "lesions.b2nd").unlink()
    path = folder / "case_1" / "image.b2nd"
    path.write_bytes(path.read_bytes()[:-100])
    dataset = PreparedDataset(damaged_store, verify=verify)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"case case_0 .* lesions.b2nd is missing"):
        dataset.read(0)
    with pytest.raises(DataError, match=r"case case_1 .* bytes"):
        dataset.read(1)
    assert dataset.damage(1) != ""


@pytest.mark.parametrize("content", [b"", b"not a frame at all, only some bytes" * 9])
def test_unchecked_garbage_is_an_error_all_the_same(damaged_store: Path, content: bytes) -> None:
    (damaged_store / "cases" / "case_0" / "image.b2nd").write_bytes(content)
    with pytest.raises(DataError, match="case case_0 "):
        PreparedDataset(damaged_store, verify="none").read(0)


def test_an_array_of_another_case_is_an_error(damaged_store: Path) -> None:
    folder = damaged_store / "cases" / "case_0"
    shutil.copy(folder / "regions.b2nd", folder / "image.b2nd")
    with pytest.raises(DataError, match=r"holds .* uint8 instead of .* int16"):
        PreparedDataset(damaged_store, verify="none").read(0)


def test_the_store_must_be_what_the_model_was_made_for(whole_store: Path) -> None:
    dataset = PreparedDataset(whole_store)
    dataset.check(GRID)
    dataset.check(GRID, "given")
    other = GRID.model_copy(update={"hu_window": (-1350.0, 150.0)})
    with pytest.raises(ConfigError, match=r"fingerprint .* wanted is .* hu_window"):
        dataset.check(other)
    with pytest.raises(ConfigError, match="anatomy given instead of none"):
        dataset.check(GRID, "none")
    with pytest.raises(DataError, match="is no store"):
        PreparedDataset(whole_store / "cases")


def test_unknown_labels_stay_unknown(whole_store: Path) -> None:
    labels_K = PreparedDataset(whole_store).cases[0].labels_K
    assert labels_K is not None
    assert labels_K[0] == 1.0
    assert math.isnan(labels_K[1])
    assert labels_K[2:] == (0.0,) * 16


@given(
    bits=st.integers(0, 2 ** len(STORED_LESION_KEYS) - 1), known=st.sets(st.sampled_from(STORED_LESION_KEYS))
)
def test_masks_are_one_zero_or_unknown(bits: int, known: set[str]) -> None:
    masks_LDHW = lesion_masks(np.full((1, 1, 1), bits, np.uint8), known)
    wanted = [(bits >> place & 1) if key in known else -1 for place, key in enumerate(STORED_LESION_KEYS)]
    assert masks_LDHW.dtype == np.int8
    assert masks_LDHW[:, 0, 0, 0].tolist() == wanted


def test_masks_come_in_the_order_asked_for() -> None:
    bits = np.array([[[1 << STORED_LESION_KEYS.index("lung_nodule")]]], np.uint8)
    found = lesion_masks(bits, STORED_LESION_KEYS, ("lung_nodule", "hiatal_hernia", "consolidation"))
    assert found[:, 0, 0, 0].tolist() == [1, -1, 0]
