"""Predictions of any system, or the truth, from whatever file or folder they come in.

| what | how it is known |
|---|---|
| csv | ids (VolumeName, AccessionNo, case_id) with the 18 diseases by name in any order, report text, or both |
| JSON | the challenge's classification, report or box file, wrapped or not |
| folder of predictions | `prediction.json` in it or in its folders, as `vlm3d predict` writes them |
| folder of masks | ``<case>/<lesion>.nii.gz``, ``<case>_<lesion>.nii.gz``, or ``<case>.nii.gz`` with the lesions numbered |
| phantoms | `truth.json` in it or in its folders, as `vlm3d phantom` writes them |
| prepared store | `manifest.jsonl`, as `vlm3d prepare` writes it |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm3d.errors import InputError, UnreadableFileError
from vlm3d.evaluation.case_findings import CaseFindings, FindingsSource, LesionMasks, least_trained, merged
from vlm3d.evaluation.case_ids import case_id_of, check_unique, count, named, patient_id_of
from vlm3d.evaluation.mask_files import load_files, masks_of_folder
from vlm3d.evaluation.official import (
    Floats,
    read_classification,
    read_json,
    read_reports,
    read_table,
    unwrapped,
)
from vlm3d.evaluation.official_boxes import read_boxes
from vlm3d.io import read_volume
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS

logger = logging.getLogger(__name__)

ID_COLUMNS = ("VolumeName", "AccessionNo", "case_id", "input_image_name")
REPORT_COLUMNS = ("report", "report_text", "generated_report")
PATIENT_COLUMN = "patient_id"
PREDICTION_FILE = "prediction.json"
PHANTOM_FILE = "truth.json"
STORE_FILE = "manifest.jsonl"


def read_findings(paths: Path | str | Sequence[Path | str], *, truth: bool = False) -> FindingsSource:
    """Read all that one system says, or all that is true.

    Args:
        paths: One file or folder, or several that complement each other.
        truth: Whether it is the truth: labels are 0, 1 or empty there, and a lesion without a mask is not annotated,
            where a system's lesion without a mask was not found.

    Raises:
        InputError: Something is missing, damaged, or names a case twice; one line says what.
    """
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    return merged(_read_one(Path(path), truth) for path in listed)


def _read_one(path: Path, truth: bool) -> FindingsSource:
    if not path.exists():
        raise UnreadableFileError(f"{path} does not exist; give a csv, a JSON file or a folder")
    if path.is_dir():
        source = _read_folder(path, truth)
    elif path.suffix.lower() == ".csv":
        source = _read_csv(path, truth)
    elif path.suffix.lower() == ".json":
        source = _read_json_file(path, truth)
    else:
        raise UnreadableFileError(f"{path.name} is no csv, JSON file or folder; vlm3d reads no other results")
    if not source.cases:
        raise InputError(f"{source.name} holds no case")
    return source


# --- tables ------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, truth: bool) -> FindingsSource:
    header, rows = read_table(path)
    id_column = next((column for column in ID_COLUMNS if column in header), None)
    if id_column is None:
        raise InputError(f"{path.name} has no column of case ids; name it {', '.join(ID_COLUMNS)}")
    text_columns = _text_columns(header)
    with_labels = any(name in header for name in DISEASE_NAMES)
    if with_labels and (missing := set(DISEASE_NAMES) - set(header)):
        raise InputError(
            f"{path.name} lacks the columns {named(missing)}; all 18 diseases go by CT-RATE's names"
        )
    if not with_labels and not text_columns:
        raise InputError(
            f"{path.name} has neither the 18 diseases nor a report in its columns: {named(header)}"
        )
    place = {column: index for index, column in enumerate(header)}
    ids = [case_id_of(row[place[id_column]]) for row in rows]
    check_unique(ids, path.name)
    cases = {}
    for case_id, row in zip(ids, rows, strict=True):
        scores_K = None
        if with_labels:
            scores_K = _scores(
                [row[place[name]] for name in DISEASE_NAMES], f"{path.name}: case {case_id}", truth
            )
        patient = row[place[PATIENT_COLUMN]].strip() if PATIENT_COLUMN in place else ""
        report = None
        if text_columns:
            report = _report_of([(column, row[place[column]]) for column in text_columns])
            if truth and not report:  # unknown, like an empty label
                report = None
        cases[case_id] = CaseFindings(case_id, patient or patient_id_of(case_id), scores_K, report)
    return FindingsSource(path.name, cases)


def _text_columns(header: list[str]) -> list[str]:
    """One column with the whole report, or CT-RATE's findings and impression."""
    whole = [column for column in REPORT_COLUMNS if column in header]
    return whole[:1] or [column for column in ("Findings_EN", "Impressions_EN") if column in header]


