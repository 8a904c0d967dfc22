"""Preparing: every case ends in the store or in the list of failures, whatever happens on the way."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support import small_cases as made
from support.small_cases import GRID, case, small_cases, small_data
from vlm3d import cli
from vlm3d.config import PhaseConfig, PreprocessingConfig, load_config
from vlm3d.datasets import prepare as prepare_module
from vlm3d.datasets.augmentation import NO_AUGMENTATION
from vlm3d.datasets.case import CaseData
from vlm3d.datasets.prepare import PrepareSummary, Progress, prepare
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.errors import ConfigError, DataError, MissingExtraError, OutputError
from vlm3d.evaluation.store_truth import truth_of
from vlm3d.io import read_mask, read_volume
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.preprocessing.geometry import ScanGeometry
from vlm3d.preprocessing.intensity import window_in_place
from vlm3d.preprocessing.preprocessor import Preprocessor
from vlm3d.training.data import ScanStream
from vlm3d.volume import RegionMap, Volume

NODULE = 1 << LESION_KEYS.index("lung_nodule")


def here(cases: Any, out: Path, **options: Any) -> PrepareSummary:
    return prepare(cases, out, GRID, **{"anatomy": "given", "workers": 1, **options})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_store_gives_what_the_preprocessor_gives(tmp_path: Path) -> None:
    here(small_cases(1), tmp_path / "s")
    arrays = PreparedDataset(tmp_path / "s").read(0)
    data = small_data()
    scan = Preprocessor(GRID).apply(data.volume, data.regions)
    intensity = window_in_place(arrays.hu_DHW.astype(np.float32), GRID.hu_window)
    np.testing.assert_allclose(intensity, scan.intensity_DHW, atol=0.5 / 1000 + 1e-6)
    np.testing.assert_array_equal(arrays.regions_DHW, scan.regions_DHW)


def test_the_manifest_says_what_case_and_data_say(tmp_path: Path) -> None:
    here(small_cases(1), tmp_path / "s")
    found = PreparedDataset(tmp_path / "s").cases[0]
    assert (found.patient_id, found.source, found.split) == ("p_case_0", "npz", "train")
    assert found.report == "Report of 0."
    assert found.known_lesions == ("consolidation", "lung_nodule")
    assert found.lesion_voxels["consolidation"] == 0
    assert found.regions_method == "file"
    assert "a note" in found.notes
    bits = PreparedDataset(tmp_path / "s").read(0).lesion_bits_DHW
    assert int(np.count_nonzero(bits & NODULE)) == found.lesion_voxels["lung_nodule"] > 0
    assert set(np.unique(bits)) == {0, NODULE}


def test_a_second_run_keeps_what_is_there_and_reads_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = here(small_cases(3, log), tmp_path / "s")
    before = tree(tmp_path / "s")
    second = here(small_cases(3, log), tmp_path / "s")
    assert (first.done, first.kept, second.done, second.kept) == (3, 0, 0, 3)
    assert len(log.read_text(encoding="utf-8").split()) == 3
    assert tree(tmp_path / "s") == before


def test_processes_write_what_one_process_writes(tmp_path: Path) -> None:
    events: list[Progress] = []
    here(small_cases(4), tmp_path / "one")
    summary = here(small_cases(4), tmp_path / "two", workers=2, progress=events.append)
    assert summary.done == 4
    assert [event.finished for event in events] == [1, 2, 3, 4]
    assert {event.case_id for event in events} == {f"case_{i}" for i in range(4)}
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_failing_case_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    cases = [
        case("broken", made.load_broken),
        case("bug", made.load_with_bug),
        case("mask", made.load_with_wrong_mask),
        *small_cases(1),
    ]
    summary = here(cases, tmp_path / "s")
    assert summary.done == 1
    assert summary.failed["broken"] == "scan.nii.gz is constant: there is no image in it."
    assert summary.failed["bug"].startswith("KeyError")
    assert "4 x 4 x 4" in summary.failed["mask"]
    lines = [json.loads(line) for line in (tmp_path / "s" / "failed.jsonl").read_text("utf-8").splitlines()]
    assert {line["case_id"]: line["reason"] for line in lines} == summary.failed
    assert [c.case_id for c in PreparedDataset(tmp_path / "s").cases] == ["case_0"]
    mended = here([case("broken", partial(made.load_small, 5))], tmp_path / "s")
    assert mended.done == 1
    assert "broken" not in (tmp_path / "s" / "failed.jsonl").read_text("utf-8")
    assert "bug" in (tmp_path / "s" / "failed.jsonl").read_text("utf-8")


def test_a_killed_process_costs_one_case(tmp_path: Path) -> None:
    cases = [*small_cases(3), case("deadly", made.load_and_die)]
    summary = here(cases, tmp_path / "s", workers=2)
    assert summary.done == 3
    assert list(summary.failed) == ["deadly"]
    assert "was killed" in summary.failed["deadly"]


SLOW_RUN = """
import sys
from pathlib import Path
from support.small_cases import GRID, small_cases
from vlm3d.datasets.prepare import prepare
prepare(small_cases(6, Path(sys.argv[2]), 0.15), sys.argv[1], GRID, anatomy="given", workers=1)
"""


def test_a_run_killed_midway_goes_on_to_the_same_store(tmp_path: Path) -> None:
    out, log = tmp_path / "s", tmp_path / "log"
    paths = os.pathsep.join([str(Path(made.__file__).parents[1]), *sys.path])
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(out), str(log)], env={**os.environ, "PYTHONPATH": paths}
    )
    patience = time.monotonic() + 120
    while not log.exists() or len(log.read_text(encoding="utf-8").split()) < 3:
        assert run.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    (out / "cases" / ".case_9.half").mkdir()
    summary = here(small_cases(6, log), out)
    assert summary.kept >= 2
    assert summary.done + summary.kept == 6
    here(small_cases(6), tmp_path / "undisturbed")
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_a_half_written_case_and_a_lost_manifest_are_made_good(tmp_path: Path) -> None:
    out = tmp_path / "s"
    here(small_cases(3), out)
    before = tree(out)
    path = out / "cases" / "case_1" / "image.b2nd"
    path.write_bytes(path.read_bytes()[:50])
    (out / "manifest.jsonl").unlink()
    summary = here(small_cases(3), out)
    assert (summary.done, summary.kept) == (1, 2)
    assert tree(out) == before


def test_a_new_split_is_taken_over_without_preparing_again(tmp_path: Path) -> None:
    out, log = tmp_path / "s", tmp_path / "log"
    here(small_cases(1), out)
    moved = here([case("case_0", partial(made.load_small, 0, log), split="valid")], out)
    assert moved.kept == 1
    assert not log.exists()
    (out / "manifest.jsonl").unlink()
    here([], out)
    assert PreparedDataset(out, ("valid",)).cases[0].case_id == "case_0"


def test_new_labels_and_reports_are_taken_over_without_preparing_again(tmp_path: Path) -> None:
    out, log = tmp_path / "s", tmp_path / "log"

    def load() -> CaseData:
        return replace(made.load_small(0, log), lesion_masks={})

    here([case("case_0", load, labels_K=None)], out)
    log.unlink()
    labels_K = (0.0, float("nan"), *(1.0,) * (len(DISEASE_NAMES) - 2))
    told = case("case_0", load, labels_K=labels_K, report="Another.")
    assert here([told], out).kept == 1
    assert not log.exists()
    (found,) = PreparedDataset(out).cases
    assert found.report == "Another."
    np.testing.assert_array_equal(found.labels_K, labels_K)
    before = tree(out)
    here([told], out)
    assert tree(out) == before


def test_new_labels_of_a_case_with_masks_prepare_it_anew(tmp_path: Path) -> None:
    here(small_cases(1), tmp_path / "s")
    again = case("case_0", partial(made.load_small, 0), labels_K=(0.0,) * len(DISEASE_NAMES))
    assert here([again], tmp_path / "s").done == 1


def test_a_report_written_from_labels_is_written_anew_with_them(tmp_path: Path) -> None:
    def load() -> CaseData:
        return replace(small_data(), report=None)

    here([case("case_0", load)], tmp_path / "s")
    (before,) = PreparedDataset(tmp_path / "s").cases
    healthy = case("case_0", load, labels_K=(0.0,) * len(DISEASE_NAMES))
    assert here([healthy], tmp_path / "s").done == 1
    (after,) = PreparedDataset(tmp_path / "s").cases
    assert after.report_is_synthetic
    assert after.report != before.report


def test_masks_of_some_slices_say_nothing_of_the_others(tmp_path: Path) -> None:
    def load() -> CaseData:
        data = small_data()
        annotated_DHW = np.zeros(data.volume.shape_DHW, bool)
        annotated_DHW[18:24] = True
        return replace(data, annotated_DHW=annotated_DHW)

    here([case("case_0", load), case("case_1", small_data)], tmp_path / "s")
    dataset = PreparedDataset(tmp_path / "s")
    part, whole = dataset.cases
    assert whole.annotated_slices == slice(0, whole.shape_DHW[0])
    assert 0 < part.annotated_slices.stop - part.annotated_slices.start < part.shape_DHW[0]
    assert truth_of(dataset, 0).load_masks is None
    assert truth_of(dataset, 1).load_masks is not None
    config = load_config("tiny")
    training = config.training.model_copy(update={"augmentation": NO_AUGMENTATION})
    quiet = config.model_copy(update={"training": training})
    stream = ScanStream(dataset, quiet, PhaseConfig(without_regions=0.0), 1)
    scans = {scan.case_id: scan for scan in (stream[0], stream[1])}
    masks_LDHW = scans["case_0"].masks_LDHW
    beyond = np.ones(part.shape_DHW[0], bool)
    beyond[part.annotated_slices] = False
    assert (masks_LDHW[:, beyond] == -1).all()
    assert (masks_LDHW[4, ~beyond] >= 0).all()
    assert masks_LDHW[4].max() == 1
    assert not scans["case_0"].guidance_KZYX.any()
    assert (scans["case_1"].masks_LDHW[4] >= 0).all()


def test_another_case_of_the_same_name_is_refused(tmp_path: Path) -> None:
    here(small_cases(1), tmp_path / "s")
    with pytest.raises(DataError, match="holds another case called case_0, from source npz"):
        here([case("case_0", made.small_data, source="ct_rate")], tmp_path / "s")
    with pytest.raises(DataError, match="two cases are called"):
        here([*small_cases(1), case("CASE_0", made.small_data)], tmp_path / "t")
    with pytest.raises(DataError, match="cannot name a folder"):
        here([case("../case", made.small_data)], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_another_fingerprint_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    here([], tmp_path / "s")
    with pytest.raises(ConfigError, match="anatomy given instead of none"):
        here(small_cases(1, log), tmp_path / "s", anatomy="none")
    assert not log.exists()


def test_two_runs_do_not_write_one_store(tmp_path: Path) -> None:
    here([], tmp_path / "s")
    with (tmp_path / "s" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process"):
            here(small_cases(1), tmp_path / "s")


def test_a_store_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"

    def full(*_: Any, **__: Any) -> None:
        raise OutputError("no room")

    monkeypatch.setattr(prepare_module, "write_case", full)
    with pytest.raises(OutputError, match="no room"):
        here(small_cases(3, log), tmp_path / "s")
    assert len(log.read_text(encoding="utf-8").split()) == 1


@pytest.mark.parametrize(
    ("anatomy", "given_too", "wanted"),
    [
        ("auto", True, "file"),
        ("auto", False, "classical"),
        ("given", True, "file"),
        ("given", False, None),
        ("classical", True, "classical"),
        ("none", True, None),
    ],
)
def test_regions_come_from_where_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anatomy: str, given_too: bool, wanted: str | None
) -> None:
    def segment(volume: Volume) -> RegionMap:
        return RegionMap(np.full(volume.shape_DHW, 7, np.uint8), volume.affine, "classical")

    monkeypatch.setattr(prepare_module, "segment_anatomy", segment)
    load = made.small_data if given_too else partial(without_regions)
    here([case("a", load)], tmp_path / "s", anatomy=anatomy)
    dataset = PreparedDataset(tmp_path / "s")
    assert dataset.cases[0].regions_method == wanted
    regions_DHW = dataset.read(0).regions_DHW
    assert (regions_DHW == 7).any() == (wanted is not None)
    assert (regions_DHW == 8).any() == (wanted == "file")


@pytest.mark.parametrize("given_too", [True, False])
def test_half_of_the_cases_get_the_anatomy_that_a_user_will_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_too: bool
) -> None:
    monkeypatch.setattr(
        prepare_module,
        "segment_anatomy",
        lambda volume: RegionMap(np.full(volume.shape_DHW, 7, np.uint8), volume.affine, "classical"),
    )
    load = made.small_data if given_too else partial(without_regions)
    here([case(f"case_{number}", load) for number in range(16)], tmp_path / "s", anatomy="mixed")
    methods = {c.case_id: c.regions_method for c in PreparedDataset(tmp_path / "s").cases}
    assert set(methods.values()) == ({"file", "classical"} if given_too else {"classical"})
    here([case("case_3", load)], tmp_path / "again", anatomy="mixed")
    assert PreparedDataset(tmp_path / "again").cases[0].regions_method == methods["case_3"], "as it is alone"


def without_regions() -> Any:
    data = small_data()
    return type(data)(data.volume)


def test_ray_that_is_missing_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"ray is needed to prepare.*vlm3d\[ray\]"):
        here(small_cases(1), tmp_path / "s", backend="ray")
    assert not (tmp_path / "s").exists()


class RayError(Exception):
    """As in ``ray.exceptions``: something on the cluster failed."""


class RayTaskError(RayError):
    """As in ``ray.exceptions``: the task itself raised."""


def fake_ray(started: list[dict[str, Any]]) -> SimpleNamespace:
    """A stand-in with the few calls of Ray that are used; a task that would kill its worker is told as Ray tells it."""

    def remote(function: Any) -> Any:
        def submit(*arguments: Any) -> Any:
            future: Future[Any] = Future()
            if arguments[1].load is made.load_and_die:
                future.set_exception(RayError("the worker died"))
                return SimpleNamespace(future=lambda: future)
            try:
                future.set_result(function(*arguments))
            except OutputError as error:
                future.set_exception(error)
            return SimpleNamespace(future=lambda: future)

        return SimpleNamespace(remote=submit)

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
    return SimpleNamespace(
        is_initialized=lambda: False, init=lambda **k: started.append(k), remote=remote, exceptions=exceptions
    )


def test_ray_does_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "ray", fake_ray(started))
    cases = [*small_cases(3), case("broken", made.load_broken)]
    summary = here(cases, tmp_path / "ray", backend="ray")
    assert (summary.done, list(summary.failed)) == (3, ["broken"])
    here(cases, tmp_path / "local")
    assert len(started) == 1
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")


def test_a_killed_ray_worker_costs_one_case_and_a_full_disk_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", fake_ray([]))
    summary = here([case("deadly", made.load_and_die), *small_cases(2)], tmp_path / "s", backend="ray")
    assert summary.done == 2
    assert "was killed" in summary.failed["deadly"]

    def full(*_: Any, **__: Any) -> None:
        raise OutputError("no room")

    monkeypatch.setattr(prepare_module, "write_case", full)
    with pytest.raises(OutputError, match="no room"):
        here(small_cases(3), tmp_path / "t", backend="ray")


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vlm3d", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_command_prepares_and_counts_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [*small_cases(2), case("broken", made.load_broken)]
    monkeypatch.setattr("vlm3d.datasets.sources.find_cases", lambda sources: cases[: len(sources)])
    out = str(tmp_path / "s")
    options = ("--out", out, "--anatomy", "none", "--jobs", "1")
    assert run_cli(monkeypatch, "prepare", "x", "y", *options) == 0
    assert "2 prepared, 0 kept, 0 failed" in capsys.readouterr().out
    assert run_cli(monkeypatch, "prepare", "x", "y", "z", *options) == DataError.exit_code == 3
    printed = capsys.readouterr()
    assert "0 prepared, 2 kept, 1 failed" in printed.out
    assert "broken: scan.nii.gz is constant: there is no image in it." in printed.err
    assert "1 of 3 cases failed" in printed.err
    assert "Traceback" not in printed.err
    assert run_cli(monkeypatch, "prepare", "x", "--out", out, "--anatomy", "magic") == ConfigError.exit_code
    assert run_cli(monkeypatch, "prepare", "x", "--out", out, "--anatomy", "given") == ConfigError.exit_code
    assert "wanted is" in capsys.readouterr().err


def load_real(folder: Path) -> Any:
    volume = read_volume(folder / "ct.nii.gz")
    mask = read_mask(folder / "nodule.nii.gz")
    return CaseData(volume, None, {"lung_nodule": mask.labels_DHW > 0})


@pytest.mark.real_data
def test_a_real_mass_comes_back_as_it_was(tmp_path: Path, real_data: Path) -> None:
    """A spiculated mass of 2.5 mm slices, through the store at 3 mm and back onto the scan."""
    config = PreprocessingConfig(spacing_mm=(3.0, 1.5, 1.5), max_shape=(128, 256, 256), crop="center")
    load = partial(load_real, real_data / "lidc0001")
    prepare([case("lidc", load)], tmp_path / "s", config, anatomy="none", workers=1)
    dataset = PreparedDataset(tmp_path / "s")
    mask_DHW = load().lesion_masks["lung_nodule"]
    stored_DHW = (dataset.read(0).lesion_bits_DHW & NODULE > 0).astype(np.float32)
    geometry = ScanGeometry.from_dict(dict(dataset.cases[0].geometry))
    back_DHW = Preprocessor(config).invert_mask(stored_DHW, geometry, 0.5)
    assert 2 * (back_DHW & mask_DHW).sum() / (back_DHW.sum() + mask_DHW.sum()) > 0.93
    size = sum(entry["bytes"] for entry in dataset.cases[0].files.values())
    assert size < 0.6 * 2 * np.prod(dataset.cases[0].shape_DHW)
