"""One seed becomes one phantom: a patient, findings, a scanner, the truth and a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.datasets.phantom.anatomy import build_anatomy
from vlm3d.datasets.phantom.chest_signs import heart_size
from vlm3d.datasets.phantom.cohort import PAINTERS, as_specs, sample_findings
from vlm3d.datasets.phantom.frame import Canvas, Frame
from vlm3d.datasets.phantom.patient import sample_patient
from vlm3d.datasets.phantom.pose import sample_pose
from vlm3d.datasets.phantom.reports import ReportText, write_report
from vlm3d.datasets.phantom.scanner import paint_table, protocol_of, sample_scanner, scan
from vlm3d.datasets.phantom.truth import (
    FindingSpec,
    FindingTruth,
    Landmarks,
    Painted,
    lesion_masks,
    measure,
    names,
    still_visible,
)
from vlm3d.labels import DISEASE_NAMES, IMPLIED
from vlm3d.volume import RegionMap, Volume

DEFAULT_SPACING_MM = (3.0, 1.5, 1.5)
BODY_WIDTH_MM = 390.0  # of the reference body
SCAN_BOTTOM_MM, SCAN_TOP_MM = -205.0, 115.0  # from the carina


@dataclass(frozen=True)
class Phantom:
    """A procedural chest CT with everything that is true of it.

    Attributes:
        seed: It was made from.
        volume: int16 HU, axes to superior, posterior, left.
        regions: All 20 regions of `vlm3d.anatomy.regions` that the patient has in view.
        lesion_masks: Lesion key -> bool mask; all keys of `vlm3d.labels.STORED_LESIONS`, empty where there is none.
        disease_labels: (18,) float32 of 0 and 1, in CT-RATE's order.
        truth: Every painted piece.
        report: Findings, impression and recommendations, in words.
        patient: Facts that shaped it, such as sex, contrast phase and kernel.
        settings: What it was asked for: ``spacing_mm``, ``protocol``, ``prevalence_scale``.
    """

    seed: int
    volume: Volume
    regions: RegionMap
    lesion_masks: dict[str, NDArray[np.bool_]]
    disease_labels: NDArray[np.float32]
    truth: list[FindingTruth]
    report: ReportText
    patient: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


def generate_phantom(
    seed: int,
    *,
    spacing_mm: tuple[float, float, float] = DEFAULT_SPACING_MM,
    findings: Mapping[str, Any] | None = None,
    protocol: str | None = None,
    prevalence_scale: float = 1.0,
) -> Phantom:
    """Make a procedural chest CT.

    Args:
        seed: The same seed, spacing and findings give the same phantom, bit for bit.
        spacing_mm: Voxel size along (D, H, W).
        findings: Disease name -> severity 0..1, True, or a `FindingSpec`; None draws them as a hospital would see them;
            an empty mapping makes a patient without findings.
        protocol: None for the scanners of `scanner.DEFAULT_PROTOCOL`; ``"shifted"`` for those of `SHIFTED_PROTOCOL`,
            whose kernels, noise and motion the default never draws.
        prevalence_scale: How many times as often as in a hospital each finding is drawn, up to three in five patients.

    Raises:
        ValueError: A finding or protocol is unknown, or a spacing or scale is not above zero.
    """
    if not all(side > 0 for side in spacing_mm):
        raise ValueError(f"spacing_mm must be above zero, got {spacing_mm}")
    ranges = protocol_of(protocol)
    sequence = np.random.SeedSequence(seed)
    for_case, for_body, for_painters, for_scanner, for_report, for_pose = sequence.spawn(6)
    case_rng = np.random.default_rng(for_case)
    specs = sample_findings(case_rng, prevalence_scale) if findings is None else as_specs(findings)
    enlarged = specs.get("Cardiomegaly")
    patient = sample_patient(
        case_rng, heart_scale=None if enlarged is None else 1.14 + 0.22 * enlarged.severity
    )
    scanner_rng = np.random.default_rng(for_scanner)
    scanner = sample_scanner(scanner_rng, BODY_WIDTH_MM * patient.scale_zyx[2], ranges)
    pose = sample_pose(np.random.default_rng(for_pose), ranges.tilt_deg)
    frame = _frame(spacing_mm, scanner.field_of_view_mm, scanner.offset_mm, patient.scale_zyx[0])
    anatomy = build_anatomy(frame, patient, for_body, pose)
    canvas = anatomy.canvas
    landmarks = Landmarks.of(canvas)
    pieces = _paint_findings(canvas, specs, for_painters)
    if enlarged is not None:
        pieces.update({"Cardiomegaly": heart_size(canvas)})
    paint_table(canvas, scanner, _back_mm(canvas))
    voxels_DHW = scan(canvas, scanner, scanner_rng)
    masks = lesion_masks(pieces, canvas.frame.shape_DHW)
    pieces = {name: still_visible(painted, masks) for name, painted in pieces.items()}
    truth = [
        measure(canvas, landmarks, piece, specs[name].severity)
        for name in DISEASE_NAMES
        for piece in pieces.get(name, [])
    ]
    labeled = names(truth) | {IMPLIED[name] for name in names(truth) if name in IMPLIED}
    affine = _affine(frame)
    return Phantom(
        seed=seed,
        volume=Volume(voxels_DHW, affine, source=f"phantom seed {seed}", acquisition={"modality": "CT"}),
        regions=RegionMap(canvas.regions_DHW, affine, "phantom"),
        lesion_masks=masks,
        disease_labels=np.array([name in labeled for name in DISEASE_NAMES], np.float32),
        truth=truth,
        report=write_report(truth, rng=np.random.default_rng(for_report)),
        patient={
            "sex": patient.sex,
            "contrast": patient.contrast,
            "arms": patient.arms,
            "kernel": scanner.kernel,
            "protocol": protocol or "default",
            "pose_deg": {"pitch": pose.pitch_deg, "roll": pose.roll_deg, "yaw": pose.yaw_deg},
            "motion": [
                name
                for name, moves in (("heart", scanner.heart_shift_mm), ("breath", scanner.breath_mm))
                if moves
            ],
        },
        settings=settings_of(spacing_mm, protocol, prevalence_scale),
    )


def settings_of(
    spacing_mm: tuple[float, float, float], protocol: str | None, prevalence_scale: float
) -> dict[str, Any]:
    """What a phantom was asked for beside its seed and findings, as JSON values."""
    return {
        "spacing_mm": [float(side) for side in spacing_mm],
        "protocol": protocol or "default",
        "prevalence_scale": float(prevalence_scale),
    }


def _frame(
    spacing_mm: tuple[float, float, float], field_mm: float, offset_mm: tuple[float, float], height: float
) -> Frame:
    """The grid: from below the diaphragm to the shoulders, and the scanner's field of view in the plane."""
    bottom, top = SCAN_BOTTOM_MM * height, SCAN_TOP_MM * height
    depth = max(8, round((top - bottom) / spacing_mm[0]))
    rows, columns = (max(32, round(field_mm / side)) for side in spacing_mm[1:])
    origin = (
        bottom,
        offset_mm[0] + 10.0 - spacing_mm[1] * (rows - 1) / 2,
        offset_mm[1] - spacing_mm[2] * (columns - 1) / 2,
    )
    return Frame.regular((depth, rows, columns), spacing_mm, origin)