def _report_of(columns: list[tuple[str, str]]) -> str:
    titles = {"Findings_EN": "Findings: ", "Impressions_EN": "Impression: "}
    return "\n".join(titles.get(column, "") + text.strip() for column, text in columns if text.strip())


def _scores(cells: list[str], where: str, truth: bool) -> Floats:
    scores_K = np.full(len(cells), np.nan)
    for index, (name, cell) in enumerate(zip(DISEASE_NAMES, cells, strict=True)):
        text = cell.strip()
        if truth and not text:
            continue
        try:
            scores_K[index] = float(text)
        except ValueError:
            raise InputError(f"{where} has no number for '{name}'") from None
        value = scores_K[index]
        fits = value in (0.0, 1.0) or (np.isnan(value) if truth else 0 <= value <= 1)
        if not fits:
            wanted = "labels are 0, 1 or empty" if truth else "probabilities lie in 0..1"
            raise InputError(f"{where} has {value} for '{name}'; {wanted}")
    return scores_K


# --- JSON --------------------------------------------------------------------------------------------------------


def _read_json_file(path: Path, truth: bool) -> FindingsSource:
    content = read_json(path)
    if isinstance(content, dict) and "schema_version" in content and "diseases" in content:
        return _read_predictions(path.parent, [path])
    value = unwrapped(content, path.name)
    if "generated_reports" in value:
        reports = read_reports(path)
        return _source(path, {case: {"report": text} for case, text in reports.items()})
    rows = value.get("predictions")
    if not isinstance(rows, list):
        raise UnreadableFileError(
            f"{path.name} is no result file of the challenge: it has neither 'predictions' nor 'generated_reports'"
        )
    if any(isinstance(row, dict) and "probabilities" in row for row in rows):
        scores = read_classification(path)
        if truth and (
            unfit := [case for case, values in scores.items() if not np.isin(values, (0, 1)).all()]
        ):
            raise InputError(
                f"{path.name} is given as truth, but labels other than 0 and 1 are in {named(unfit)}"
            )
        return _source(path, {case: {"scores_K": values} for case, values in scores.items()})
    boxes = read_boxes(path)
    found = {
        case: {"boxes": {key: tuple(value) for key, value in of_lesion.items()}}
        for case, of_lesion in boxes.items()
    }
    return _source(path, found, lesion_keys=frozenset(LESION_KEYS))


def _source(
    path: Path, cases: dict[str, dict[str, Any]], lesion_keys: frozenset[str] = frozenset()
) -> FindingsSource:
    found = {case: CaseFindings(case, patient_id_of(case), **parts) for case, parts in cases.items()}
    return FindingsSource(path.name, found, lesion_keys)


# --- folders -----------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, truth: bool) -> FindingsSource:
    if (folder / STORE_FILE).is_file():
        from vlm3d.evaluation.store_truth import read_store

        return read_store(folder)
    for marker, read in ((PREDICTION_FILE, _read_predictions), (PHANTOM_FILE, _read_phantoms)):
        if (folder / marker).is_file():
            return read(folder, [folder / marker])
        found = sorted(folder.glob(f"*/{marker}"))
        if found:
            return read(folder, found)
    cases = masks_of_folder(folder)
    if not cases:
        raise InputError(
            f"{folder} holds no predictions of vlm3d, no phantoms, no prepared store and no masks such as "
            f"<case>/{LESION_KEYS[-1]}.nii.gz or <case>_{LESION_KEYS[-1]}.nii.gz"
        )
    keys = frozenset().union(*(files.keys for files in cases.values()))
    found_cases = {}
    for case_id, files in cases.items():
        absent = () if truth else tuple(keys - files.keys)
        load: Callable[[], LesionMasks] = partial(load_files, files, absent)
        found_cases[case_id] = CaseFindings(case_id, patient_id_of(case_id), load_masks=load)
    return FindingsSource(folder.name, found_cases, keys)


