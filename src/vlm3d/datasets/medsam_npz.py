"""MedSAM2-style NPZ cases: windowed uint8 images, object ids, voxel size.

```
FOLDER/
├── *.npz           imgs uint8 (D,H,W), gts uint8 object ids, spacing (z, y, x) in mm; window (low, high) HU or none
└── objects.json    optional: {"objects": {"1": "lung_nodule", …}, "window_hu": [-1350, 150], "patient": "^(.+)_\\d+$"}
```

Without ``objects.json``, ids 1 to 5 are the lesions in the order of `vlm3d.labels`. Several ids may name one lesion. A
lesion that the table names is annotated in every case: no voxel of it says that it is not there. A file whose name
carries one of CT-RATE's volume names is that volume: it takes its patient and split, and labels and report where tables
are given.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm3d.datasets.case import Case, CaseData
from vlm3d.datasets.ct_rate import VolumeName, parse_volume_name, walk
from vlm3d.datasets.ct_rate_tables import read_tables
from vlm3d.datasets.join_summary import JoinSummary
from vlm3d.datasets.spec import as_split, parse_spec
from vlm3d.datasets.splits import check_unique_ids
from vlm3d.errors import ConfigError, DataError, UnreadableFileError
from vlm3d.io import NpzCase, read_npz_case
from vlm3d.io.geometry import normalize_affine
from vlm3d.io.hounsfield import checked_hounsfield, rescaled
from vlm3d.io.limits import check_scan_size
from vlm3d.labels import LESION_KEYS
from vlm3d.volume import Volume

logger = logging.getLogger(__name__)

KIND = "npz"
OPTIONS = ("split", "window", "tables")
OBJECTS_FILE = "objects.json"
DEFAULT_OBJECTS: Mapping[int, str] = dict(enumerate(LESION_KEYS, start=1))
DEFAULT_PATIENT = r"^(.+?)(?:[_-](?:scan|series|rec|part|crop|slice|lesion)[_-]?\d+)*$"
"""The file's name without ``_scan2``, ``_lesion03`` and the like at its end; say otherwise in ``objects.json``."""

