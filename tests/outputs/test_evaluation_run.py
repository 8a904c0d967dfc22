"""``vlm3d evaluate``: tables and files for what fits, one line and a documented code for what does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from support.small_cases import case, small_cases
from support.small_models import small_config, small_model
from vlm3d import cli
from vlm3d.datasets.prepare import prepare
from vlm3d.evaluation.official import write_classification, write_reports
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.checkpoint import StoredThresholds, heads_fingerprint, write_thresholds

K = len(DISEASE_NAMES)
LABELS = (np.random.default_rng(0).random((12, K)) > 0.5).astype(float)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small cases to evaluate, two to tune on."""
    folder = tmp_path_factory.mktemp("data") / "store"
    cases = [
        case(plain.case_id, plain.load, split="test" if n < 2 else "valid", labels_K=tuple(LABELS[n]))
        for n, plain in enumerate(small_cases(4))
    ]
    prepare(cases, folder, small_config().preprocessing, anatomy="given", workers=1)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command in this process; returns exit code, output and error lines."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlm3d", "evaluate", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def write_truth(path: Path, ids: list[str]) -> None:
    """`LABELS` as the challenge's ``ground_truth.csv``."""
    rows = [
        ",".join([case_id, *(f"{value:.0f}" for value in row)])
        for case_id, row in zip(ids, LABELS, strict=True)
    ]
    path.write_text("\n".join([",".join(["AccessionNo", *DISEASE_NAMES]), *rows]) + "\n")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two systems and the truth, as the challenge's files, and a split to tune on."""
    rng = np.random.default_rng(1)
    ids = [f"valid_{n}_a_1" for n in range(len(LABELS))]
    for name, noise in (("good", 0.2), ("bad", 0.9)):
        scores = np.clip(0.5 + (LABELS - 0.5) * 0.5 + rng.normal(0, noise, LABELS.shape), 0, 1)
        write_classification(tmp_path / f"{name}.json", dict(zip(ids, scores, strict=True)), wrapped=True)
        tuning = dict(zip([f"train_{case}" for case in ids], scores, strict=True))
        write_classification(tmp_path / f"{name}_tuning.json", tuning)
    write_truth(tmp_path / "ground_truth.csv", ids)
    write_truth(tmp_path / "tuning_truth.csv", [f"train_{case}" for case in ids])
    write_reports(tmp_path / "reports.json", dict.fromkeys(ids, "No effusion."), year=2026)
    write_reports(tmp_path / "true_reports.json", dict.fromkeys(ids, "No effusion."), year=2025)
    return tmp_path


def test_files_are_scored_compared_tuned_and_written_with_a_page(run, files: Path) -> None:
    code, out, err = run(
        files / "good.json",
        *("--truth", files / "ground_truth.csv", "--truth", files / "true_reports.json"),
        *("--against", files / "bad.json", "--against", files / "reports.json"),
        *("--tune-on", files / "good_tuning.json", "--tune-truth", files / "tuning_truth.csv"),
        *("--tune-against", files / "bad_tuning.json"),
        *("--resamples", 50, "--out", files / "out", "--page"),
    )
    assert code == 0, err
    assert "good.json against ground_truth.csv + true_reports.json: 12 cases of 12 patients" in out
    assert "highest F1 on good_tuning.json (12 cases)" in out
    assert str(files / "out" / "evaluation.html") in out
    figures = json.loads((files / "out" / "evaluation.json").read_text())
    assert figures["comparison"]["against"] == "bad.json + reports.json"
    assert figures["comparison"]["thresholds"] == "highest F1 on bad_tuning.json (12 cases)"
    assert figures["comparison"]["classification"]["macro"]["auroc"]["value"] > 0
    page = (files / "out" / "evaluation.html").read_text()
    assert "Comparison" in page
    code, _, err = run(files / "good.json", "--truth", files / "ground_truth.csv", "--out", files / "out")
    assert code == 5
    assert "--overwrite" in err


def test_reports_alone_are_scored(run, files: Path) -> None:
    code, out, err = run(files / "reports.json", "--truth", files / "true_reports.json", "--resamples", 0)
    assert code == 0, err
    assert "BLEU_1 1.000" in out