def _read_predictions(folder: Path, files: list[Path]) -> FindingsSource:
    """Our own predictions: a case is called as its folder, or as its scan where there is only one."""
    contents = {file: read_json(file) for file in files}
    alone = len(files) == 1 and files[0].parent == folder
    cases: dict[str, CaseFindings] = {}
    statuses: set[str] = set()
    notes: dict[str, None] = {}
    with_masks: set[str] = set()
    for file, content in contents.items():
        try:
            source = case_id_of(content["scan"]["source"])
            scores_K = _named_scores(content["diseases"], file)
            report = content["report"]["text"] if content["report"]["generated"] else None
            masks = {item["key"]: Path(item["mask_file"]) for item in content["lesions"] if item["mask_file"]}
            statuses.add(content["model"]["training"])
            notes[str(content["training_note"])] = None
        except KeyError as error:
            raise UnreadableFileError(
                f"{file} is no prediction of vlm3d: {error} is missing in it"
            ) from error
        except (TypeError, AttributeError) as error:
            raise UnreadableFileError(
                f"{file} is no prediction of vlm3d: what it holds has another form"
            ) from error
        case_id = source if alone else file.parent.name
        paths = {key: _inside(file.parent, name) for key, name in masks.items()}
        with_masks |= set(paths)
        cases[case_id] = CaseFindings(
            case_id,
            patient_id_of(case_id),
            scores_K,
            report,
            partial(load_files, paths) if paths else None,
        )
    return FindingsSource(folder.name, cases, frozenset(with_masks), least_trained(statuses), " ".join(notes))


def _named_scores(diseases: list[dict[str, Any]], file: Path) -> Floats:
    found = {disease["name"]: disease["probability"] for disease in diseases}
    missing = set(DISEASE_NAMES) - set(found)
    if missing:
        raise InputError(
            f"{file.parent.name}/{file.name} lacks {named(missing)}: it is of a model with other labels"
        )
    return _scores(
        [str(found[name]) for name in DISEASE_NAMES], f"{file.parent.name}/{file.name}", truth=False
    )


def _inside(folder: Path, name: Path) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"{folder.name}/{PREDICTION_FILE} names a mask outside of its folder")
    if not path.is_file():
        raise UnreadableFileError(
            f"{folder.name} lacks the mask {path.name} that its {PREDICTION_FILE} names"
        )
    return path


def _read_phantoms(folder: Path, files: list[Path]) -> FindingsSource:
    """Phantoms know everything; a lesion without a mask file is not there."""
    cases: dict[str, CaseFindings] = {}
    for file in files:
        content, case = read_json(file), file.parent
        labels = content.get("labels") if isinstance(content, dict) else None
        if not isinstance(labels, dict) or set(labels) != set(DISEASE_NAMES):
            raise UnreadableFileError(f"{case.name}/{file.name} has no labels of the 18 diseases")
        cells = [str(labels[name]) for name in DISEASE_NAMES]
        masks = {key: path for key in LESION_KEYS if (path := case / "masks" / f"{key}.nii.gz").is_file()}
        report = case / "report.txt"
        cases[case.name] = CaseFindings(
            case.name,
            case.name,
            _scores(cells, f"{case.name}/{file.name}", truth=True),
            report.read_text(encoding="utf-8").strip() if report.is_file() else None,
            partial(load_files, masks, tuple(set(LESION_KEYS) - set(masks))),
            load_scan=partial(read_volume, case / "ct.nii.gz"),
        )
    logger.info("%s: %s", folder.name, count(len(cases), "phantom"))
    return FindingsSource(folder.name, cases, frozenset(LESION_KEYS))
