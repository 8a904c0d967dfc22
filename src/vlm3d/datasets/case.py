"""What every data source delivers: a light description of a case, and its data once they are read.

A `Case` is small and picklable, so that a list of hundreds of thousands goes to worker processes as it is. Its ``load``
is a module-level function bound to paths (``functools.partial``), never a closure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm3d.volume import RegionMap, Volume

Split = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class CaseData:
    """One case read from disk or made from a seed.

    Attributes:
        volume: The scan in HU, on any axes.
        regions: Its anatomical regions on the scan's grid and axes, or None.
        lesion_masks: Lesion key -> bool mask on the scan's grid and axes. A key that is missing was not annotated; a mask
            without a voxel says that the lesion is not there.
        annotated_DHW: Where masks say anything, as a bool mask on the scan's grid and axes; None is everywhere.
        labels_K: As in `Case`, where only reading tells them (a phantom's); None leaves the case's own.
        report: As in `Case`; None leaves the case's own.
        report_is_synthetic: As in `Case`; None leaves the case's own.
        facts: As in `Case`; None leaves the case's own.
    """

    volume: Volume
    regions: RegionMap | None = None
    lesion_masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    annotated_DHW: NDArray[np.bool_] | None = None
    labels_K: tuple[float, ...] | None = None
    report: str | None = None
    report_is_synthetic: bool | None = None
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Case:
    """One scan of a data set, not yet read.

    Attributes:
        case_id: Unique in its data set; letters, digits, ``_ . -`` only, since it names files.
        patient_id: All scans of a patient share it; splits are made by it.
        source: Of `vlm3d.datasets`: ``"ct_rate"``, ``"npz"``, ``"omniabnorm"``, ``"phantom"``.
        load: Reads the case; raises a `VLM3DError` with one clear line if it cannot.
        split: As the source says, or None until `vlm3d.datasets.splits` has decided.
        labels_K: 0, 1 or NaN (unknown) for each of the 18 diseases, or None where there are none.
        report: Text, or None.
        report_is_synthetic: True where the text was written from labels, masks and locations.
        facts: What else is known, as JSON values (such as a phantom's findings with lobe, side and size).
    """

    case_id: str
    patient_id: str
    source: str
    load: Callable[[], CaseData]
    split: Split | None = None
    labels_K: tuple[float, ...] | None = None
    report: str | None = None
    report_is_synthetic: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def described_by(self, data: CaseData) -> Case:
        """The case with what its data say about labels, report and facts, where they say it."""
        told = {name: getattr(data, name) for name in ("labels_K", "report", "report_is_synthetic", "facts")}
        return replace(self, **{name: value for name, value in told.items() if value is not None})
