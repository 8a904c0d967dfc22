"""CT-RATE as it is downloaded: volumes in nested folders, three tables, lists of volumes without a chest.

``{split}/{split}_{pid}/{split}_{pid}_{scan}/{split}_{pid}_{scan}_{rec}.nii.gz``: a patient has scans, a scan has
reconstructions. All reconstructions of one scan (a study) share its labels and its report; all scans of a patient share
a split. The first release (``train``, ``valid``) holds raw values and blank headers, the second (``train_fixed``,
``valid_fixed``) HU and true headers; `vlm3d.datasets.ct_rate_volume` tells which a file is.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from vlm3d.datasets.case import Case, CaseData, Split
from vlm3d.datasets.ct_rate_tables import Acquisition, CTRateTables, read_tables, volume_key
from vlm3d.datasets.ct_rate_volume import RELEASES, Release, read_ct_rate_volume
from vlm3d.datasets.join_summary import JoinSummary
from vlm3d.datasets.spec import SPLITS, as_split, parse_spec
from vlm3d.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

KIND = "ct_rate"
OPTIONS = ("split", "release", "tables")
FIXED_FOLDER = re.compile(r"_fixed$")
_VOLUME = re.compile(r"(?P<split>train|valid)_(?P<patient>\d+)_(?P<scan>[a-z]+)_(?P<rec>\d+)")
SUFFIXES = (".nii.gz", ".nii")
Value = TypeVar("Value")


@dataclass(frozen=True)
class VolumeName:
    """What a volume's name says.

    Attributes:
        key: The whole name without its ending, ``valid_2_a_1``.
        split: CT-RATE's own split.
        patient_id: ``valid_2``.
        study: ``valid_2_a``.
    """

    key: str
    split: Split
    patient_id: str
    study: str


@dataclass(frozen=True)
class CTRateIndex:
    """What a download of CT-RATE holds.

    Attributes:
        cases: One a volume, by name.
        summary: What was counted and what was odd.
    """

    cases: list[Case]
    summary: JoinSummary


def find_ct_rate_cases(spec: str) -> list[Case]:
    """The volumes of a CT-RATE folder, joined with its tables; what was odd is logged.

    Args:
        spec: ``ct_rate:FOLDER[:split=valid,release=v2,tables=FOLDER]`` or a folder. ``release`` refuses files of the
            other release; without it each file's own content decides. ``tables`` names where the tables are, if not in
            the folder.

    Raises:
        ConfigError: The specification cannot be read.
        DataError: There is no volume, or a table cannot be used.
    """
    parsed = parse_spec(spec, KIND, OPTIONS)
    release = parsed.options.get("release")
    if release not in (None, *RELEASES):
        raise ConfigError(f"'{spec}': release is one of {', '.join(RELEASES)}, got '{release}'")
    tables = parsed.options.get("tables")
    index = index_ct_rate(
        Path(parsed.target),
        split=as_split(parsed),
        release="v1" if release == "v1" else "v2" if release == "v2" else None,
        tables_folder=None if tables is None else Path(tables),
    )
    index.summary.log(logger, parsed.target)
    return index.cases


def index_ct_rate(
    folder: Path,
    *,
    split: Split | None = None,
    release: Release | None = None,
    tables_folder: Path | None = None,
) -> CTRateIndex:
    """Find the volumes under a folder and join them with the tables.

    Args:
        folder: Anything above the volumes: the download's root, or one split.
        split: Only this split of CT-RATE.
        release: Which release every file must be of; None lets each file tell.
        tables_folder: Where the tables are; None looks in the folder.

    Raises:
        DataError: The folder is missing, holds no volume of CT-RATE, or a table cannot be used.
    """
    summary = JoinSummary()
    files = walk(folder)
    volumes = _named_volumes(files, split, release, summary)
    if not volumes:
        wanted = f" of split '{split}'" if split else ""
        raise DataError(
            f"{folder} holds no CT-RATE volume{wanted}: no file is named like valid_2_a_1.nii.gz under it"
        )
    in_tables = files if tables_folder is None else walk(tables_folder)
    tables = read_tables((path for path in in_tables if path.suffix.lower() in (".csv", ".txt")), summary)
    kept = {name: path for name, path in volumes.items() if name.key not in tables.no_chest}
    summary.note(
        "volumes without a chest, left out", (name.key for name in volumes if name.key in tables.no_chest)
    )
    labels = _shared(tables.labels, kept, "labels", summary)
    reports = _shared(tables.reports, kept, "reports", summary)
    cases = [
        Case(
            case_id=name.key,
            patient_id=name.patient_id,
            source=KIND,
            load=partial(load_ct_rate, path, tables.acquisitions.get(name.key), release),
            split=name.split,
            labels_K=labels.get(name.key),
            report=reports.get(name.key),
            facts=_facts(name, tables.acquisitions.get(name.key)),
        )
        for name, path in sorted(kept.items(), key=lambda item: _order(item[0].key))
    ]
    _count(cases, tables, volumes, split, summary)
    return CTRateIndex(cases, summary)


def load_ct_rate(path: Path, acquisition: Acquisition | None, release: Release | None) -> CaseData:
    """Read one volume, whichever release it is of.

    Raises:
        InputError: See `read_ct_rate_volume`.
    """
    return CaseData(volume=read_ct_rate_volume(path, acquisition, release))


@lru_cache(maxsize=2**17)
def parse_volume_name(key: str) -> VolumeName | None:
    """Split, patient and study of a volume's name, or None where it is not one of CT-RATE's.

    >>> parse_volume_name("valid_2_a_1").study
    'valid_2_a'
    """
    match = _VOLUME.fullmatch(key)
    if match is None:
        return None
    split = next(split for split in SPLITS if split == match["split"])
    patient = f"{split}_{match['patient']}"
    return VolumeName(key, split, patient, f"{patient}_{match['scan']}")


def walk(folder: Path) -> list[Path]:
    """All files under a folder, hidden ones aside; links are followed, each folder once.

    Raises:
        DataError: There is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: give the folder that holds the data")
    found = []
    seen: set[tuple[int, int]] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        state = os.stat(here)  # noqa: PTH116
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name) for name in names if not name.startswith(".")]
    return found


