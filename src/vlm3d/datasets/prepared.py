"""Read a store of prepared scans: in crops, which is what training sees, or a case as a scan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlm3d.config import PreprocessingConfig
from vlm3d.datasets.fingerprint import AnatomyMode, Fingerprint, read_fingerprint, refuse_other
from vlm3d.datasets.store import (
    ARRAYS,
    CASE,
    CASES,
    Box,
    PreparedCase,
    array_path,
    missing_bytes,
    read_array,
    read_case,
    read_manifest,
    wrong_checksum,
)
from vlm3d.errors import DataError, UnreadableFileError
from vlm3d.io.geometry import normalize_affine
from vlm3d.io.hounsfield import checked_hounsfield
from vlm3d.io.limits import check_scan_size
from vlm3d.io.wording import shown
from vlm3d.labels import STORED_LESION_KEYS
from vlm3d.volume import RegionMap, Volume

Verify = Literal["none", "sizes", "sha256"]


@dataclass(frozen=True)
class PreparedArrays:
    """A case, or a box of it, in memory.

    Attributes:
        hu_DHW: int16 HU, canonical axes.
        regions_DHW: uint8 region ids on the same grid; 0 everywhere if the case has no regions.
        lesion_bits_DHW: uint8; bit l is the l-th of `vlm3d.labels.STORED_LESION_KEYS`. `lesion_masks` unpacks it.
    """

    hu_DHW: NDArray[np.int16]
    regions_DHW: NDArray[np.uint8]
    lesion_bits_DHW: NDArray[np.uint8]


def lesion_masks(
    bits_DHW: NDArray[np.uint8], known: Iterable[str], keys: Sequence[str] = STORED_LESION_KEYS
) -> NDArray[np.int8]:
    """Unpack lesion masks.

    Args:
        bits_DHW: As in `PreparedArrays`.
        known: Lesions that were annotated, as in `PreparedCase.known_lesions`.
        keys: Lesions wanted, in this order; one that is not of `STORED_LESION_KEYS` is unknown.

    Returns:
        (L, D, H, W): 1 lesion, 0 none, -1 unknown.
    """
    known = set(known)
    masks_LDHW = np.full((len(keys), *bits_DHW.shape), -1, np.int8)
    for mask_DHW, key in zip(masks_LDHW, keys, strict=True):
        if key in known and key in STORED_LESION_KEYS:
            np.bitwise_and(bits_DHW >> STORED_LESION_KEYS.index(key), 1, out=mask_DHW, casting="unsafe")
    return masks_LDHW


class PreparedDataset:
    """The prepared scans of some splits, by number.

    Nothing stays open between reads, so that it can be pickled, forked and shared among threads.

    Args:
        store: Folder that ``vlm3d prepare`` wrote.
        splits: Only cases of these; None takes all, also those without a split.
        verify: Checked when a case is first read: nothing, its files' sizes, or their checksums.

    Raises:
        DataError: The folder is no store, or its manifest is damaged.
    """

    def __init__(
        self, store: str | Path, splits: Sequence[str] | None = ("train",), *, verify: Verify = "sizes"
    ) -> None:
        self.store = Path(store)
        self.fingerprint: Fingerprint = read_fingerprint(self.store)
        self.verify = verify
        found = read_manifest(self.store).values()
        self.cases: tuple[PreparedCase, ...] = tuple(
            case for case in found if splits is None or case.split in splits
        )
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return len(self.cases)

    def some_of_patients(self, count: int) -> PreparedDataset:
        """At most so many of these cases, patient by patient, drawn at random but the same in every run.

        A store's cases are sorted by name, so its first ones would be of one source, or reconstructions of one scan.
        """
        by_patient: dict[str, list[PreparedCase]] = {}
        for case in self.cases:
            by_patient.setdefault(case.patient_id, []).append(case)
        patients = sorted(by_patient)
        order = np.random.default_rng(0).permutation(len(patients))
        chosen = [case for place in order for case in by_patient[patients[place]]][:count]
        part = copy(self)
        part.cases, part._verified = tuple(chosen), set()
        return part

    def check(self, expected: PreprocessingConfig, anatomy: AnatomyMode | None = None) -> None:
        """Refuse a store that was not prepared as a model needs it.

        Args:
            expected: The model's preprocessing.
            anatomy: Where regions must come from; None takes any.

        Raises:
            ConfigError: Names both fingerprints and what differs.
        """
        wanted = Fingerprint(expected, self.fingerprint.anatomy if anatomy is None else anatomy)
        refuse_other(self.store, self.fingerprint, wanted)

    def read(self, index: int, box: Box | None = None) -> PreparedArrays:
        """Read a case, or only what lies in a box.

        Args:
            index: Of `cases`.
            box: Start and stop along (D, H, W), within the case's shape; None reads all.

        Raises:
            DataError: A file of the case is missing or damaged; the message names the case.
            ValueError: The box reaches beyond the case.
        """
        case = self.cases[index]
        if box is not None and not all(
            0 <= start < stop <= size for (start, stop), size in zip(box, case.shape_DHW, strict=True)
        ):
            raise ValueError(f"box {box} does not lie in the shape {case.shape_DHW} of case {case.case_id}")
        if index not in self._verified:
            self._raise_damaged(case, self.damage(index))
            self._verified.add(index)
        arrays = {}
        for name, dtype in ARRAYS.items():
            path = array_path(self._folder(case), name)
            try:
                arrays[name] = read_array(path, case.shape_DHW, dtype, box)
            except ValueError as error:
                self._raise_damaged(case, f"{path.name} {error}")
        return PreparedArrays(arrays["image"], arrays["regions"], arrays["lesions"])

    def damage(self, index: int) -> str:
        """What is wrong with a case's files, as far as ``verify`` looks, in words; empty if nothing is."""
        case = self.cases[index]
        folder = self._folder(case)
        if self.verify == "none":
            return ""
        return missing_bytes(folder, case) or (
            wrong_checksum(folder, case) if self.verify == "sha256" else ""
        )

    def _folder(self, case: PreparedCase) -> Path:
        return self.store / CASES / case.case_id

    def _raise_damaged(self, case: PreparedCase, damage: str) -> None:
        if damage:
            raise DataError(
                f"case {case.case_id} of {self.store} is damaged: {damage}; delete its folder and run vlm3d prepare again"
            )


def is_prepared_case(path: str | Path) -> bool:
    """Whether a folder is a case of a store."""
    return (Path(path) / CASE).is_file()


def read_prepared_case(folder: str | Path) -> tuple[Volume, RegionMap | None]:
    """A case of a store as a scan in HU on the store's grid, with its regions.

    Raises:
        UnreadableFileError: A file of it is missing or damaged.
    """
    folder = Path(folder)
    case = read_case(folder)
    if case is None:
        raise UnreadableFileError(f"{shown(folder)} is no whole prepared case: prepare it anew")
    try:
        check_scan_size(shown(folder), case.shape_DHW, case.spacing_mm)
        affine = normalize_affine(np.array(case.affine), case.shape_DHW, shown(folder))
        hu_DHW, regions_DHW = (
            read_array(array_path(folder, name), case.shape_DHW, ARRAYS[name], None)
            for name in ("image", "regions")
        )
    except ValueError as error:
        raise UnreadableFileError(f"{shown(folder)} is damaged: {error}") from error
    regions = None if case.regions_method is None else RegionMap(regions_DHW, affine, case.regions_method)
    return checked_hounsfield(Volume(hu_DHW, affine, source=case.case_id, notes=case.notes)), regions
