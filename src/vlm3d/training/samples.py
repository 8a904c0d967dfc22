"""What the model makes of a validation case: one picture of its telling slice and one text, the truth beside it.

Arrays are canonical (D superior, H posterior, W left), so a slice is drawn as radiologists look at it: the patient's right
on the left, anterior on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw
from scipy import ndimage

from vlm3d.labels import EXTRA_COLORS, STORED_LESIONS, first_diseases, first_lesions
from vlm3d.training.tracking import Tracker

WINDOWS_HU = {"lung": (-1350.0, 150.0), "soft tissue": (-160.0, 240.0)}
"""Black and white of the two rows of a picture, in HU."""

_LONGEST_PX = 384
_GAP_PX = 6
_TITLE_PX = 16
_INK = (235, 235, 235)


@dataclass(frozen=True)
class CaseSample:
    """One validation case with what the model said.

    Attributes:
        case_id: Names the files.
        hu_DHW: The scan in HU, on the model's grid.
        spacing_mm: Voxel size along (D, H, W).
        true_masks: Lesion key -> bool (D, H, W); a lesion that nobody annotated is missing.
        predicted_masks: The same from the model.
        true_labels_K: 0, 1 or NaN (unknown), a disease each; empty where there are none.
        probabilities_K: The model's; empty where it did not classify.
        true_report: Text, or None.
        predicted_report: Text, or None.
    """

    case_id: str
    hu_DHW: NDArray[Any]
    spacing_mm: tuple[float, float, float]
    true_masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    predicted_masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    true_labels_K: Sequence[float] = ()
    probabilities_K: Sequence[float] = ()
    true_report: str | None = None
    predicted_report: str | None = None


def track_sample(tracker: Tracker, step: int, sample: CaseSample) -> None:
    """Draw and write one case, and give both to the tracker under the case's name."""
    tracker.image(step, sample.case_id, draw_sample(sample))
    tracker.text(step, sample.case_id, sample_text(sample))


def telling_slice(
    true_masks: Mapping[str, NDArray[np.bool_]], predicted_masks: Mapping[str, NDArray[np.bool_]], depth: int
) -> int:
    """The axial slice that shows most of the lesions, each by its own size: a nodule counts like an effusion.

    True lesions decide; where there are none, predicted ones; where there are neither, the middle slice.
    """
    for masks in (true_masks, predicted_masks):
        shown_D = np.zeros(depth)
        for mask_DHW in masks.values():
            area_D = np.count_nonzero(mask_DHW, axis=(1, 2))
            if area_D.any():
                shown_D += area_D / area_D.max()
        if shown_D.any():
            return int(np.argmax(shown_D))
    return depth // 2


def draw_sample(sample: CaseSample) -> NDArray[np.uint8]:
    """The telling slice in the lung and the soft tissue window, truth on the left, prediction on the right.

    Returns:
        uint8 (H', W', 3) with square pixels, titles and a line that names each lesion in its color.
    """
    index = telling_slice(sample.true_masks, sample.predicted_masks, sample.hu_DHW.shape[0])
    _, height_mm, width_mm = (
        size * step for size, step in zip(sample.hu_DHW.shape, sample.spacing_mm, strict=True)
    )
    per_mm = _LONGEST_PX / max(height_mm, width_mm)
    size_px = (max(1, round(width_mm * per_mm)), max(1, round(height_mm * per_mm)))
    rows = []
    for name, window_hu in WINDOWS_HU.items():
        gray = _gray(sample.hu_DHW[index], window_hu, size_px)
        halves = [
            _titled(_outlined(gray, masks, index, size_px), f"{who}, {name}, slice {index}")
            for who, masks in (("truth", sample.true_masks), ("prediction", sample.predicted_masks))
        ]
        gap = np.zeros((halves[0].shape[0], _GAP_PX, 3), np.uint8)
        rows.append(np.concatenate([halves[0], gap, halves[1]], axis=1))
    legend = _legend({**sample.true_masks, **sample.predicted_masks}, rows[0].shape[1])
    return np.concatenate([*rows, legend], axis=0)


def sample_text(sample: CaseSample) -> str:
    """Diseases with truth and probability, lesions with true and predicted volume, and both reports."""
    blocks = [f"Case {sample.case_id}"]
    if len(sample.probabilities_K) or len(sample.true_labels_K):
        blocks.append(_disease_table(sample.true_labels_K, sample.probabilities_K))
    if sample.true_masks or sample.predicted_masks:
        blocks.append(_lesion_table(sample))
    for title, report in (("True report", sample.true_report), ("Predicted report", sample.predicted_report)):
        if report is not None:
            blocks.append(f"--- {title} ---\n{report.strip() or '(empty)'}")
    return "\n\n".join(blocks) + "\n"


