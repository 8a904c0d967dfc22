"""A prepared store as the truth of its cases: labels, reports, and lesions on the model's grid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from vlm3d.datasets.prepared import PreparedArrays, PreparedDataset
from vlm3d.datasets.store import PreparedCase
from vlm3d.evaluation.case_findings import CaseFindings, FindingsSource, LesionMasks
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.volume import Volume


def read_store(folder: Path, splits: Sequence[str] | None = None) -> FindingsSource:
    """The truth of a prepared store; its masks and scans are read when a case's turn comes.

    Args:
        folder: Written by ``vlm3d prepare``.
        splits: Only cases of these; None takes all.

    Raises:
        DataError: The folder is no store, or its manifest is damaged.
    """
    dataset = PreparedDataset(folder, splits)
    cases = {case.case_id: truth_of(dataset, index) for index, case in enumerate(dataset.cases)}
    return FindingsSource(folder.name, cases, frozenset(LESION_KEYS))


def truth_of(dataset: PreparedDataset, index: int) -> CaseFindings:
    """What a store knows of one of its cases."""
    case = dataset.cases[index]
    labels_K = None
    if case.labels_K is not None:
        labels_K = np.full(len(DISEASE_NAMES), np.nan)
        labels_K[: len(case.labels_K)] = case.labels_K[: len(DISEASE_NAMES)]
    return CaseFindings(
        case.case_id,
        case.patient_id,
        labels_K,
        case.report,
        partial(_load_masks, dataset, index) if case.scored_lesions else None,
        load_scan=partial(_load_scan, dataset, index),
    )


def masks_in(arrays: PreparedArrays, case: PreparedCase) -> LesionMasks:
    """The annotated lesions of a case that has been read."""
    known = [key for key in LESION_KEYS if key in case.scored_lesions]
    masks = {
        key: (arrays.lesion_bits_DHW >> LESION_KEYS.index(key) & 1).astype(bool)
        for key in known
        if case.lesion_voxels.get(key, 1)
    }
    return LesionMasks(masks, np.array(case.affine) if masks else None, frozenset(known) - frozenset(masks))


def _load_masks(dataset: PreparedDataset, index: int) -> LesionMasks:
    return masks_in(dataset.read(index), dataset.cases[index])


def _load_scan(dataset: PreparedDataset, index: int) -> Volume:
    return Volume(dataset.read(index).hu_DHW, np.array(dataset.cases[index].affine))
