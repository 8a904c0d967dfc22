"""An evaluation on disk.

```
OUT/
├── evaluation.json   every figure with its interval, and what was compared
├── evaluation.txt    the same as tables
└── lesions.csv       one line a case and lesion, where masks were compared
```
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from vlm3d.errors import OutputError
from vlm3d.evaluation.evaluator import Evaluation
from vlm3d.evaluation.intervals import as_json
from vlm3d.evaluation.lesion_scores import LESION_FIGURES, LesionScore
from vlm3d.evaluation.official import write_json
from vlm3d.evaluation.tables import evaluation_text
from vlm3d.io import write_atomically

JSON_FILE, TEXT_FILE, LESIONS_FILE = "evaluation.json", "evaluation.txt", "lesions.csv"


def check_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse, before any work is done, a folder that could not be written in the end.

    Raises:
        OutputError: It is a file, or holds an evaluation that may not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, not a folder: choose another folder")
    if (folder / JSON_FILE).exists() and not overwrite:
        raise OutputError(f"{folder} holds an evaluation already: choose another folder, or pass --overwrite")


def write_evaluation(evaluation: Evaluation, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write an evaluation's files, each whole or not at all, `evaluation.json` last.

    Args:
        evaluation: From `evaluate` or `evaluate_model`.
        folder: Created where it is missing.
        overwrite: Replace an earlier evaluation there.

    Returns:
        The files written.

    Raises:
        OutputError: The folder is refused or cannot be written.
    """
    folder = Path(folder)
    check_folder(folder, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be created: {(error.strerror or 'error').lower()}; choose another folder"
        ) from error
    written = []
    if evaluation.cases.lesions:
        write_atomically(folder / LESIONS_FILE, _lesion_table(evaluation.cases.lesions))
        written.append(folder / LESIONS_FILE)
    write_atomically(folder / TEXT_FILE, evaluation_text(evaluation.figures))
    write_json(folder / JSON_FILE, evaluation.figures)
    return [*written, folder / TEXT_FILE, folder / JSON_FILE]


def _lesion_table(scores: list[LesionScore]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case_id", "lesion", *LESION_FIGURES, "truth_ml", "predicted_ml"])
    for score in scores:
        values = [as_json(value) for value in (*score.figures.values(), score.truth_ml, score.predicted_ml)]
        writer.writerow([score.case_id, score.lesion, *("" if value is None else value for value in values)])
    return text.getvalue()
