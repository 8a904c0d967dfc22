"""The command line end to end: files appear whole, errors are one line with the documented code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from support.bad_inputs import BAD_INPUTS, BadInput
from support.phantoms import coarse_phantom
from support.scan_files import write_dicom
from support.small_models import small_model
from vlm3d import cli
from vlm3d.datasets.phantom.writing import write_phantom
from vlm3d.errors import TERMINATED_EXIT_CODE
from vlm3d.inference import pipeline as pipeline_module
from vlm3d.inference.pipeline import Pipeline
from vlm3d.inference.prediction import TRAINING_NOTES, Prediction
from vlm3d.labels import LESION_KEYS
from vlm3d.outputs.batch import output_folders, scan_name
from vlm3d.volume import Volume

FAST = ("--no-report", "--anatomy", "none")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(small_model(with_text=False), checkpoint="small")


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(coarse_phantom(), tmp_path_factory.mktemp("scan") / "phantom") / "ct.nii.gz"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]):
    """Run a command in this process with the small model; returns exit code, output and error lines."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(cli, "_pipeline", lambda *_, **__: pipeline)
        monkeypatch.setattr(sys, "argv", ["vlm3d", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def fails(result: tuple[int, str, str], code: int) -> str:
    """Check that a run failed as documented; returns its message."""
    found, _, err = result
    last = err.strip().splitlines()[-1]
    assert found == code, err
    assert last.startswith("vlm3d: error: "), err
    assert "Traceback" not in err
    return last


def test_help_is_quick_to_import() -> None:
    """Help needs neither torch nor transformers nor numpy."""
    code = "import sys, vlm3d.cli; print([m for m in ('torch', 'transformers', 'numpy', 'nibabel') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_console_says_that_weights_are_synthetic(
    run, scan: Path, tmp_path: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic = pipeline.model_info.model_copy(update={"training": "synthetic"})
    monkeypatch.setattr(pipeline, "model_info", synthetic)
    code, _, err = run("predict", scan, "-o", tmp_path / "out", *FAST)
    assert code == 0, err
    assert TRAINING_NOTES["synthetic"] in err


def test_one_scan(run, scan: Path, tmp_path: Path) -> None:
    code, out, err = run("predict", scan, "-o", tmp_path / "out", "--max-new-tokens", 12)
    assert code == 0, err
    assert out.strip() == str(tmp_path / "out" / "report.html")
    assert "UNTRAINED" in err
    prediction = Prediction.model_validate_json((tmp_path / "out" / "prediction.json").read_text())
    assert prediction.report.generated
    for lesion in prediction.lesions:
        image = nib.load(tmp_path / "out" / lesion.mask_file)
        np.testing.assert_allclose(image.affine, nib.load(scan).affine, atol=1e-3)
        assert image.shape == nib.load(scan).shape
    for name in ("report.txt", "report.html", "prediction.json"):
        assert "untrained" in (tmp_path / "out" / name).read_text().lower()


def test_many_scans_and_one_that_is_broken(run, scan: Path, tmp_path: Path) -> None:
    good = tmp_path / "second.nii.gz"
    good.write_bytes(scan.read_bytes())
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(scan.read_bytes()[:3000])
    code, out, err = run("predict", scan, broken, good, "-o", tmp_path / "out", *FAST)
    assert code == 3
    assert len(out.split()) == 2
    assert "1 of 3 scans failed" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ct", "second"]


def test_a_scan_that_fails_as_nobody_foresaw_costs_no_other(
    run, scan: Path, tmp_path: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = pipeline_module.read_volume

    def fails_once(path: Path, **options: object) -> Volume:
        if path.name == "odd.nii.gz":
            raise ZeroDivisionError("line one\nline two")
        return read(path, **options)

    monkeypatch.setattr(pipeline_module, "read_volume", fails_once)
    (tmp_path / "odd.nii.gz").write_bytes(scan.read_bytes())
    code, out, err = run("predict", tmp_path / "odd.nii.gz", scan, "-o", tmp_path / "out", *FAST)
    assert code == 1
    assert "vlm3d: error: odd.nii.gz: ZeroDivisionError: line one\n" in err
    assert len(out.split()) == 1


def test_a_name_that_is_no_text_is_shown_with_question_marks(run, scan: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller.nii.gz"))
    odd.write_bytes(scan.read_bytes())
    code, _, err = run("predict", odd, "-o", tmp_path / "out", *FAST)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "prediction.json").read_text())["scan"]["source"] == "M?ller.nii.gz"


@pytest.mark.parametrize(
    "arguments",
    [("predict",), ("series",), ("predict", "SCAN", "--mask")],
)
def test_a_path_that_cannot_even_be_asked_for_is_one_line(
    run, scan: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    given = [scan if word == "SCAN" else word for word in arguments]
    more = () if arguments == ("series",) else ("-o", tmp_path / "out")
    assert "too long" in fails(run(*given, "x" * 300, *more), 3)


def test_several_scans_are_called_as_they_are_given_not_as_what_they_link_to(tmp_path: Path) -> None:
    for patient in ("a", "b"):
        (tmp_path / patient).mkdir()
        (tmp_path / patient / "ct.nii.gz").write_bytes(b"x")
        (tmp_path / f"pat_{patient}.nii.gz").symlink_to(tmp_path / patient / "ct.nii.gz")
    folders = output_folders([tmp_path / "pat_a.nii.gz", tmp_path / "pat_b.nii.gz"], Path("out"))
    assert folders == [Path("out/pat_a"), Path("out/pat_b")]
    assert scan_name(tmp_path / "a" / "..") == tmp_path.name


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_bad_input_is_one_line_and_leaves_nothing(run, bad: BadInput, tmp_path: Path) -> None:
    path = bad.build(tmp_path)
    fails(run("predict", path, "-o", tmp_path / "out", *FAST), 3)
    assert not (tmp_path / "out").exists()
    assert not [left for left in tmp_path.iterdir() if left.name.startswith(".")]


def test_outputs_that_cannot_be_written(
    run, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    fails(run("predict", scan, "-o", tmp_path / "file", *FAST), 5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    fails(run("predict", scan, "-o", tmp_path / "full", *FAST), 5)
    fails(run("predict", scan, "-o", tmp_path / "full", *FAST, "--overwrite"), 5)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm3d.outputs.writer.write_mask", full_disk)
    assert "disk is full" in fails(run("predict", scan, "-o", tmp_path / "out", *FAST), 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_an_earlier_output_is_replaced_only_when_asked(run, scan: Path, tmp_path: Path) -> None:
    assert run("predict", scan, "-o", tmp_path / "out", *FAST)[0] == 0
    before = (tmp_path / "out" / "prediction.json").read_bytes()
    fails(run("predict", scan, "-o", tmp_path / "out", *FAST), 5)
    assert (tmp_path / "out" / "prediction.json").read_bytes() == before
    assert run("predict", scan, "-o", tmp_path / "out", *FAST, "--overwrite")[0] == 0


def test_a_mask_on_another_grid_and_a_mask_of_nonsense(run, scan: Path, tmp_path: Path) -> None:
    image = nib.load(scan)
    mask = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(np.ones(image.shape[:2] + (5,), np.uint8), image.affine), mask)
    assert "grid" in fails(run("predict", scan, "-o", tmp_path / "out", "--mask", mask, *FAST), 3)
    nib.save(nib.Nifti1Image(np.full(image.shape, 200, np.uint8), image.affine), mask)
    assert "200" in fails(run("predict", scan, "-o", tmp_path / "out", "--mask", mask, *FAST), 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--threshold", "1.5"], 2),
        (["--anatomy", "magic"], 2),
        (["--max-new-tokens", "0"], 2),
        (["--series", "3"], 3),
    ],
)
def test_wrong_options(run, scan: Path, tmp_path: Path, arguments: list[str], code: int) -> None:
    fails(run("predict", scan, "-o", tmp_path / "out", "--no-report", *arguments), code)
    assert not (tmp_path / "out").exists()


def test_wrong_models(scan: Path, tmp_path: Path) -> None:
    """The real loader: unknown sizes, absent checkpoints and devices."""

    def run(*arguments: object) -> tuple[int, str, str]:
        command = [
            sys.executable,
            "-m",
            "vlm3d",
            "predict",
            str(scan),
            "-o",
            str(tmp_path / "out"),
            *map(str, arguments),
        ]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return found.returncode, found.stdout, found.stderr

    fails(run("--config", "gigantic"), 2)
    (tmp_path / "empty").mkdir()
    fails(run("--checkpoint", tmp_path / "empty"), 4)
    fails(run("--checkpoint", "nobody/nothing"), 7)
    fails(run("--device", "cuda:99"), 2)
    assert not (tmp_path / "out").exists()


def test_phantom_and_series_and_version(run, tmp_path: Path) -> None:
    code, out, _ = run("phantom", "-o", tmp_path / "p", "--seed", 3, "--spacing", 8, 6, 6)
    assert code == 0
    truth = json.loads((Path(out.strip()) / "truth.json").read_text())
    assert truth["seed"] == 3
    fails(run("phantom", "-o", tmp_path / "p", "--spacing", 8, 6, 6), 5)
    fails(run("series", tmp_path / "p" / "ct.nii.gz"), 3)
    assert run("--version")[1].startswith("vlm3d ")


def test_a_number_that_series_prints_picks_that_series(run, scan: Path, tmp_path: Path) -> None:
    image = nib.load(scan)
    voxels, affine = np.asarray(image.dataobj).T, image.affine[:, [2, 1, 0, 3]]
    study = tmp_path / "study"
    write_dicom(study, voxels, affine, prefix="A")
    write_dicom(study, voxels[:-4], affine, series="1.2.826.0.1.3680043.8.498.2", prefix="B")
    code, out, _ = run("series", study)
    lines = out.strip().splitlines()
    assert code == 0
    assert len(lines) == 2
    for line in lines:
        number, words = line.split(":", 1)
        slices = int(words.split(", ")[1].split(" x ")[0])
        code, _, err = run("predict", study, "-o", tmp_path / number, "--series", number, *FAST)
        assert code == 0, err
        prediction = Prediction.model_validate_json((tmp_path / number / "prediction.json").read_text())
        assert prediction.scan.shape_dhw[0] == slices
    assert slices == len(voxels) - 4, "the last is the shorter one"


SLEEPER = """
import sys, time
from pathlib import Path
from vlm3d import cli
from vlm3d.io import reading
from vlm3d.outputs.output_folder import complete_folder

def read_without_end(folder, name):
    with complete_folder(SCAN.with_name("out")) as staging:
        print(folder, staging, sep="\\n", flush=True)
        time.sleep(60)

SCAN = Path(sys.argv[1])
reading.list_dicom_series = read_without_end
sys.argv = ["vlm3d", "series", str(SCAN)]
cli.main()
"""


def test_a_termination_leaves_no_patient_data_behind(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        archive.writestr("IM0001", b"patient")
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path / "scan.zip")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        unpacked, staging = (Path(process.stdout.readline().strip()) for _ in range(2))
        assert (unpacked / "IM0001").exists()
        assert staging.parent == tmp_path
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == TERMINATED_EXIT_CODE
    assert err.strip() == "vlm3d: error: terminated"
    assert not unpacked.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["scan.zip"]


def test_outputs_carry_every_lesion(run, scan: Path, tmp_path: Path) -> None:
    run("predict", scan, "-o", tmp_path / "out", *FAST)
    masks = sorted(path.name for path in (tmp_path / "out" / "masks").iterdir())
    assert masks == sorted(f"{key}.nii.gz" for key in LESION_KEYS)
