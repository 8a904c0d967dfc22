"""The store: prepared scans on disk, made once by ``vlm3d prepare`` and read in crops while training.

```
STORE/
├── fingerprint.json             how the scans were prepared: schema version, preprocessing settings, anatomy, their sha256
├── manifest.jsonl               one line a case, sorted: what `PreparedCase` holds
├── failed.jsonl                 one line a case that could not be prepared: case_id, reason
└── cases/<case_id>/
    ├── image.b2nd               int16 HU (D, H, W) on the model's grid, not windowed
    ├── regions.b2nd             uint8 region ids, 0 where no anatomy is known
    ├── lesions.b2nd             uint8; bit l is the l-th of `vlm3d.labels.STORED_LESION_KEYS`
    └── case.json                the case's line of the manifest, from which a lost manifest is rebuilt
```

A case's folder appears whole or not at all. Arrays are blosc2 frames, LZ4 over shuffled bits: chunks of
16x128x128 in blocks of 8x32x32, so that a crop decompresses little beyond itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from vlm3d.datasets.case import Split
from vlm3d.errors import DataError
from vlm3d.io import whole_folder, write_atomically
from vlm3d.io.wording import reason

MANIFEST, FAILED, CASES, CASE = (
    "manifest.jsonl",
    "failed.jsonl",
    "cases",
    "case.json",
)
ARRAYS: dict[str, type[np.generic]] = {"image": np.int16, "regions": np.uint8, "lesions": np.uint8}
"""Arrays of a case and their number types."""

ANNOTATED_SLICES = "annotated_slices"
"""Fact of a case whose masks cover some slices only: [first, last + 1] of its grid."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

CHUNK_DHW, BLOCK_DHW = (16, 128, 128), (8, 32, 32)
_CASE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
_CODEC, _LEVEL, _FILTER = blosc2.Codec.LZ4, 5, blosc2.Filter.BITSHUFFLE


@dataclass(frozen=True)
class PreparedCase:
    """One line of the manifest.

    Attributes:
        case_id: As in `vlm3d.datasets.case.Case`.
        patient_id: As in `Case`.
        source: As in `Case`.
        split: As in `Case`.
        labels_K: 0, 1 or NaN (unknown) for each disease, or None where no label is known.
        known_lesions: Lesions that were annotated, whether found or not; of all others the masks say nothing. Where
            ``facts`` has `ANNOTATED_SLICES`, they say something in these alone.
        lesion_voxels: Known lesion -> voxels of its mask on this grid.
        report: Text, or None.
        report_is_synthetic: As in `Case`.
        facts: As in `Case`.
        shape_DHW: Of the three arrays.
        spacing_mm: Voxel size along (D, H, W).
        affine: ``(d, h, w, 1)`` to RAS+ mm.
        geometry: Where the grid lies in the scan: `ScanGeometry.from_dict` reads it.
        regions_method: Where the regions come from, as in `RegionMap`; None without regions.
        notes: What reading and preparing had to do to the scan.
        files: Array name -> ``{"bytes": size, "sha256": checksum}`` of its file.
    """

    case_id: str
    patient_id: str
    source: str
    split: Split | None
    labels_K: tuple[float, ...] | None
    known_lesions: tuple[str, ...]
    lesion_voxels: Mapping[str, int]
    report: str | None
    report_is_synthetic: bool
    facts: Mapping[str, Any]
    shape_DHW: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]
    geometry: Mapping[str, Any]
    regions_method: str | None
    notes: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def annotated_slices(self) -> slice:
        """Along D, where masks of known lesions say anything."""
        return slice(*self.facts.get(ANNOTATED_SLICES, (0, self.shape_DHW[0])))

    @property
    def is_annotated_throughout(self) -> bool:
        """Whether masks of known lesions say something of every slice."""
        return self.annotated_slices == slice(0, self.shape_DHW[0])

    @property
    def scored_lesions(self) -> tuple[str, ...]:
        """Known lesions whose masks can be held against others: none where the masks do not cover the scan."""
        return self.known_lesions if self.is_annotated_throughout else ()

    def to_json(self) -> str:
        """One line of JSON; an unknown label is null."""
        values = asdict(self)
        if self.labels_K is not None:
            values["labels_K"] = [None if math.isnan(label) else label for label in self.labels_K]
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> PreparedCase:
        """The case that `to_json` wrote.

        Raises:
            ValueError: The line is damaged or has other fields.
        """
        values = json.loads(line)
        names = {item.name for item in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError("not a prepared case")
        if values["labels_K"] is not None:
            values["labels_K"] = tuple(
                math.nan if label is None else float(label) for label in values["labels_K"]
            )
        for name in ("known_lesions", "shape_DHW", "spacing_mm", "notes"):
            values[name] = tuple(values[name])
        values["affine"] = tuple(tuple(row) for row in values["affine"])
        return cls(**values)


def check_case_id(case_id: str) -> None:
    """Refuse an identifier that cannot name a folder.

    Raises:
        DataError: It holds other characters than letters, digits, ``_ . -``, or begins with a dot.
    """
    if not _CASE_ID.fullmatch(case_id):
        raise DataError(
            f"case_id '{case_id[:80]}' cannot name a folder: it takes up to 200 letters, digits, _ . - and no dot in front"
        )


def write_case(store: Path, case: PreparedCase, arrays: Mapping[str, NDArray[Any]]) -> PreparedCase:
    """Write a case's folder, whole or not at all; returns the case with sizes and checksums.

    Args:
        store: The store.
        case: Its ``files`` are filled in here.
        arrays: The three of `ARRAYS`.

    Raises:
        OutputError: It cannot be written.
    """
    found: dict[str, dict[str, Any]] = {}
    with whole_folder(store / CASES / case.case_id) as folder:
        for name, dtype in ARRAYS.items():
            frame = compressed(np.ascontiguousarray(arrays[name], dtype))
            array_path(folder, name).write_bytes(frame)
            found[name] = {"bytes": len(frame), "sha256": hashlib.sha256(frame).hexdigest()}
        written = replace(case, files=found)
        (folder / CASE).write_text(written.to_json() + "\n", encoding="utf-8")
    return written


def array_path(folder: Path, name: str) -> Path:
    """File of one array in a case's folder."""
    return folder / f"{name}.b2nd"


def read_array(
    path: Path, shape_DHW: tuple[int, int, int], dtype: type[np.generic], box: Box | None
) -> NDArray[Any]:
    """Read one array, or a box of it, with a single thread, so that it is safe after a fork.

    Raises:
        ValueError: It cannot be opened or decompressed, or is not the array that it should be.
    """
    try:
        frame = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
        if frame.shape != shape_DHW or frame.dtype != dtype:
            raise ValueError(f"holds {frame.shape} {frame.dtype} instead of {shape_DHW} {np.dtype(dtype)}")
        array: NDArray[Any] = frame[...] if box is None else frame[tuple(slice(*side) for side in box)]
    except (RuntimeError, OSError) as error:
        raise ValueError(f"cannot be decompressed: {reason(error)}") from error
    return array


def read_manifest(store: Path) -> dict[str, PreparedCase]:
    """The cases by identifier; of a case written twice the last line counts, and a torn last line is passed over.

    Raises:
        DataError: Another line is damaged.
    """
    path = store / MANIFEST
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")
    cases: dict[str, PreparedCase] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            case = PreparedCase.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path} is damaged in line {number}; delete the file and run vlm3d prepare again: it is rebuilt"
            ) from error
        cases[case.case_id] = case
    return cases


