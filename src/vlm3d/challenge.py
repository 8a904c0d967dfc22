"""An entry to the VLM3D challenge: every volume of a folder, read once, becomes one official result file.

The file is written at the end, and only if every volume was predicted: a case that is missing breaks the challenge's
scorers, and a part of the results must never look like all of them (docs/challenge.md).
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm3d.errors import CheckpointError, InputError, OutputError, VLM3DError
from vlm3d.evaluation.case_ids import case_id_of, check_unique, count
from vlm3d.evaluation.official import Year, write_classification, write_reports
from vlm3d.evaluation.official_boxes import Boxes, LesionBox, boxes_of_mask, write_boxes
from vlm3d.evaluation.thresholds import shift_to_half
from vlm3d.inference.pipeline import Pipeline, Result
from vlm3d.inference.prediction import DiseaseFinding, Report
from vlm3d.inference.settings import PredictionSettings
from vlm3d.io.wording import reason, shown
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS

logger = logging.getLogger(__name__)

Task = Literal["classification", "reports", "boxes"]
VOLUME_ENDINGS = (".mha", ".nii.gz", ".nii")

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def run_challenge(
    inputs: Path,
    out: Path,
    load: Callable[[], Pipeline],
    task: Task,
    *,
    year: Year = 2026,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> Path:
    """Predict every volume of a folder and write the official file of one task.

    Args:
        inputs: Folder of MetaImage or NIfTI volumes; folders inside are searched too.
        out: Folder of the result file; made if it is not there.
        load: Gives the pipeline; called once, after everything cheap has been checked.
        task: What to write.
        year: Of the challenge, whose files differ in name and form.
        overwrite: Replace an earlier result file, once the new one is whole.
        say: Receives lines of progress, without names of scans.

    Returns:
        The file written.

    Raises:
        InputError: There is no volume, two share a name, or one cannot be used; nothing is written.
        OutputError: A result file is there already, or cannot be written.
        VLM3DError: The model cannot be loaded or cannot predict a volume; nothing is written.
    """
    volumes = find_volumes(inputs)
    names = [case_name(path, task, year) for path in volumes]
    check_unique([case_id_of(name) for name in names], str(inputs))
    target = _result_file(out, task, year, overwrite=overwrite)
    say(f"{count(len(volumes), 'volume')} to predict; loading the model")
    pipeline = load()
    _check_labels(pipeline, task)
    say(f"{pipeline.model_info.checkpoint} on {pipeline.device}")
    if task == "classification":
        say(_thresholds_note(pipeline))
    entries = dict(zip(names, _entries(pipeline, volumes, task, say), strict=True))
    if task == "classification":
        write_classification(target, entries)
    elif task == "reports":
        write_reports(target, entries, year=year)
    else:
        write_boxes(target, entries)
    return target


def find_volumes(folder: Path) -> list[Path]:
    """The volumes of a folder and of the folders in it, by name.

    Raises:
        InputError: It is no folder that can be read, or holds none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; --input names the folder of the volumes")
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    found = [path for path in files if path.name.lower().endswith(VOLUME_ENDINGS)]
    if not found:
        raise InputError(f"{folder} holds no volume: no file ends in {', '.join(VOLUME_ENDINGS)}")
    return found


def case_name(path: Path, task: Task, year: Year) -> str:
    """What a volume is called in the result file.

    Boxes go by the file's name, probabilities and reports by the name without its ending. Reports of 2026 are scored by
    the UUID of the series, the last one in a name such as ``<batch>_<patient>_<series>.nii.gz``.
    """
    if task == "boxes":
        return path.name
    stem = case_id_of(path.name)
    if task == "reports" and year == 2026:
        return next((part for part in reversed(stem.split("_")) if _UUID.fullmatch(part)), stem)
    return stem


