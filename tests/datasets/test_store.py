"""The store's files: what is written is what is read, and what is foreign or damaged is named."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm3d.config import PreprocessingConfig
from vlm3d.datasets import store
from vlm3d.datasets.fingerprint import Fingerprint, open_store, read_fingerprint
from vlm3d.datasets.store import PreparedCase
from vlm3d.errors import ConfigError, DataError, OutputError

ALIKE = Fingerprint(PreprocessingConfig(), "auto")
WORDS = st.text(max_size=40)


def prepared(case_id: str = "a", **fields: Any) -> PreparedCase:
    values: dict[str, Any] = {
        "case_id": case_id,
        "patient_id": "p",
        "source": "npz",
        "split": "train",
        "labels_K": (1.0, math.nan, 0.0),
        "known_lesions": ("lung_nodule",),
        "lesion_voxels": {"lung_nodule": 3},
        "report": None,
        "report_is_synthetic": False,
        "facts": {},
        "shape_DHW": (4, 5, 6),
        "spacing_mm": (1.5, 0.75, 0.75),
        "affine": tuple(tuple(float(x) for x in row) for row in np.eye(4)),
        "geometry": {},
        "regions_method": None,
        "notes": (),
        "files": {},
    }
    return PreparedCase(**{**values, **fields})


def arrays(shape: tuple[int, int, int] = (4, 5, 6)) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        name: rng.integers(0, 200, shape).astype(dtype) if name != "lesions" else np.zeros(shape, dtype)
        for name, dtype in store.ARRAYS.items()
    }


@settings(deadline=None)
@given(
    labels=st.none() | st.lists(st.sampled_from([0.0, 1.0, math.nan]), max_size=18).map(tuple),
    report=st.none() | WORDS,
    facts=st.dictionaries(WORDS, st.none() | st.integers() | WORDS | st.lists(st.integers()), max_size=3),
    split=st.sampled_from([None, "train", "valid", "test"]),
)
def test_a_manifest_line_says_what_the_case_said(
    labels: Any, report: str | None, facts: dict[str, Any], split: Any
) -> None:
    case = prepared(labels_K=labels, report=report, facts=facts, split=split)
    line = case.to_json()
    back = PreparedCase.from_json(line)
    assert "\n" not in line
    assert repr(back) == repr(case)  # NaN equals itself in words


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_box_of_an_array_reads_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 40)] * 3))
    values = np.random.default_rng(data.draw(st.integers(0, 9))).integers(-1024, 3072, shape).astype(np.int16)
    path = tmp_path_factory.mktemp("array") / "image.b2nd"
    path.write_bytes(store.compressed(values))
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    box = [
        (start, data.draw(st.integers(start + 1, size))) for start, size in zip(starts, shape, strict=True)
    ]
    found = store.read_array(path, shape, np.int16, (box[0], box[1], box[2]))
    np.testing.assert_array_equal(found, values[tuple(slice(*side) for side in box)])
    np.testing.assert_array_equal(store.read_array(path, shape, np.int16, None), values)


def test_chunks_hold_small_crops_and_empty_masks_take_no_room() -> None:
    empty = store.compressed(np.zeros((64, 256, 256), np.uint8))
    assert len(empty) < 1000


def test_a_case_is_written_with_checksums_that_hold(tmp_path: Path) -> None:
    open_store(tmp_path / "s", ALIKE)
    written = store.write_case(tmp_path / "s", prepared(), arrays())
    folder = tmp_path / "s" / "cases" / "a"
    assert store.read_case(folder) is not None
    assert store.wrong_checksum(folder, written) == ""
    content = bytearray((folder / "regions.b2nd").read_bytes())
    content[-20] ^= 1
    (folder / "regions.b2nd").write_bytes(content)
    assert store.missing_bytes(folder, written) == ""
    assert store.wrong_checksum(folder, written) == "regions.b2nd does not have its checksum"


@pytest.mark.parametrize("name", ["image.b2nd", "regions.b2nd", "lesions.b2nd", "case.json"])
def test_a_case_that_lacks_a_file_is_not_whole(tmp_path: Path, name: str) -> None:
    open_store(tmp_path / "s", ALIKE)
    store.write_case(tmp_path / "s", prepared(), arrays())
    folder = tmp_path / "s" / "cases" / "a"
    (folder / name).unlink()
    assert store.read_case(folder) is None


def test_a_torn_last_line_is_passed_over_and_any_other_is_named(tmp_path: Path) -> None:
    lines = [prepared("a").to_json(), prepared("b").to_json()]
    (tmp_path / "manifest.jsonl").write_text("\n".join([*lines, lines[0][:50]]), encoding="utf-8")
    assert sorted(store.read_manifest(tmp_path)) == ["a", "b"]
    (tmp_path / "manifest.jsonl").write_text(f"{lines[0][:50]}\n{lines[1]}\n", encoding="utf-8")
    with pytest.raises(DataError, match="damaged in line 1"):
        store.read_manifest(tmp_path)


def test_of_two_lines_about_a_case_the_last_counts_and_writing_sorts(tmp_path: Path) -> None:
    cases = [prepared("b"), prepared("a"), prepared("b", split="test")]
    (tmp_path / "manifest.jsonl").write_text("".join(c.to_json() + "\n" for c in cases), encoding="utf-8")
    found = store.read_manifest(tmp_path)
    assert found["b"].split == "test"
    store.write_manifest(tmp_path, found.values())
    assert list(store.read_manifest(tmp_path)) == ["a", "b"]


def test_failures_keep_reasons_with_any_character(tmp_path: Path) -> None:
    failed = {"b": "line \u2028 with odd ends\x85", "a": "none"}
    store.write_failed(tmp_path, failed)
    assert store.read_failed(tmp_path) == failed


def test_a_fingerprint_tells_settings_apart_and_survives_the_disk(tmp_path: Path) -> None:
    open_store(tmp_path / "s", ALIKE)
    assert read_fingerprint(tmp_path / "s").sha256 == ALIKE.sha256
    other = Fingerprint(PreprocessingConfig(spacing_mm=(3.0, 1.5, 1.5)), "auto")
    with pytest.raises(ConfigError) as caught:
        open_store(tmp_path / "s", other)
    message = str(caught.value)
    assert ALIKE.sha256[:12] in message
    assert other.sha256[:12] in message
    assert "spacing_mm" in message
    with pytest.raises(ConfigError, match="anatomy auto instead of none"):
        open_store(tmp_path / "s", dataclasses.replace(ALIKE, anatomy="none"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 99}, "version 99"),
        ({"anatomy": "given"}, "changed by hand"),
        ({"anatomy": "magic"}, "cannot be read"),
        ({"preprocessing": {"spacing_mm": "wide"}}, "cannot be read"),
    ],
)
def test_a_foreign_or_edited_fingerprint_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    values = {**json.loads(ALIKE.to_json()), **change}
    (tmp_path / "fingerprint.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_fingerprint(tmp_path)


def test_a_folder_of_something_else_is_neither_read_nor_written(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="is no store"):
        read_fingerprint(tmp_path)
    with pytest.raises(OutputError, match="is no store"):
        open_store(tmp_path, ALIKE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("case_id", ["", ".hidden", "a/b", "..", "a b", "ä", "x" * 201, "a\n"])
def test_an_identifier_that_cannot_name_a_folder_is_refused(case_id: str) -> None:
    with pytest.raises(DataError, match="cannot name a folder"):
        store.check_case_id(case_id)