def _paint_findings(
    canvas: Canvas, specs: Mapping[str, FindingSpec], sequence: np.random.SeedSequence
) -> dict[str, list[Painted]]:
    """Each painter draws from its own child, so that adding a finding leaves the others alone."""
    pieces: dict[str, list[Painted]] = {}
    for child, (name, painter) in zip(sequence.spawn(len(PAINTERS)), PAINTERS.items(), strict=True):
        if name in specs:
            pieces[name] = painter(canvas, np.random.default_rng(child), specs[name])
    return pieces


def _back_mm(canvas: Canvas) -> float:
    """y of the lowest skin, on which the couch lies."""
    rows = np.flatnonzero((canvas.regions_DHW == REGION_IDS["body_wall"]).any(axis=(0, 2)))
    return float(canvas.frame.y_H[rows[-1]] if len(rows) else canvas.frame.y_H[-1])


def _affine(frame: Frame) -> NDArray[np.float64]:
    """(d, h, w) to RAS+ mm: d to superior, h to posterior (-A), w to left (-R)."""
    step = frame.step_mm
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = step[0], -step[1], -step[2], 1.0
    affine[:3, 3] = (-float(frame.x_W[0]), -float(frame.y_H[0]), float(frame.z_D[0]))
    return np.round(affine, 4)