def test_cases_that_differ_are_named_in_one_line_or_left_out_when_asked(run, files: Path) -> None:
    table = (files / "ground_truth.csv").read_text().splitlines()
    (files / "ground_truth.csv").write_text("\n".join([*table[:-1], "lost_7" + ",0" * K]) + "\n")
    code, _, err = run(files / "good.json", "--truth", files / "ground_truth.csv")
    assert code == 3
    (line,) = [line for line in err.splitlines() if line.startswith("vlm3d: error: ")]
    assert "lost_7" in line
    assert "valid_11_a_1" in line
    assert "Traceback" not in err
    code, out, _ = run(
        files / "good.json", "--truth", files / "ground_truth.csv", "--common", "--resamples", 0
    )
    assert code == 0
    assert "11 cases of 11 patients, 2 left out" in out


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("good.json",),
        ("good.json", "--truth", "t.csv", "--checkpoint", "c", "--data", "s"),
        ("--checkpoint", "c"),
        ("good.json", "--truth", "t.csv", "--tune-against", "bad.json"),
        ("good.json", "--truth", "t.csv", "--page"),
        ("good.json", "--truth", "t.csv", "--objective", "luck"),
        ("good.json", "--truth", "t.csv", "--threshold", "1.5"),
        ("--checkpoint", "c", "--data", "s", "--truth", "t.csv"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(run, arguments: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("vlm3d: error: ")


def test_a_truncated_file_and_a_missing_checkpoint_are_refused(run, files: Path, store: Path) -> None:
    text = (files / "good.json").read_text()
    (files / "good.json").write_text(text[: len(text) // 2])
    code, _, err = run(files / "good.json", "--truth", files / "ground_truth.csv")
    assert code == 3
    assert "good.json is truncated" in err
    (files / "empty").mkdir()
    code, _, err = run("--checkpoint", files / "empty", "--data", store, "--split", "valid")
    assert code == 4
    assert "no checkpoint" in err
    code, _, err = run("--checkpoint", files / "empty", "--data", store, "--split", "train")
    assert code == 3
    assert "no case of the split 'train'" in err


def test_a_checkpoint_is_run_over_a_split_with_thresholds_of_another(run, files: Path, store: Path) -> None:
    small_model(with_text=False).save_pretrained(files / "checkpoint")
    code, out, err = run(
        *("--checkpoint", files / "checkpoint", "--data", store),
        *("--tune-on", "valid", "--resamples", 20, "--out", files / "out", "--page"),
    )
    assert code == 0, err
    assert "checkpoint against store: 2 cases of 2 patients" in out
    assert "weights: UNTRAINED" in out
    assert "highest F1 on split 'valid' (2 cases)" in out
    assert "UNTRAINED weights" in (files / "out" / "evaluation.html").read_text()


def test_stored_thresholds_are_used_unless_others_are_asked_for(run, files: Path, store: Path) -> None:
    model = small_model(with_text=False)
    model.save_pretrained(files / "checkpoint")
    fingerprint = heads_fingerprint(model.checkpoint_state_dict(), model.config)
    write_thresholds(files / "checkpoint", StoredThresholds({"Emphysema": 0.125}, "made up", fingerprint))
    arguments = ("--checkpoint", files / "checkpoint", "--data", store, "--resamples", 0)
    code, out, err = run(*arguments, "--out", files / "out")
    assert code == 0, err
    assert "thresholds: stored with the checkpoint: made up" in out
    used = json.loads((files / "out" / "evaluation.json").read_text())["thresholds"]
    assert used["source"] == "stored with the checkpoint: made up"
    assert (used["values"]["Emphysema"], used["values"]["Cardiomegaly"]) == (0.125, 0.5)
    code, out, _ = run(*arguments, "--threshold", 0.25)
    assert "thresholds: 0.25 for every disease" in out
    code, out, _ = run(*arguments, "--tune-on", "valid")
    assert "thresholds: highest F1 on split 'valid' (2 cases)" in out
    write_thresholds(files / "checkpoint", StoredThresholds({}, "made up", "of other weights"))
    code, _, err = run(*arguments)
    assert code == 4
    assert "other weights" in err
    (files / "checkpoint" / "thresholds.json").unlink()
    code, out, _ = run(*arguments)
    assert "thresholds: 0.5 for every disease" in out
