"""One line names a data set: each kind by name, each by its files, and wrong lines in one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlm3d.datasets.sources import SOURCES, detect_kind, find_cases
from vlm3d.datasets.spec import parse_spec
from vlm3d.datasets.splits import split_of_patient
from vlm3d.errors import ConfigError, DataError
from vlm3d.labels import DISEASE_NAMES


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of each kind, named by its kind; only as much in it as finding needs."""
    for kind in SOURCES:
        (tmp_path / kind).mkdir()
    truth = {"seed": 4, "patient": {}, "findings": [], "labels": dict.fromkeys(DISEASE_NAMES, 0)}
    (tmp_path / "phantom" / "p").mkdir()
    (tmp_path / "phantom" / "p" / "truth.json").write_text(json.dumps(truth))
    volume = tmp_path / "ct_rate" / "valid_fixed" / "valid_2" / "valid_2_a" / "valid_2_a_1.nii.gz"
    volume.parent.mkdir(parents=True)
    volume.touch()
    np.savez(tmp_path / "npz" / "a.npz", imgs=np.zeros((1, 1, 1), np.uint8))
    entry = {"image": "i", "mask": "m", "context": [], "abnormality": [{"label": "Emphysema"}]}
    (tmp_path / "omniabnorm" / "train.json").write_text(json.dumps({"1": entry}))
    return tmp_path


@pytest.mark.parametrize("kind", SOURCES)
def test_a_folder_is_found_by_name_and_by_its_files(data: Path, kind: str) -> None:
    named = find_cases(f"{kind}:{data / kind}")
    assert [case.source for case in named] == [kind]
    assert detect_kind(data / kind) == kind
    assert [case.case_id for case in find_cases(str(data / kind))] == [case.case_id for case in named]
    assert SOURCES[kind][1][0] == "split"


def test_settings_follow_a_detected_folder(data: Path) -> None:
    assert find_cases(f"{data / 'npz'}:split=test")[0].split == "test"
    with pytest.raises(ConfigError, match="npz takes split, window, tables"):
        find_cases(f"{data / 'npz'}:release=v2")


def test_a_folder_with_a_colon_in_its_name(data: Path) -> None:
    (data / "npz").rename(data / "my: npz")
    assert len(find_cases(f"npz:{data / 'my: npz'}")) == len(find_cases(f"{data / 'my: npz'}")) == 1


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("luna:folder", ConfigError, "no data source 'luna'; there are phantom, ct_rate, npz, omniabnorm"),
        ("ct_rate:", ConfigError, "names no data"),
        ("", ConfigError, "names no data"),
        ("no/such/folder", DataError, "there is no folder"),
        ("npz:no/such/folder", DataError, "there is no folder"),
        ("phantom:5", DataError, "holds no phantom"),
        ("x:colour=red", ConfigError, "unknown setting 'colour'"),
        ("x:split=a=b", ConfigError, "not of the form"),
    ],
)
def test_a_wrong_line_is_one_clear_sentence(spec: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        find_cases(spec)


def test_an_unknown_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"truth\.json.*OmniAbnorm-CT.*CT-RATE.*\*\.npz"):
        find_cases(str(tmp_path))


def test_several_data_sets_together_share_no_id_and_leak_no_patient(data: Path) -> None:
    specs = ["phantom:0-3:split=train", "phantom:3-5:split=test", str(data / "ct_rate")]
    assert [case.split for case in find_cases(specs)] == ["train"] * 3 + ["test"] * 2 + ["valid"]
    undecided = {case.patient_id: case.split for case in find_cases("phantom:0-60")}
    assert undecided == {patient: split_of_patient(patient) for patient in undecided}
    assert set(undecided.values()) == {"train", "valid", "test"}
    with pytest.raises(DataError, match="1 identifiers name more than one case: phantom_000002"):
        find_cases(["phantom:0-3", "phantom:2-5"])
    with pytest.raises(DataError, match="phantom_000002 \\(test and train\\)"):
        find_cases(["phantom:0-3:split=train", "phantom:2-5:split=test,prevalence_scale=2"])


def test_specifications() -> None:
    spec = parse_spec("npz:/a/b c: d:split=train,window=-5..5", "npz", ("split", "window"))
    assert (spec.target, dict(spec.options)) == ("/a/b c: d", {"split": "train", "window": "-5..5"})