_CT_RATE_NAME = re.compile(r"(?:^|[^a-z])((?:train|valid)_\d+_[a-z]+_\d+)(?![0-9])")
_WINDOW = re.compile(r"(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class ObjectTable:
    """What the numbers in a folder of cases mean.

    Attributes:
        objects: Object id -> lesion key.
        window_hu: HU of gray values 0 and 255 for files that do not say so, or None.
        patient: Regular expression whose first group, in a file's name without ending, is the patient.
    """

    objects: Mapping[int, str]
    window_hu: tuple[float, float] | None = None
    patient: str = DEFAULT_PATIENT


def find_npz_cases(spec: str) -> list[Case]:
    """The NPZ cases under a folder.

    Args:
        spec: ``npz:FOLDER[:split=train,window=-1350..150,tables=FOLDER]``. ``window`` is the HU that gray values 0 and
            255 stand for where the file does not say it; ``tables`` holds CT-RATE's tables.

    Raises:
        ConfigError: The specification cannot be read.
        DataError: There is no case, two cases share a name, or ``objects.json`` cannot be used.
    """
    parsed = parse_spec(spec, KIND, OPTIONS)
    folder = Path(parsed.target)
    files = sorted(path for path in walk(folder) if path.suffix.lower() == ".npz")
    if not files:
        raise DataError(f"{folder} holds no NPZ case: no *.npz under it")
    table = read_object_table(folder / OBJECTS_FILE)
    window = _window(parsed.options.get("window"), spec) or table.window_hu
    summary = JoinSummary()
    tables = parsed.options.get("tables")
    joined = read_tables(
        [] if tables is None else [p for p in walk(Path(tables)) if p.suffix.lower() in (".csv", ".txt")],
        summary,
    )
    cases = []
    for path in files:
        volume = ct_rate_name(path.stem)
        key = "" if volume is None else volume.key
        if key in joined.no_chest:
            summary.note("cases without a chest, left out", [path.name])
            continue
        cases.append(
            Case(
                case_id=_safe(path.stem),
                patient_id=volume.patient_id if volume else patient_of(path.stem, table.patient),
                source=KIND,
                load=partial(load_npz, path, dict(table.objects), window),
                split=as_split(parsed) or (volume.split if volume else None),
                labels_K=joined.labels.get(key),
                report=joined.reports.get(key),
            )
        )
    check_unique_ids(cases)
    if tables is not None:
        summary.note("cases without labels", (case.case_id for case in cases if case.labels_K is None))
        summary.note("cases without a report", (case.case_id for case in cases if case.report is None))
    summary.counts = {"cases": len(cases), "patients": len({case.patient_id for case in cases})}
    summary.log(logger, parsed.target)
    return cases


def load_npz(path: Path, objects: Mapping[int, str], window_hu: tuple[float, float] | None) -> CaseData:
    """Read one case: its gray values as HU, its objects as masks.

    Args:
        path: NPZ file.
        objects: Object id -> lesion key.
        window_hu: HU that 0 and 255 stand for, where the file does not say it.

    Raises:
        DataError: No window is known, or an object has an id that the table does not name.
        InputError: The file cannot be read, or is no chest CT.
    """
    try:
        case = read_npz_case(path)
    except OSError as error:
        raise UnreadableFileError(f"{path.name} cannot be read: {error.strerror}") from error
    volume = _volume(case, path.name, window_hu)
    if case.gts_DHW is None:
        return CaseData(volume=volume)
    counts = np.bincount(case.gts_DHW.ravel(), minlength=256)
    unknown = [int(value) for value in np.flatnonzero(counts) if value and value not in objects]
    if unknown:
        raise DataError(
            f"{path.name} holds objects {', '.join(map(str, unknown[:5]))} that no table names; say in {OBJECTS_FILE} "
            "which lesions they are"
        )
    masks = {
        key: np.isin(case.gts_DHW, [number for number, lesion in objects.items() if lesion == key])
        for key in dict.fromkeys(objects.values())
    }
    return CaseData(volume=volume, lesion_masks=masks)


def read_object_table(path: Path) -> ObjectTable:
    """What ``objects.json`` says, or the defaults where there is no such file.

    Raises:
        DataError: It is no JSON of that form, or names an unknown lesion.
    """
    if not path.is_file():
        return ObjectTable(DEFAULT_OBJECTS)
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        objects = {int(number): str(key) for number, key in told.get("objects", DEFAULT_OBJECTS).items()}
        window = told.get("window_hu")
        window_hu = None if window is None else (float(window[0]), float(window[1]))
        patient = str(told.get("patient", DEFAULT_PATIENT))
        usable = re.compile(patient).groups >= 1 and all(0 < number < 256 for number in objects)
    except (OSError, ValueError, TypeError, AttributeError, IndexError, KeyError, re.error) as error:
        raise DataError(f"{path} cannot be read: {error}; it holds objects, window_hu and patient") from error
    foreign = sorted(set(objects.values()) - set(LESION_KEYS))
    if foreign:
        raise DataError(f"{path} names the lesion '{foreign[0]}'; known are {', '.join(LESION_KEYS)}")
    if not usable or (window_hu is not None and window_hu[0] >= window_hu[1]):
        raise DataError(f"{path}: ids are 1..255, window_hu is [low, high], patient has a group in brackets")
    return ObjectTable(objects, window_hu, patient)


def patient_of(stem: str, pattern: str = DEFAULT_PATIENT) -> str:
    """The patient that a file's name tells; the whole name where the pattern does not fit.

    >>> patient_of("CT_LUNG1-017_lesion02")
    'CT_LUNG1-017'
    """
    match = re.search(pattern, stem)
    return (match[1] if match else "") or stem


def ct_rate_name(stem: str) -> VolumeName | None:
    """The CT-RATE volume that a file's name carries, such as ``CT_CT-RATE_valid_2_a_1``."""
    match = _CT_RATE_NAME.search(stem)
    return parse_volume_name(match[1]) if match else None


def _volume(case: NpzCase, name: str, window_hu: tuple[float, float] | None) -> Volume:
    window = case.window_hu or window_hu
    if window is None or window[0] >= window[1]:
        raise DataError(
            f"{name} holds gray values of a window that nothing tells: give :window=LOW..HIGH in HU, or window_hu in "
            f"{OBJECTS_FILE}"
        )
    low, high = window
    depth, height, width = case.imgs_DHW.shape
    volume = Volume(
        rescaled(case.imgs_DHW, (high - low) / 255, low),
        normalize_affine(case.affine, (depth, height, width), name),
        source=name,
        notes=(
            f"gray values 0..255 taken as {low:g}..{high:g} HU; what lay outside is lost",
            "the file has no orientation: axes taken as Superior, Posterior, Left",
        ),
    )
    check_scan_size(name, volume.shape_DHW, volume.spacing_mm)
    return checked_hounsfield(volume)


def _window(text: str | None, spec: str) -> tuple[float, float] | None:
    if text is None:
        return None
    match = _WINDOW.fullmatch(text)
    if match is None or float(match[1]) >= float(match[2]):
        raise ConfigError(f"'{spec}': window is LOW..HIGH in HU, such as -1350..150, got '{text}'")
    return float(match[1]), float(match[2])


def _safe(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", stem)
