"""Cohorts on disk: the same whatever the number of processes, resumable, never mixed; and how common findings are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm3d.cli import main
from vlm3d.datasets.phantom import writing
from vlm3d.datasets.phantom.cohort import HIGHEST_PREVALENCE, sample_findings
from vlm3d.datasets.phantom.writing import write_phantoms
from vlm3d.datasets.workers import KILLED
from vlm3d.errors import OutputError, ResourceError
from vlm3d.labels import DISEASE_NAMES

SPACING_MM = (14.0, 10.0, 10.0)


def contents(folder: Path) -> dict[str, object]:
    """What every file under a folder holds, voxels instead of compressed bytes."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name.endswith(".nii.gz"):
            found[name] = np.asarray(nib.load(path).dataobj).tobytes()
        elif path.is_file():
            found[name] = path.read_text()
    return found


def phantom(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vlm3d", "phantom", *map(str, arguments)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_number_of_processes_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (
        "--count",
        3,
        "--seed",
        5,
        "--spacing",
        *SPACING_MM,
        "--protocol",
        "shifted",
        "--prevalence-scale",
        1.6,
    )
    assert phantom(monkeypatch, "-o", tmp_path / "one", *common, "--jobs", 1) == 0
    assert phantom(monkeypatch, "-o", tmp_path / "two", *common, "--jobs", 2) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(Path(line).name for line in printed) == sorted(2 * [f"phantom_{s:06d}" for s in (5, 6, 7)])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    truth = json.loads((tmp_path / "two" / "phantom_000006" / "truth.json").read_text())
    assert truth["settings"] == {
        "spacing_mm": list(SPACING_MM),
        "protocol": "shifted",
        "prevalence_scale": 1.6,
    }


def test_a_stopped_cohort_goes_on(tmp_path: Path) -> None:
    def write(seeds: range) -> list[tuple[str, bool]]:
        done = write_phantoms(tmp_path, seeds, spacing_mm=SPACING_MM)
        return [(folder.name, kept) for folder, kept in done]

    run = write_phantoms(tmp_path, range(3), spacing_mm=SPACING_MM)
    next(run)
    run.close()
    stamp = (tmp_path / "phantom_000000" / "truth.json").stat().st_mtime_ns
    assert write(range(3)) == [
        ("phantom_000000", True),
        ("phantom_000001", False),
        ("phantom_000002", False),
    ]
    assert (tmp_path / "phantom_000000" / "truth.json").stat().st_mtime_ns == stamp
    assert all(kept for _, kept in write(range(3)))


def test_cohorts_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(write_phantoms(tmp_path / "c", range(1), spacing_mm=SPACING_MM))
    for changed in ({"protocol": "shifted"}, {"prevalence_scale": 2.0}, {"spacing_mm": (15.0, 10.0, 10.0)}):
        with pytest.raises(OutputError, match="phantom_000000 exists already"):
            list(write_phantoms(tmp_path / "c", range(1), **{"spacing_mm": SPACING_MM, **changed}))
    foreign = tmp_path / "d" / "phantom_000000"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("mine")
    spacing = ("--spacing", *SPACING_MM)
    assert phantom(monkeypatch, "-o", tmp_path / "d", "--count", 1, *spacing, "--jobs", 1) == 5
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]
    assert phantom(monkeypatch, "-o", tmp_path / "e", *spacing, "--protocol", "odd") == 2
    assert not (tmp_path / "e").exists()


def test_one_phantom_lies_in_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "single"
    assert phantom(monkeypatch, "-o", out, "--seed", 9, "--spacing", *SPACING_MM) == 0
    assert json.loads((out / "truth.json").read_text())["seed"] == 9
    assert phantom(monkeypatch, "-o", out, "--seed", 9, "--spacing", *SPACING_MM) == 0
    assert phantom(monkeypatch, "-o", out, "--seed", 8, "--spacing", *SPACING_MM) == 5


def test_a_killed_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        writing, "each_finished", lambda _, items, workers: ((item, KILLED) for item in items)
    )
    with pytest.raises(ResourceError, match=r"phantom 4 was killed.*--jobs"):
        list(write_phantoms(tmp_path, range(4, 6), spacing_mm=SPACING_MM))
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 5), st.floats(1, 5))
def test_a_greater_scale_only_adds_findings(seed: int, scale: float, more: float) -> None:
    few = sample_findings(np.random.default_rng(seed), scale)
    many = sample_findings(np.random.default_rng(seed), scale * more)
    assert few.items() <= many.items()


def test_prevalence_is_scaled_and_capped() -> None:
    shares = {}
    for scale in (1.0, 1.6, 10.0):
        rng = np.random.default_rng(0)
        draws = [sample_findings(rng, scale) for _ in range(500)]
        shares[scale] = np.array([np.mean([name in draw for draw in draws]) for name in DISEASE_NAMES])
    assert 1.35 < shares[1.6].mean() / shares[1.0].mean() < 1.75
    assert np.abs(shares[10.0] - HIGHEST_PREVALENCE).max() < 0.09
    severities = [spec.severity for draw in draws for spec in draw.values()]
    assert min(severities) >= 0.15, "what is just a trace nobody would see"
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="prevalence_scale"):
            sample_findings(np.random.default_rng(0), wrong)
