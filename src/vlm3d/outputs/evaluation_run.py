"""``vlm3d evaluate``: files of any system against the truth, or a checkpoint over a prepared store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlm3d.errors import ConfigError, InputError
from vlm3d.evaluation.evaluation_files import check_folder, write_evaluation
from vlm3d.evaluation.evaluator import Evaluation, EvaluationSettings, evaluate
from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.prediction_files import read_findings
from vlm3d.inference.prediction import Policy
from vlm3d.io import write_atomically

PAGE_FILE = "evaluation.html"
Say = Callable[[str], None]


def evaluate_files(
    predictions: Sequence[Path],
    truth: Sequence[Path],
    settings: EvaluationSettings,
    *,
    against: Sequence[Path] = (),
    tune_on: Sequence[Path] = (),
    tune_against: Sequence[Path] = (),
    tune_truth: Sequence[Path] = (),
    say: Say,
) -> Evaluation:
    """Score what lies in files.

    Args:
        predictions: Of one system, see `vlm3d.evaluation.prediction_files`.
        truth: In the same formats.
        settings: How figures are computed.
        against: Of a second system, for a paired test.
        tune_on: The first system's predictions on the split that thresholds are tuned on.
        tune_against: The second system's predictions on that split.
        tune_truth: Labels of that split, where they are not in `truth`.
        say: Receives lines of progress.

    Raises:
        InputError: Something cannot be read, or cases do not fit.
    """
    if tune_truth and not tune_on:
        raise ConfigError("--tune-truth goes with --tune-on, which names the predictions to tune on")
    if tune_against and not (tune_on and against):
        raise ConfigError("--tune-against goes with --tune-on and --against: both systems are tuned alike")
    true = read_findings(truth, truth=True)
    tuning_truth = read_findings(tune_truth, truth=True) if tune_truth else true
    return evaluate(
        read_findings(predictions),
        true,
        settings,
        against=read_findings(against) if against else None,
        tune_on=(read_findings(tune_on), tuning_truth) if tune_on else None,
        tune_against=(read_findings(tune_against), tuning_truth) if tune_against else None,
        progress=_every_tenth(say, "case"),
    )


def evaluate_checkpoint(
    checkpoint: str | Path,
    store: Path,
    settings: EvaluationSettings,
    *,
    split: str = "test",
    tune_on: str | None = None,
    thresholds: Thresholds | None = None,
    reports: bool = False,
    report_batch: int = 8,
    on_contradiction: Policy = "repair",
    device: str = "auto",
    say: Say,
) -> Evaluation:
    """Run a checkpoint over one split of a prepared store and score it.

    Args:
        checkpoint: Folder or Hub name.
        store: Written by ``vlm3d prepare`` with the checkpoint's settings.
        settings: How figures are computed.
        split: Which cases; ``"all"`` takes every one.
        tune_on: Split that thresholds are tuned on.
        thresholds: Where probabilities are cut; those tuned on ``tune_on`` go first. Without either it is those that are
            stored with the checkpoint, else `settings.threshold`.
        reports: Whether to write reports too.
        report_batch: Reports that are written side by side.
        on_contradiction: What happens to a report that contradicts its own heads: ``"flag"`` or ``"repair"``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        say: Receives lines of progress.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConfigError: The store was prepared for another model.
        InputError: The split holds no case.
    """
    from vlm3d.datasets.prepared import PreparedDataset
    from vlm3d.evaluation.model_evaluation import ModelRun, evaluate_model, tune_on_store
    from vlm3d.inference.head_contradictions import ReportMender
    from vlm3d.inference.loading import choose_device
    from vlm3d.inference.thresholds import thresholds_for
    from vlm3d.model.multi_task_model import VLM3DMultiTask

    if report_batch < 1:
        raise ConfigError(f"reports are written in batches of 1 or more, got {report_batch}")
    if on_contradiction == "regenerate":
        raise ConfigError("an evaluation writes each report once: on_contradiction is flag or repair")
    dataset = PreparedDataset(store, None if split == "all" else (split,), verify="sha256")
    if not dataset.cases:
        raise InputError(f"{store} holds no case of the split '{split}'; --split names another one")
    say("loading the model")
    model = VLM3DMultiTask.from_pretrained(checkpoint, load_llm=reports, device=choose_device(device))
    fusion, stored = None, thresholds_for(model, checkpoint)
    if tune_on is not None:
        tuned = tune_on_store(
            model,
            PreparedDataset(store, (tune_on,)),
            settings,
            name=f"split '{tune_on}'",
            evaluated_patients=[case.patient_id for case in dataset.cases],
            progress=_every_tenth(say, f"case of {tune_on}"),
        )
        thresholds, fusion = tuned.thresholds, tuned.fusion
    elif stored is not None:
        fusion = stored.fusion
        if thresholds is None:
            thresholds = Thresholds.stored(stored)
    return evaluate_model(
        model,
        dataset,
        settings,
        run=ModelRun(reports=reports, report_batch=report_batch, fusion=fusion),
        thresholds=thresholds,
        name=Path(checkpoint).name or str(checkpoint),
        mend=ReportMender(model, on_contradiction),
        progress=_every_tenth(say, "case"),
    )


def write_results(
    evaluation: Evaluation, folder: Path, *, page: bool = False, overwrite: bool = False
) -> list[Path]:
    """Write an evaluation's files, and its page of errors where that is asked for.

    Raises:
        OutputError: The folder is refused or cannot be written.
    """
    check_folder(folder, overwrite=overwrite)
    html = None
    if page:
        from vlm3d.outputs.error_page import render_error_page

        html = render_error_page(evaluation)
    files = write_evaluation(evaluation, folder, overwrite=overwrite)
    if html is not None:
        write_atomically(folder / PAGE_FILE, html)
        files.append(folder / PAGE_FILE)
    return files


def _every_tenth(say: Say, what: str) -> Callable[[int, int], None]:
    """Say a line about ten times, however many cases there are."""

    def progress(done: int, total: int) -> None:
        step = max(1, total // 10)
        if total > 1 and (done % step == 0 or done == total):
            say(f"{what} {done} of {total}")

    return progress
