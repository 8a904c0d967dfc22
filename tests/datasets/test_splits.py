"""Splits: by patient, stable as patients join, faithful to the source, and never with a patient on both sides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm3d.datasets.case import Case, CaseData
from vlm3d.datasets.splits import (
    assign_splits,
    check_no_leak,
    check_unique_ids,
    split_of_patient,
)
from vlm3d.errors import ConfigError, DataError

PATIENTS = st.text(alphabet="abc_-0123456789", min_size=1, max_size=8)
FRACTIONS = st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10)).filter(any)


def never() -> CaseData:
    raise AssertionError("splitting reads no case")


def case_of(patient: str, number: int = 0, split: str | None = None) -> Case:
    return Case(f"{patient}_{number}", patient, "test", never, split=split)


@given(st.lists(st.tuples(PATIENTS, st.integers(0, 3)), unique=True), FRACTIONS, st.text(max_size=4))
def test_no_patient_is_ever_in_two_splits(
    scans: list[tuple[str, int]], parts: tuple[int, int, int], salt: str
) -> None:
    fractions = dict(zip(("train", "valid", "test"), (part / sum(parts) for part in parts), strict=True))
    cases = assign_splits([case_of(*scan) for scan in scans], fractions, salt=salt)
    by_patient: dict[str, set[str | None]] = {}
    for case in cases:
        by_patient.setdefault(case.patient_id, set()).add(case.split)
    assert all(len(splits) == 1 and None not in splits for splits in by_patient.values())
    assert {case.split for case in cases} <= {split for split, share in fractions.items() if share > 0}
    check_no_leak(cases)
    assert [case.case_id for case in cases] == [f"{patient}_{number}" for patient, number in scans]


@given(
    st.lists(st.tuples(PATIENTS, st.sampled_from([None, "train", "valid", "test"])), max_size=30),
    st.lists(PATIENTS, max_size=30),
)
def test_patients_that_join_move_no_one_and_sources_are_kept(
    scans: list[tuple[str, str | None]], joining: list[str]
) -> None:
    told: dict[str, str] = {}
    first = []
    for number, (patient, split) in enumerate(scans):
        if split is not None:
            split = told.setdefault(patient, split)
        first.append(case_of(patient, number, split))
    before = assign_splits(first)
    later = [case_of(patient, 1000 + number) for number, patient in enumerate(joining)]
    after = {case.case_id: case.split for case in assign_splits([*later, *first])}
    for case in before:
        assert after[case.case_id] == case.split
        assert case.split == told.get(case.patient_id, case.split)
    for case in later:
        assert after[case.case_id] == told.get(case.patient_id, split_of_patient(case.patient_id))


@given(st.lists(PATIENTS, min_size=2, max_size=20, unique=True), st.data())
def test_a_leak_is_always_found_and_named(patients: list[str], data: st.DataObject) -> None:
    cases = assign_splits([case_of(patient) for patient in patients])
    victim = data.draw(st.sampled_from(cases))
    other = next(split for split in ("train", "valid", "test") if split != victim.split)
    with pytest.raises(DataError, match="1 patients are in two splits") as caught:
        check_no_leak([*cases, replace(victim, case_id="again", split=other)])
    assert victim.patient_id in str(caught.value)


def test_contradicting_sources_are_refused_before_anything_is_assigned() -> None:
    with pytest.raises(DataError, match="p1 \\(train and valid\\)"):
        assign_splits([case_of("p1", 0, "train"), case_of("p1", 1, "valid"), case_of("p2")])


def test_shares_are_near_the_fractions_and_the_salt_draws_anew() -> None:
    patients = [f"patient_{number}" for number in range(4000)]
    cases = assign_splits([case_of(patient) for patient in patients])
    counts = Counter(case.split for case in cases)
    assert counts["train"] == pytest.approx(3200, abs=120)
    assert counts["valid"] == pytest.approx(400, abs=90)
    moved = sum(split_of_patient(p) != split_of_patient(p, salt="other") for p in patients)
    assert 1000 < moved < 1800  # 1 - (0.8² + 0.1² + 0.1²) = 34 %


def test_the_draw_is_the_same_for_ever() -> None:
    assert [split_of_patient(f"train_{n}") for n in range(12)] == EXPECTED


EXPECTED = [
    "valid",
    "test",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
    "test",
    "train",
]


@pytest.mark.parametrize(
    "fractions", [{"train": 0.5}, {"train": 1.2, "valid": -0.2}, {}, {"train": float("nan"), "valid": 1.0}]
)
def test_fractions_that_are_no_shares_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        assign_splits([case_of("p")], fractions)


def test_identifiers_given_twice_are_named() -> None:
    check_unique_ids([case_of("p", 0), case_of("p", 1)])
    with pytest.raises(DataError, match="1 identifiers name more than one case: p_0"):
        check_unique_ids([case_of("p", 0), case_of("p", 0)])