def official_probabilities(diseases: Sequence[DiseaseFinding], *, shift: bool) -> dict[str, float]:
    """Probability of each disease by name; with ``shift`` its own threshold lands on the challenge's cut of 0.5."""
    probability_K = np.array([disease.probability for disease in diseases])
    if shift:
        probability_K = shift_to_half(probability_K, np.array([disease.threshold for disease in diseases]))
    return dict(zip([disease.name for disease in diseases], probability_K.tolist(), strict=True))


def official_report(report: Report) -> str:
    """Findings and impression in one line: the scorers drop line breaks without a space in their place.

    Recommendations are left out, since the challenge's true reports have none.
    """
    text = report.text
    if report.findings or report.impression:
        text = f"Findings: {report.findings} Impression: {report.impression}"
    return " ".join(text.split())


def official_boxes(result: Result) -> Boxes:
    """Boxes around the pieces of the challenge's five lesions.

    All boxes of a lesion share its probability: that the scan has the lesion where this was fitted (`vlm3d tune`), else
    that of its surest voxel.
    """
    boxes: dict[str, list[LesionBox]] = {}
    for lesion in result.prediction.lesions:
        if lesion.key in LESION_KEYS:
            probability = lesion.max_probability if lesion.presence is None else lesion.presence
            found = boxes_of_mask(result.masks[lesion.key], result.volume.affine)
            boxes[lesion.key] = [replace(box, probability=probability) for box in found]
    return boxes


def _result_file(out: Path, task: Task, year: Year, *, overwrite: bool) -> Path:
    """Where the results belong, in a folder that is there."""
    target = out / ("predictions.json" if task == "reports" and year == 2026 else "results.json")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; --overwrite replaces it once every volume is predicted")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {reason(error)}") from error
    if not os.access(out, os.W_OK):
        raise OutputError(f"{out} cannot be written to by this user")
    return target


def _check_labels(pipeline: Pipeline, task: Task) -> None:
    if task == "classification" and tuple(pipeline.model.disease_names) != DISEASE_NAMES:
        raise CheckpointError(
            f"the checkpoint tells {count(len(pipeline.model.disease_names), 'disease')}; the challenge asks for its own 18"
        )


def _thresholds_note(pipeline: Pipeline) -> str:
    if pipeline.thresholds is None:
        return "the checkpoint has no thresholds: probabilities are written as they are ('vlm3d tune' chooses some)"
    return f"each disease's threshold is moved to 0.5; thresholds: {pipeline.thresholds.source}"


def _entries(
    pipeline: Pipeline, volumes: Sequence[Path], task: Task, say: Callable[[str], None]
) -> Iterator[Any]:
    """What the result file holds of each volume, in turn; what the weights never learned is said once."""
    settings = PredictionSettings(report=task == "reports")
    start, notes = time.perf_counter(), set[str]()
    for number, path in enumerate(volumes, start=1):
        result = _predict(pipeline, path, settings)
        if (note := result.prediction.training_note) and note not in notes:
            notes.add(note)
            say(note)
        seconds = (time.perf_counter() - start) / number
        say(
            f"[{number}/{len(volumes)}] {seconds:.1f} s a case; {len(volumes) * seconds / 60:.0f} min for all"
        )
        if task == "classification":
            yield official_probabilities(result.prediction.diseases, shift=pipeline.thresholds is not None)
        elif task == "reports":
            yield official_report(result.prediction.report)
        else:
            yield official_boxes(result)


def _predict(pipeline: Pipeline, path: Path, settings: PredictionSettings) -> Result:
    """Predict one volume; whatever goes wrong names it in one line."""
    try:
        return pipeline(path, settings)
    except VLM3DError as error:
        if shown(path) in str(error):
            raise
        raise type(error)(f"{shown(path)}: {error}") from error
    except Exception as error:
        logger.info("%s cannot be predicted", shown(path), exc_info=True)
        raise VLM3DError(
            f"{shown(path)} cannot be predicted: {type(error).__name__}: {reason(error)} (-v shows where)"
        ) from error