def _disease_table(truth_K: Sequence[float], probabilities_K: Sequence[float]) -> str:
    count = max(len(truth_K), len(probabilities_K))
    lines = [f"{'Disease':36}{'truth':>8}{'predicted':>11}"]
    for place, disease in enumerate(first_diseases(count)):
        truth = truth_K[place] if len(truth_K) else float("nan")
        said = "?" if np.isnan(truth) else "yes" if truth >= 0.5 else "no"
        probability = f"{probabilities_K[place]:.2f}" if len(probabilities_K) else "-"
        lines.append(f"{disease.name:36}{said:>8}{probability:>11}")
    return "\n".join(lines)


def _lesion_table(sample: CaseSample) -> str:
    voxel_ml = float(np.prod(sample.spacing_mm)) / 1000
    lines = [f"{'Lesion':36}{'truth':>8}{'predicted':>11}{'Dice':>7}"]
    names = {lesion.key: lesion.name for lesion in first_lesions(len(STORED_LESIONS) + len(EXTRA_COLORS))}
    for key in dict.fromkeys((*sample.true_masks, *sample.predicted_masks)):
        true, predicted = sample.true_masks.get(key), sample.predicted_masks.get(key)
        cells = [
            "?" if mask is None else f"{np.count_nonzero(mask) * voxel_ml:.1f} ml"
            for mask in (true, predicted)
        ]
        dice = "-"
        if true is not None and predicted is not None and (true.any() or predicted.any()):
            total = np.count_nonzero(true) + np.count_nonzero(predicted)
            dice = f"{2 * np.count_nonzero(true & predicted) / total:.2f}"
        lines.append(f"{names.get(key, key):36}{cells[0]:>8}{cells[1]:>11}{dice:>7}")
    return "\n".join(lines)


def _gray(hu_HW: NDArray[Any], window_hu: tuple[float, float], size_px: tuple[int, int]) -> NDArray[np.uint8]:
    low, high = window_hu
    gray = np.clip((hu_HW.astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(gray).resize(size_px, Image.Resampling.BILINEAR))


def _outlined(
    gray_HW: NDArray[np.uint8],
    masks: Mapping[str, NDArray[np.bool_]],
    index: int,
    size_px: tuple[int, int],
) -> NDArray[np.uint8]:
    """The slice in gray with each lesion's inner edge in its color."""
    rgb_HWC = np.repeat(gray_HW[..., None], 3, axis=2)
    for key, mask_DHW in masks.items():
        mask_HW = np.asarray(Image.fromarray(mask_DHW[index].astype(np.uint8)).resize(size_px, 0)) > 0
        rgb_HWC[mask_HW & ~ndimage.binary_erosion(mask_HW)] = _color(key)
    return rgb_HWC


def _titled(rgb_HWC: NDArray[np.uint8], title: str) -> NDArray[np.uint8]:
    picture = Image.new("RGB", (rgb_HWC.shape[1], rgb_HWC.shape[0] + _TITLE_PX))
    picture.paste(Image.fromarray(rgb_HWC), (0, _TITLE_PX))
    draw = ImageDraw.Draw(picture)
    draw.text((4, 2), title, fill=_INK)
    middle = _TITLE_PX + rgb_HWC.shape[0] // 2 - 6
    draw.text((3, middle), "R", fill=_INK)
    draw.text((rgb_HWC.shape[1] - 10, middle), "L", fill=_INK)
    return np.asarray(picture)


def _legend(masks: Mapping[str, Any], width_px: int) -> NDArray[np.uint8]:
    """The lesions' names in their colors, as many lines as they need."""
    names = [key.replace("_", " ") for key in masks]
    lines: list[list[tuple[str, tuple[int, int, int]]]] = [[]]
    used = 4.0
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for key, name in zip(masks, names, strict=True):
        wide = measure.textlength(name) + 12
        if used + wide > width_px and lines[-1]:
            lines.append([])
            used = 4.0
        lines[-1].append((name, _color(key)))
        used += wide
    picture = Image.new("RGB", (width_px, _TITLE_PX * len(lines)))
    draw = ImageDraw.Draw(picture)
    for row, words in enumerate(lines):
        left = 4.0
        for name, color in words:
            draw.text((left, 2 + row * _TITLE_PX), name, fill=color)
            left += draw.textlength(name) + 12
    return np.asarray(picture)


def _color(key: str) -> tuple[int, int, int]:
    """A lesion's color from `vlm3d.labels`."""
    lesions = first_lesions(len(STORED_LESIONS) + len(EXTRA_COLORS))
    color = next((lesion.color for lesion in lesions if lesion.key == key), EXTRA_COLORS[0])
    red, green, blue, *_ = ImageColor.getrgb(color)
    return red, green, blue
