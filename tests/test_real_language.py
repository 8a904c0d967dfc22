"""Reports from labels: nobody sees held-out text, the check holds, the language model learns reports alone and goes on."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.small_models import small_language_model
from vlm3d.errors import CheckpointError, ConfigError, DataError, UnreadableFileError
from vlm3d.evaluation.labeler import label_report
from vlm3d.labels import DISEASE_NAMES, IMPLIED
from vlm3d.model.report_generator import IGNORED_LABEL

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
command: Any = importlib.import_module("real_language.command")
examples: Any = importlib.import_module("real_language.examples")
language_writer: Any = importlib.import_module("real_language.language_writer")
scoring: Any = importlib.import_module("real_language.scoring")
studies: Any = importlib.import_module("real_language.studies")
training: Any = importlib.import_module("real_language.training")
writers: Any = importlib.import_module("real_language.writers")

EFFUSION, NODULE, HEART = "Pleural effusion", "Lung nodule", "Cardiomegaly"


def _case(number: int, *present: str) -> Any:
    return studies.Case(f"invented_{number}", tuple(name in present for name in DISEASE_NAMES))


def _study(number: int, text: str, *present: str) -> Any:
    return studies.Study(_case(number, *present), text)


INVENTED = [
    _study(1, "Free fluid is seen in the right pleural space. Pleural effusion.", EFFUSION),
    _study(2, "A nodule of 6 mm in the left upper lobe. No pleural effusion.", NODULE),
    _study(3, "The heart is enlarged. Lungs are clear.", HEART),
    _study(4, "Normal chest."),
    _study(5, "Pleural effusion on both sides and a lung nodule on the right.", EFFUSION, NODULE),
    _study(6, "Heart and lungs are normal."),
    _study(7, "Cardiomegaly with pleural effusion.", HEART, EFFUSION),
    _study(8, "Several nodules are found in both lungs.", NODULE),
]


# --- studies


def _write_table(path: Path, rows: list[Any], **changed: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([studies.ID_COLUMN, studies.TEXT_COLUMN, *DISEASE_NAMES])
        for study in rows:
            labels = [str(int(label)) for label in study.case.labels_K]
            named = dict(zip(DISEASE_NAMES, labels, strict=True)) | changed
            writer.writerow([study.case.case_id, study.text, *named.values()])
    return path


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert studies.read_studies(_write_table(tmp_path / "table.csv", INVENTED)) == INVENTED


def test_a_table_that_is_none_is_refused_without_its_words(tmp_path: Path) -> None:
    path = _write_table(tmp_path / "table.csv", INVENTED, **{NODULE: "perhaps"})
    with pytest.raises(DataError, match="row 1 has a label that is neither 0 nor 1") as refusal:
        studies.read_studies(path)
    assert "fluid" not in str(refusal.value)
    with pytest.raises(DataError, match="more than once"):
        studies.read_studies(_write_table(path, [*INVENTED, INVENTED[0]]))
    path.write_text("AccessionNo,report_text\n1,Normal chest.\n")
    with pytest.raises(UnreadableFileError, match="no column or row with 'Medical material'"):
        studies.read_studies(path)
    with pytest.raises(UnreadableFileError, match=r"absent\.csv cannot be read"):
        studies.read_studies(tmp_path / "absent.csv")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=60, unique=True), st.randoms())
def test_a_split_depends_on_names_alone_and_parts_no_patient(numbers: list[int], random: Any) -> None:
    named = [studies.Study(studies.Case(f"valid_{n // 3}_a_{n % 3}", (False,) * 18), str(n)) for n in numbers]
    if len({n // 3 for n in numbers}) < 2:
        with pytest.raises(DataError, match="make no two parts"):
            studies.split(named)
        return
    parts = studies.split(named)
    shuffled = random.sample(named, len(named))
    assert studies.split(shuffled) == parts
    assert sorted(int(s.text) for s in [*parts.training, *parts.held_out]) == sorted(numbers)
    patients = [{int(s.text) // 3 for s in part} for part in (parts.training, parts.held_out)]
    assert not patients[0] & patients[1]


# --- writers


label_rows = st.lists(st.booleans(), min_size=18, max_size=18).map(tuple)


@settings(max_examples=25, deadline=None)
@given(label_rows, st.integers(0, 1000))
def test_the_template_says_what_the_labels_say(labels_K: tuple[bool, ...], number: int) -> None:
    case = studies.Case(f"invented_{number}", labels_K)
    (text,) = writers.TemplateWriter().write([case])
    read = set(label_report(text).present)
    implied = {IMPLIED[name] for name in case.present if name in IMPLIED}
    assert set(case.present) <= read <= {*case.present, *implied}


def test_the_nearest_report_is_the_first_of_those_that_share_most_labels() -> None:
    nearest = writers.NearestWriter(INVENTED)
    assert nearest.write([_case(9, NODULE), _case(9)]) == [INVENTED[1].text, INVENTED[3].text]
    assert nearest.nearest(_case(9, HEART, EFFUSION, "Emphysema")) == 6
    assert [nearest.differing(case) for case in (_case(9, NODULE), _case(9, HEART, "Emphysema"))] == [0, 1]


@settings(max_examples=25, deadline=None)
@given(label_rows, st.sampled_from(INVENTED))
def test_a_checked_text_says_what_the_labels_say(labels_K: tuple[bool, ...], study: Any) -> None:
    case = studies.Case("invented", labels_K)
    checked = writers.check_against_labels(study.text, case)
    read = set(label_report(checked.text).present)
    implied = {IMPLIED[name] for name in case.present if name in IMPLIED}
    assert set(case.present) - implied <= read <= {*case.present, *implied}
    assert "Findings:" not in checked.text


def test_the_check_takes_out_and_adds_only_what_it_must() -> None:
    text = "The heart is enlarged. No pleural effusion. The trachea is in the midline."
    checked = writers.check_against_labels(text, _case(1, EFFUSION))
    assert (checked.removed, checked.added) == (2, 2)  # the finding is told in findings and in impression
    assert checked.text == "Pleural effusion. The trachea is in the midline. Pleural effusion."
    assert writers.check_against_labels(text, _case(1, HEART)) == (text, 0, 0)


# --- the language model's examples


def test_only_the_report_is_learned() -> None:
    llm = small_language_model()
    batch = [examples.example_of(llm, study, 640) for study in INVENTED[:3]]
    ids_BT, label_BT = examples._padded(batch)
    for row, example in enumerate(batch):
        learned = label_BT[row] != IGNORED_LABEL
        assert ids_BT[row][learned].tolist() == label_BT[row][learned].tolist() == example.report_ids
        assert llm.decode(example.report_ids) == INVENTED[row].text
        assert not learned[: len(example.prompt_ids)].any()
        assert all(name in llm.decode(example.prompt_ids) for name in INVENTED[row].case.present)
    assert batch[0].report_ids[-1] == llm.end_token_id
    assert len(examples.example_of(llm, INVENTED[0], 7).report_ids) == 7


@torch.no_grad()
def test_the_loss_of_a_batch_is_that_of_each_report_alone() -> None:
    llm = small_language_model()
    batch = [examples.example_of(llm, study, 640) for study in INVENTED[:3]]
    tokens = [len(example.report_ids) for example in batch]
    alone = [float(examples.report_loss(llm, [example])) for example in batch]
    expected = sum(n * loss for n, loss in zip(tokens, alone, strict=True)) / sum(tokens)
    assert float(examples.report_loss(llm, batch)) == pytest.approx(expected, rel=1e-5)
    ids = torch.tensor([[*batch[0].prompt_ids, *batch[0].report_ids]])
    logits = llm(llm.embed(ids)).logits[0, len(batch[0].prompt_ids) - 1 : -1]
    direct = torch.nn.functional.cross_entropy(logits, torch.tensor(batch[0].report_ids))
    assert alone[0] == pytest.approx(float(direct), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=50), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_holds_every_example_once_in_batches_of_like_length(
    lengths: list[int], size: int, epoch: int
) -> None:
    batches = examples.epoch_batches(lengths, size, 1, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) <= size for batch in batches)
    assert batches == examples.epoch_batches(lengths, size, 1, epoch)
    spans = sorted((min(lengths[i] for i in batch), max(lengths[i] for i in batch)) for batch in batches)
    assert all(low >= 0.8 * high for (_, high), (low, _) in zip(spans, spans[1:], strict=False))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 20))
def test_batches_from_a_step_are_those_that_an_unbroken_run_gets(first: int) -> None:
    lengths = [10, 30, 20, 50, 40, 60, 70]
    whole, later = examples.batches_from(lengths, 2, 0, 0), examples.batches_from(lengths, 2, 0, first)
    for _ in range(first):
        next(whole)
    assert [next(later) for _ in range(9)] == [next(whole) for _ in range(9)]


# --- training


def _settings(**changed: Any) -> Any:
    return training.Settings("small", "none", **{"batch_size": 2, "lr": 3e-2, "steps": 12, **changed})


def _training(work: Path, settings: Any, **more: Any) -> Any:
    llm = small_language_model()
    for part in llm.modules():  # dropout, so that random numbers must be resumed, too
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.2
    rows = [examples.example_of(llm, study, 60) for study in INVENTED]
    return training.AdapterTraining(llm, rows, settings, work, **more), llm


class _Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def _kill_after(steps: int, run: Any) -> Callable[[Any], float]:
    step = run._step

    def killed(batch: Any) -> float:
        if run.progress.steps == steps:
            raise _Killed
        return float(step(batch))

    return killed


def test_the_loss_falls_and_the_base_stays(tmp_path: Path) -> None:
    run, llm = _training(tmp_path, _settings(steps=32))
    frozen = {n: p.clone() for n, p in llm.model.named_parameters() if "lora_" not in n}
    progress = run.run()
    assert progress.steps == 32
    first_epoch, last_epoch = progress.losses[:4], progress.losses[-4:]  # of all eight reports, each
    assert sum(last_epoch) < sum(first_epoch) - 0.1
    assert all(torch.equal(p, frozen[n]) for n, p in llm.model.named_parameters() if n in frozen)


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole, llm = _training(tmp_path / "whole", _settings())
    expected = whole.run().losses
    cut, _ = _training(tmp_path / "cut", _settings())
    cut._step = _kill_after(7, cut)
    with pytest.raises(_Killed):
        cut.run(checkpoint_seconds=0.0)
    torch.manual_seed(99)
    again, resumed = _training(tmp_path / "cut", _settings())
    assert (again.progress.steps, again.progress.resumed) == (7, 1)
    assert again.run().losses == expected
    ours = llm.adapter_state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in resumed.adapter_state_dict().items())
    finished, _ = _training(tmp_path / "cut", _settings())
    assert finished.done
    assert finished.run().losses == expected


def test_a_budget_of_seconds_ends_the_training(tmp_path: Path) -> None:
    ticks = iter(range(10_000))
    run, _ = _training(tmp_path, _settings(steps=None, seconds=5.0), clock=lambda: float(next(ticks)))
    assert run.run().steps == 5
    with pytest.raises(ConfigError, match="needs a budget"):
        _training(tmp_path, _settings(steps=None))


def test_other_settings_and_damage_are_refused(tmp_path: Path) -> None:
    run, _ = _training(tmp_path, _settings(steps=1))
    run.run()
    with pytest.raises(ConfigError, match=r"another lr \(0.03, now 0.01\)"):
        _training(tmp_path, _settings(steps=1, lr=1e-2))
    (tmp_path / training.FOLDER / training.TENSORS_FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="no training to go on with"):
        _training(tmp_path, _settings(steps=1))


# --- writing


def test_reports_are_written_from_labels_and_kept(tmp_path: Path) -> None:
    llm = small_language_model().eval()
    cases = [study.case for study in INVENTED[:4]]
    writer = language_writer.LanguageModelWriter(llm, 12, tmp_path, "a", batch_size=3)
    texts = writer.write(cases)
    assert len(texts) == 4
    assert texts == language_writer.LanguageModelWriter(llm, 12, batch_size=1).write(cases)
    kept = json.loads((tmp_path / language_writer.FILE).read_text())
    kept["texts"]["invented_1"] = "kept"
    (tmp_path / language_writer.FILE).write_text(json.dumps(kept))
    assert language_writer.LanguageModelWriter(llm, 12, tmp_path, "a").write(cases) == ["kept", *texts[1:]]
    assert language_writer.LanguageModelWriter(llm, 12, tmp_path, "b").write(cases) == texts
    (tmp_path / language_writer.FILE).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        language_writer.LanguageModelWriter(llm, 12, tmp_path, "b").write(cases)


def test_a_trained_model_writes_what_it_learned() -> None:
    llm = small_language_model()
    for parameter in llm.model.parameters():
        parameter.requires_grad_(True)
    example = examples.example_of(llm, INVENTED[3], 640)
    optimizer = torch.optim.AdamW(llm.model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        examples.report_loss(llm, [example]).backward()
        optimizer.step()
    writer = language_writer.LanguageModelWriter(llm.eval(), 40)
    assert writer.write([INVENTED[3].case]) == [INVENTED[3].text]


# --- scores and the command


def test_a_perfect_row_and_the_truth_score_one() -> None:
    texts = [study.text for study in INVENTED]
    row = scoring.score(texts, INVENTED)
    assert row["BLEU_4"] == row["ROUGE_L"] == 1
    assert row["f1_per_disease"][EFFUSION] == row["f1_per_disease"][NODULE] == 1
    assert row["clinical_micro_f1"]["value"] == 1
    assert "BLEU_4" not in scoring.score(texts, INVENTED, is_truth=True)


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    monkeypatch.setattr(command, "machine", dict)
    monkeypatch.setattr(command, "load", lambda settings, device: small_language_model())
    monkeypatch.setenv("VLM3D_REAL_DATA", str(tmp_path / "data"))
    return int(command.main(["--out", str(tmp_path / "out" / "rows.json"), *more]))


def test_without_reports_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path, monkeypatch) == 0
    assert "skipped" in capsys.readouterr().out


def test_only_rows_of_this_run_are_printed_and_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_table(tmp_path / "data" / command.TABLE, INVENTED)
    assert _run(tmp_path, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "| nearest neighbor, checked |" in printed
    assert "SmolLM2" not in printed
    work = ["--work", str(tmp_path / "work"), "--steps", "2", "--max-tokens", "12"]
    assert _run(tmp_path, monkeypatch, *work) == 0
    printed = capsys.readouterr().out
    assert "| SmolLM2-135M + LoRA, 1.3 epochs, checked |" in printed
    result = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [row["row"] for row in result["rows"]][-2:] == ["language_model", "language_model_checked"]
    assert result["rows"][-1]["steps"] == 2
    assert (result["data"]["studies_to_learn_from"], result["data"]["studies_held_out"]) == (6, 2)
    everything = printed + json.dumps(result)
    assert not any(study.text in everything for study in INVENTED)


def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_table(tmp_path / "data" / command.TABLE, INVENTED)
    for more, words in (
        (["--steps", "1"], "training needs --work"),
        (["--steps", "1", "--work", str(BENCHMARKS / "weights")], "lies inside the repository"),
    ):
        assert _run(tmp_path, monkeypatch, *more) == ConfigError.exit_code
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (BENCHMARKS / "weights").exists()


@pytest.mark.real_data
def test_rows_of_the_real_reports(real_data: Path) -> None:
    """The split is the labeler's, retrieval never takes a held-out study, and a checked row is read as labeled."""
    parts = studies.split(studies.read_studies(real_data / command.TABLE))
    assert (len(parts.training), len(parts.held_out)) == (600, 200)
    held_out = parts.held_out[:40]
    nearest = writers.NearestWriter(parts.training).write([study.case for study in held_out])
    assert set(nearest) <= {study.text for study in parts.training}
    checked = [
        writers.check_against_labels(text, study.case).text
        for text, study in zip(nearest, held_out, strict=True)
    ]
    before, after = (
        scoring.score(texts, held_out)["clinical_micro_f1"]["value"] for texts in (nearest, checked)
    )
    assert before < 0.95 < 0.99 < after
    assert dataclasses.asdict(held_out[0].case).keys() == {"case_id", "labels_K"}