def read_case(folder: Path) -> PreparedCase | None:
    """The case in a folder if it is whole, by its file sizes; else None."""
    try:
        case = PreparedCase.from_json((folder / CASE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return case if case.case_id == folder.name and not missing_bytes(folder, case) else None


def missing_bytes(folder: Path, case: PreparedCase) -> str:
    """What is wrong with the sizes of a case's files, in words; empty if nothing is."""
    for name in ARRAYS:
        path = array_path(folder, name)
        wanted = case.files[name]["bytes"]
        found = path.stat().st_size if path.is_file() else None
        if found != wanted:
            return (
                f"{path.name} is missing" if found is None else f"{path.name} has {found} of {wanted} bytes"
            )
    return ""


def wrong_checksum(folder: Path, case: PreparedCase) -> str:
    """Which file of a case does not have its checksum, in words; empty if all have."""
    for name in ARRAYS:
        path = array_path(folder, name)
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            return f"{path.name} cannot be read: {reason(error)}"
        if found != case.files[name]["sha256"]:
            return f"{path.name} does not have its checksum"
    return ""


def write_manifest(store: Path, cases: Iterable[PreparedCase]) -> None:
    """Replace the manifest, sorted by case.

    Raises:
        OutputError: It cannot be written.
    """
    ordered = sorted(cases, key=lambda case: case.case_id)
    write_atomically(store / MANIFEST, "".join(case.to_json() + "\n" for case in ordered))


def read_failed(store: Path) -> dict[str, str]:
    """Case -> why it could not be prepared."""
    path = store / FAILED
    if not path.is_file():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return {line["case_id"]: line["reason"] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged; delete it and run vlm3d prepare again") from error


def write_failed(store: Path, failed: Mapping[str, str]) -> None:
    """Replace the list of cases that could not be prepared.

    Raises:
        OutputError: It cannot be written.
    """
    lines = [
        json.dumps({"case_id": case_id, "reason": failed[case_id]}, ensure_ascii=False) + "\n"
        for case_id in sorted(failed)
    ]
    write_atomically(store / FAILED, "".join(lines))


def compressed(array_DHW: NDArray[Any]) -> bytes:
    """One array as the store keeps it, the same bytes each time: several threads would order blocks as they finish."""
    layout = {
        "chunks": tuple(min(side, size) for side, size in zip(CHUNK_DHW, array_DHW.shape, strict=True)),
        "blocks": tuple(min(side, size) for side, size in zip(BLOCK_DHW, array_DHW.shape, strict=True)),
        "cparams": blosc2.CParams(codec=_CODEC, clevel=_LEVEL, filters=[_FILTER], nthreads=1),
    }
    if array_DHW.any():
        stored = blosc2.empty(array_DHW.shape, array_DHW.dtype, contiguous=True, **layout)
        stored[...] = array_DHW  # one call, where asarray would walk through the chunks in Python
    else:
        stored = blosc2.zeros(array_DHW.shape, array_DHW.dtype, **layout)
    frame: bytes = stored.to_cframe()
    return frame
