"""What one source says about cases, be it a system's predictions or the truth, wherever it was read from.

Small things are in memory, masks and scans are loaded when a case's turn comes, so that any number of cases fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm3d.errors import InputError, MaskError
from vlm3d.evaluation.case_ids import count, named
from vlm3d.evaluation.official_boxes import LesionBox
from vlm3d.preprocessing.orientation import canonical_view, to_canonical
from vlm3d.volume import Volume, spacing_from_affine

Training = Literal["untrained", "synthetic", "trained"]
"""How the weights behind predictions were trained, as checkpoints state it."""

_SAME_GRID_MM = 0.05


@dataclass(frozen=True)
class LesionMasks:
    """The lesions of one case, on canonical axes (D superior, H posterior, W left).

    Attributes:
        masks: Lesion key -> bool (D, H, W), all on one grid.
        affine: Index (d, h, w, 1) to RAS+ mm; None where no mask is held.
        absent: Lesions known not to be there, that need no array.
        probabilities: Lesion key -> how sure of it each voxel is, where known.
    """

    masks: Mapping[str, NDArray[np.bool_]]
    affine: NDArray[np.float64] | None
    absent: frozenset[str] = frozenset()
    probabilities: Mapping[str, NDArray[np.floating[Any]]] = field(default_factory=dict)

    @property
    def shape_DHW(self) -> tuple[int, ...] | None:
        """The grid's shape, None where no mask is held."""
        return next((mask.shape for mask in self.masks.values()), None)

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Voxel size (D, H, W)."""
        return None if self.affine is None else spacing_from_affine(self.affine)

    @property
    def keys(self) -> frozenset[str]:
        """Lesions of which something is known."""
        return frozenset(self.masks) | self.absent

    def mask(self, key: str, shape_DHW: tuple[int, ...]) -> NDArray[np.bool_]:
        """A lesion's mask; without a voxel where it is absent or not held."""
        return self.masks[key] if key in self.masks else np.zeros(shape_DHW, dtype=bool)

    @classmethod
    def on_grid(
        cls, masks_DHW: Mapping[str, NDArray[Any]], affine: NDArray[np.float64], absent: Iterable[str] = ()
    ) -> LesionMasks:
        """Turn masks from a scan's own axes to the canonical ones."""
        empty = np.zeros((1, 1, 1), dtype=np.uint8)
        canonical = to_canonical(Volume(next(iter(masks_DHW.values()), empty), affine))
        turned = {key: canonical_view(mask_DHW, affine) != 0 for key, mask_DHW in masks_DHW.items()}
        return cls(turned, canonical.affine if masks_DHW else None, frozenset(absent))


def check_same_grid(predicted: LesionMasks, truth: LesionMasks, case_id: str) -> None:
    """Refuse masks that do not lie on each other.

    Raises:
        MaskError: Shapes differ, or corners lie apart; the message names the case.
    """
    a, b = predicted.shape_DHW, truth.shape_DHW
    if a is None or b is None or predicted.affine is None or truth.affine is None:
        return
    if a != b:
        raise MaskError(f"case {case_id}: predicted masks have the grid {a}, true ones {b} (D, H, W)")
    corners = np.array([[0, 0, 0, 1], [*(size - 1 for size in a), 1]], dtype=np.float64).T
    apart_mm = float(np.abs((predicted.affine - truth.affine) @ corners)[:3].max())
    if apart_mm > _SAME_GRID_MM * max(1.0, max(spacing_from_affine(truth.affine))):
        raise MaskError(
            f"case {case_id}: predicted and true masks have one shape but lie {apart_mm:.1f} mm apart; "
            "write the masks with the affine of the scan"
        )


@dataclass(frozen=True)
class CaseFindings:
    """One case; what its source does not speak of is None.

    Attributes:
        case_id: As in `case_ids.case_id_of`.
        patient_id: Intervals are drawn over patients.
        scores_K: Of the 18 diseases: probabilities, or labels of 0 and 1; NaN where unknown.
        report: Text.
        load_masks: Reads the lesions.
        boxes: Lesion key -> boxes, in the challenge's millimeters.
        load_scan: Reads the CT, for pictures only.
    """

    case_id: str
    patient_id: str
    scores_K: NDArray[np.float64] | None = None
    report: str | None = None
    load_masks: Callable[[], LesionMasks] | None = None
    boxes: Mapping[str, tuple[LesionBox, ...]] | None = None
    load_scan: Callable[[], Volume] | None = None

    @property
    def parts(self) -> frozenset[str]:
        """Names of what is known."""
        known = {
            "labels": self.scores_K,
            "reports": self.report,
            "masks": self.load_masks,
            "boxes": self.boxes,
        }
        return frozenset(name for name, value in known.items() if value is not None)


@dataclass(frozen=True)
class FindingsSource:
    """All that one source says.

    Attributes:
        name: What a person calls it: a file's or folder's name.
        cases: By case id.
        lesion_keys: Lesions that it draws anywhere; a predicted case without a file for one of them shows none.
        training: How the weights behind it were trained, where that is known.
        training_note: What a reader must know of these weights, in words.
    """

    name: str
    cases: Mapping[str, CaseFindings]
    lesion_keys: frozenset[str] = frozenset()
    training: Training | None = None
    training_note: str = ""

    @property
    def parts(self) -> frozenset[str]:
        """What it speaks of in any case."""
        return frozenset().union(*(case.parts for case in self.cases.values()))


def merged(sources: Iterable[FindingsSource]) -> FindingsSource:
    """Join the files of one system, such as probabilities in one and reports in another.

    Raises:
        InputError: Two of them speak of the same thing in the same case.
    """
    listed = list(sources)
    if len(listed) == 1:
        return listed[0]
    cases: dict[str, CaseFindings] = {}
    for source in listed:
        twice = [
            case_id
            for case_id, case in source.cases.items()
            if case_id in cases and cases[case_id].parts & case.parts
        ]
        if twice:
            raise InputError(
                f"{source.name} repeats what another file says of {count(len(twice), 'case')}: {named(twice)}"
            )
        for case_id, case in source.cases.items():
            cases[case_id] = _joined(cases[case_id], case) if case_id in cases else case
    return FindingsSource(
        " + ".join(source.name for source in listed),
        cases,
        frozenset().union(*(source.lesion_keys for source in listed)),
        least_trained(source.training for source in listed),
        " ".join(dict.fromkeys(source.training_note for source in listed if source.training_note)),
    )


def least_trained(statuses: Iterable[str | None]) -> Training | None:
    """The status that a person must be warned of where several were stated."""
    stated = set(statuses)
    order: tuple[Training, ...] = ("untrained", "synthetic", "trained")
    return next((status for status in order if status in stated), None)


def _joined(first: CaseFindings, second: CaseFindings) -> CaseFindings:
    own_patient = first.patient_id if first.patient_id != first.case_id else second.patient_id
    fields = ("scores_K", "report", "load_masks", "boxes", "load_scan")
    found = {name: getattr(second, name) for name in fields if getattr(first, name) is None}
    return replace(first, patient_id=own_patient, **found)