def _named_volumes(
    files: Iterable[Path], split: Split | None, release: Release | None, summary: JoinSummary
) -> dict[VolumeName, Path]:
    """One file a volume; where both releases are there, the second, unless the first is asked for."""
    volumes: dict[VolumeName, Path] = {}
    strange: list[str] = []
    twice: list[str] = []
    for path in files:
        if not path.name.lower().endswith(SUFFIXES):
            continue
        name = parse_volume_name(volume_key(path.name))
        if name is None:
            strange.append(path.name)
            continue
        if split is not None and name.split != split:
            continue
        known = volumes.get(name)
        if known is not None:
            twice.append(name.key)
        if known is None or _preference(path, release) > _preference(known, release):
            volumes[name] = path
    summary.note("image files that are not named as CT-RATE names volumes, left out", strange)
    summary.note("volumes found in two places, one read", twice)
    return volumes


def _preference(path: Path, release: Release | None) -> tuple[bool, str]:
    fixed = any(FIXED_FOLDER.search(part) for part in path.parts[:-1])
    return fixed == (release != "v1"), str(path)


def _shared(
    rows: dict[str, Value], volumes: Iterable[VolumeName], table: str, summary: JoinSummary
) -> dict[str, Value]:
    """Each volume's row; one that has none takes its study's, where the study's rows agree."""
    by_study: dict[str, set[Value]] = defaultdict(set)
    example: dict[str, Value] = {}
    for key, value in rows.items():
        name = parse_volume_name(key)
        if name is not None:
            by_study[name.study].add(value)
            example[name.study] = value
    joined: dict[str, Value] = {}
    borrowed, missing = [], []
    disagreeing = set()
    for name in volumes:
        study = by_study.get(name.study, set())
        if len(study) > 1:
            disagreeing.add(name.study)
        if name.key in rows:
            joined[name.key] = rows[name.key]
        elif len(study) == 1:
            joined[name.key] = example[name.study]
            borrowed.append(name.key)
        else:
            missing.append(name.key)
    summary.note(f"volumes with the {table} of another reconstruction of their study", borrowed)
    summary.note(f"studies whose reconstructions have different {table}, each kept", sorted(disagreeing))
    summary.note(f"volumes without {table}", missing)
    return joined


def _count(
    cases: list[Case],
    tables: CTRateTables,
    volumes: Iterable[VolumeName],
    split: Split | None,
    summary: JoinSummary,
) -> None:
    keys = {name.key for name in volumes}
    in_tables = {*tables.labels, *tables.reports, *tables.acquisitions}
    unfiled, foreign = [], []
    for key in sorted(in_tables - keys):
        name = parse_volume_name(key)
        if name is None:
            foreign.append(key)
        elif split is None or name.split == split:
            unfiled.append(key)
    summary.note("volumes of the tables without a file", unfiled)
    summary.note("rows of the tables that name no CT-RATE volume", foreign)
    summary.note(
        "volumes without metadata",
        (case.case_id for case in cases if case.case_id not in tables.acquisitions),
    )
    summary.counts = {
        "volumes": len(cases),
        "studies": len({case.facts["study"] for case in cases}),
        "patients": len({case.patient_id for case in cases}),
        "with labels": sum(case.labels_K is not None for case in cases),
        "with a report": sum(case.report is not None for case in cases),
        "tables": len(tables.files),
    }


def _facts(name: VolumeName, acquisition: Acquisition | None) -> dict[str, Any]:
    facts = {"study": name.study}
    if acquisition is not None:
        told = {"manufacturer": acquisition.manufacturer, "kernel": acquisition.kernel}
        facts |= {key: value for key, value in told.items() if value}
    return facts


def _order(key: str) -> tuple[Any, ...]:
    """valid_2 before valid_11."""
    split, patient, scan, rec = key.split("_")
    return split, int(patient), len(scan), scan, int(rec)
