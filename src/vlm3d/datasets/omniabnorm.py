"""OmniAbnorm-CT: key slices with four neighbors on each side, a mask and a text for each abnormality.

```
FOLDER/*.json   {"<id>": {"image": folder, "context": [-4 … 4], "mask": folder, "abnormality": [
                    {"id", "group_id", "label", "category": […], "description", "rewritten_findings": […]}, …]}, …}
<image>/<n>.jpeg or .jpg     gray slices, 0 is the key slice
<mask>/<abnormality id>.jpeg or .jpg    of the key slice
```

Each key slice becomes a small volume of up to nine slices. The pictures hold a window of HU that nobody wrote down, and
no voxel size: both come from the JSON entry (``window_hu``, ``spacing_mm``), from the specification, or are assumed, and
the volume's notes say which. Only findings that are marked are known: all other diseases are unknown, not absent; and
their masks cover the key slice alone (``CaseData.annotated_DHW``).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vlm3d.datasets.case import Case, CaseData, Split
from vlm3d.datasets.join_summary import JoinSummary
from vlm3d.datasets.omniabnorm_categories import CategoryTable, lesion_of
from vlm3d.datasets.spec import SPLITS, as_split, parse_spec
from vlm3d.datasets.splits import check_unique_ids
from vlm3d.errors import ConfigError, DataError
from vlm3d.io.geometry import LPS_TO_RAS
from vlm3d.labels import DISEASE_NAMES
from vlm3d.volume import Volume

logger = logging.getLogger(__name__)

KIND = "omniabnorm"
OPTIONS = ("split", "window", "spacing", "keep")
DEFAULT_WINDOW_HU = (-1350.0, 150.0)
"""The usual lung window, center -600, width 1500."""
DEFAULT_SPACING_MM = (5.0, 0.75, 0.75)
"""A common thick-slice chest series; assumed, with a note."""

_CONTEXT = range(-4, 5)
_MASK_ABOVE = 127
_SUFFIXES = (".jpeg", ".jpg", ".png")
_PROBE_BYTES = 4096
_LARGEST_PICTURE = 4096
_WINDOW = re.compile(r"(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class SliceStack:
    """Where the pictures of one case lie.

    Attributes:
        image_folder: Of the slices.
        offsets: Slices that there should be, from the key slice, in ascending order.
        mask_files: Lesion key -> pictures of its abnormalities on the key slice.
        window_hu: HU that gray values 0 and 255 stand for.
        spacing_mm: Voxel size along (D, H, W).
        assumed: What of the two was assumed.
    """

    image_folder: Path
    offsets: tuple[int, ...]
    mask_files: Mapping[str, tuple[Path, ...]]
    window_hu: tuple[float, float]
    spacing_mm: tuple[float, float, float]
    assumed: tuple[str, ...] = ()


def find_omniabnorm_cases(spec: str) -> list[Case]:
    """The key slices of an OmniAbnorm-CT folder; names that the table does not know are counted and logged.

    Args:
        spec: ``omniabnorm:FOLDER[:split=train,window=-1350..150,spacing=5x0.75x0.75,keep=all]``. Without ``keep=all``,
            only slices with a finding among the 18 are kept: most of the data set is not of the chest.

    Raises:
        ConfigError: The specification cannot be read.
        DataError: There is no annotation file, or one cannot be read.
    """
    parsed = parse_spec(spec, KIND, OPTIONS)
    folder = Path(parsed.target)
    annotations = find_annotation_files(folder)
    if not annotations:
        raise DataError(f"{folder} holds no OmniAbnorm-CT: no JSON of images with abnormalities in it")
    if parsed.options.get("keep", "ours") not in ("ours", "all"):
        raise ConfigError(f"'{spec}': keep is 'ours' or 'all', got '{parsed.options['keep']}'")
    keep_all = parsed.options.get("keep") == "all"
    defaults = _stated(parsed.options.get("window"), parsed.options.get("spacing"), spec)
    table = CategoryTable.of_folder(folder)
    summary = JoinSummary()
    cases = []
    for path in annotations:
        entries = _read_json(path)
        split = as_split(parsed) or _split_in_name(path.stem)
        for key, entry in entries.items():
            case = _case(str(key), entry, folder, split, defaults, table, summary)
            if case is not None and (keep_all or any(value == 1 for value in case.labels_K or ())):
                cases.append(case)
            elif case is not None:
                summary.note("images without a finding among the 18, left out", [str(key)])
    check_unique_ids(cases)
    summary.counts = {"cases": len(cases), "annotation files": len(annotations)}
    summary.log(logger, parsed.target)
    return cases


def find_annotation_files(folder: Path) -> list[Path]:
    """The JSON files of a folder that look like OmniAbnorm-CT's, told by their beginning."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with path.open("rb") as file:
            head = file.read(_PROBE_BYTES)
        if all(word in head for word in (b'"image"', b'"mask"')) and (
            b'"abnormality"' in head or b'"context"' in head
        ):
            found.append(path)
    return found


def load_omniabnorm(stack: SliceStack, name: str) -> CaseData:
    """Read the slices as a volume, and the masks of the key slice.

    Raises:
        DataError: The key slice or a mask is missing, is no picture, or is of another size.
    """
    pictures = {offset: _picture(stack.image_folder, str(offset)) for offset in stack.offsets}
    key_HW = pictures.get(0)
    if key_HW is None:
        raise DataError(f"{name} has no key slice: no 0.jpeg or 0.jpg in its image folder")
    slices, missing = [], []
    for offset in sorted(pictures):
        slice_HW = pictures[offset]
        if slice_HW is None:
            missing.append(offset)
        elif slice_HW.shape != key_HW.shape:
            raise DataError(f"{name}: slice {offset} is {slice_HW.shape}, its key slice {key_HW.shape}")
        else:
            slices.append((offset, slice_HW))
    kept = _around_key(slices)
    low, high = stack.window_hu
    gray_DHW = np.stack([slice_HW for _, slice_HW in kept])
    voxels_DHW = np.rint(gray_DHW * np.float32((high - low) / 255) + np.float32(low)).astype(np.int16)
    depth, height, width = stack.spacing_mm
    affine = LPS_TO_RAS @ np.array([[0, 0, width, 0], [0, height, 0, 0], [depth, 0, 0, 0], [0, 0, 0, 1.0]])
    notes = [f"gray values 0..255 taken as {low:g}..{high:g} HU; axes taken as Superior, Posterior, Left"]
    notes += [f"{what} assumed: the data set does not tell it" for what in stack.assumed]
    if len(kept) < len(stack.offsets):
        notes.append(f"{len(kept)} of {len(stack.offsets)} slices are there ({len(missing)} missing)")
    volume = Volume(voxels_DHW, affine, source=name, notes=tuple(notes), acquisition={"modality": "CT"})
    key_index = next(index for index, (offset, _) in enumerate(kept) if offset == 0)
    masks = {}
    for lesion, files in stack.mask_files.items():
        mask_DHW = np.zeros(volume.shape_DHW, bool)
        for file in files:
            mask_DHW[key_index] |= _mask(file, key_HW.shape, name)
        masks[lesion] = mask_DHW
    annotated_DHW = np.zeros(volume.shape_DHW, bool)
    annotated_DHW[key_index] = True
    return CaseData(volume=volume, lesion_masks=masks, annotated_DHW=annotated_DHW)


def _case(
    key: str,
    entry: Any,
    folder: Path,
    split: Split | None,
    defaults: Mapping[str, tuple[float, ...]],
    table: CategoryTable,
    summary: JoinSummary,
) -> Case | None:
    """One entry of the annotation file, or None where it is unusable (counted)."""
    try:
        image_folder, mask_folder = (_inside(folder, str(entry[name])) for name in ("image", "mask"))
        abnormalities = [dict(item) for item in entry.get("abnormality", [])]
        offsets = tuple(sorted({int(number) for number in entry.get("context", _CONTEXT)} | {0}))
        window, spacing, assumed = _grid(entry, defaults)
        plane = str(entry.get("plane", "axial")).lower()
    except (KeyError, TypeError, ValueError, AttributeError):
        summary.note("entries without image, mask, usable context, window or spacing, left out", [key])
        return None
    if not plane.startswith(("ax", "trans")):
        summary.note("images that are not axial, left out", [key])
        return None
    labels, mask_files, findings = _findings(abnormalities, mask_folder, table, summary)
    stack = SliceStack(
        image_folder,
        offsets,
        mask_files,
        window,
        spacing,
        assumed,
    )
    name = f"omniabnorm_{re.sub(r'[^A-Za-z0-9_.-]', '_', key)}"
    patient = entry.get("patient_id", entry.get("study_id", entry.get("case_id")))
    return Case(
        case_id=name,
        patient_id=name if patient is None else f"omniabnorm_{patient}",
        source=KIND,
        load=partial(load_omniabnorm, stack, name),
        split=split,
        labels_K=labels,
        report=finding_text(abnormalities),
        facts={"findings": findings},
    )


def _findings(
    abnormalities: Sequence[Mapping[str, Any]], mask_folder: Path, table: CategoryTable, summary: JoinSummary
) -> tuple[tuple[float, ...], dict[str, tuple[Path, ...]], list[dict[str, Any]]]:
    """What an image's abnormalities say: labels, mask pictures by lesion, and each finding as a fact."""
    labels = [math.nan] * len(DISEASE_NAMES)
    mask_files: dict[str, list[Path]] = {}
    findings: list[dict[str, Any]] = []
    for item in abnormalities:
        names = [*_texts(item.get("category")), *_texts(item.get("label"))]
        disease = table.disease_of(names)
        if disease is None:
            summary.note(
                "abnormalities of a category that the table does not know", names[-1:] or ["(unnamed)"]
            )
        if disease:
            labels[DISEASE_NAMES.index(disease)] = 1.0
            lesion = lesion_of(disease, names)
            if lesion is not None:
                mask_files.setdefault(lesion, []).append(mask_folder / str(item.get("id", "")))
        findings.append(
            {"label": " / ".join(names), "disease": disease or None, "group": str(item.get("group_id", ""))}
        )
    return tuple(labels), {lesion: tuple(files) for lesion, files in mask_files.items()}, findings


def finding_text(abnormalities: Sequence[Mapping[str, Any]]) -> str | None:
    """The annotators' words as a report: one description a group, or its first rewritten form, or its label.

    Returns:
        "Findings: …", or None where nobody wrote a word.
    """
    said: dict[str, str] = {}
    for place, item in enumerate(abnormalities):
        group = str(item.get("group_id", f"#{place}"))
        texts = [
            *_texts(item.get("description")),
            *_texts(item.get("rewritten_findings")),
            *_texts(item.get("label")),
        ]
        if texts and group not in said:
            said[group] = texts[0].rstrip(".") + "."
    sentences = dict.fromkeys(said.values())
    return f"Findings: {' '.join(sentences)}" if sentences else None


def _texts(value: Any) -> list[str]:
    """A string or a list of strings without empty ones, each on one line."""
    items = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    texts = [" ".join(str(item).split()) for item in items]
    return [text for text in texts if text]


def _grid(
    entry: Mapping[str, Any], defaults: Mapping[str, tuple[float, ...]]
) -> tuple[tuple[float, float], tuple[float, float, float], tuple[str, ...]]:
    """Window and spacing of an entry, and which of the two were assumed."""
    low, high = entry.get("window_hu", defaults.get("window", DEFAULT_WINDOW_HU))
    depth, height, width = entry.get("spacing_mm", defaults.get("spacing", DEFAULT_SPACING_MM))
    spacing = (float(depth), float(height), float(width))
    if not float(low) < float(high) or not all(0 < side < 50 for side in spacing):
        raise ValueError("an impossible window or spacing")
    assumed = []
    if "window_hu" not in entry and "window" not in defaults:
        assumed.append(f"a window of {low:g}..{high:g} HU")
    if "spacing_mm" not in entry and "spacing" not in defaults:
        assumed.append(f"a voxel size of {depth:g} x {height:g} x {width:g} mm")
    return (float(low), float(high)), spacing, tuple(assumed)


def _stated(window: str | None, spacing: str | None, spec: str) -> dict[str, tuple[float, ...]]:
    """What the specification says of window and spacing."""
    stated: dict[str, tuple[float, ...]] = {}
    if window is not None:
        match = _WINDOW.fullmatch(window)
        if match is None or float(match[1]) >= float(match[2]):
            raise ConfigError(f"'{spec}': window is LOW..HIGH in HU, such as -1350..150, got '{window}'")
        stated["window"] = (float(match[1]), float(match[2]))
    if spacing is not None:
        try:
            sides = tuple(float(side) for side in spacing.split("x"))
        except ValueError:
            sides = ()
        if len(sides) != 3 or not all(0 < side < 50 for side in sides):
            raise ConfigError(f"'{spec}': spacing is DxHxW in mm, such as 5x0.75x0.75, got '{spacing}'")
        stated["spacing"] = sides
    return stated


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name} is no JSON: download it again") from error
    if not isinstance(entries, dict):
        raise DataError(
            f"{path.name} holds a {type(entries).__name__}; OmniAbnorm-CT's files hold entries by identifier"
        )
    return entries


def _split_in_name(stem: str) -> Split | None:
    words = re.split(r"[^a-z]+", stem.lower())
    for split in SPLITS:
        if split in words or (split == "valid" and {"val", "validation"} & set(words)):
            return split
    return None


def _inside(folder: Path, told: str) -> Path:
    """A path of the annotation file, which may not lead out of the data set's folder.

    Absolute paths of another machine are looked for by their ends.
    """
    parts = [part for part in told.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise ValueError(f"not a path inside the folder: {told}")
    for start in range(len(parts)):
        candidate = folder.joinpath(*parts[start:])
        if candidate.exists():
            return candidate
    return folder.joinpath(*parts)


def _around_key(slices: list[tuple[int, NDArray[np.uint8]]]) -> list[tuple[int, NDArray[np.uint8]]]:
    """The run of neighbors without a gap that holds the key slice: a volume skips no slice."""
    offsets = dict(slices)
    low = high = 0
    while low - 1 in offsets:
        low -= 1
    while high + 1 in offsets:
        high += 1
    return [(offset, offsets[offset]) for offset in range(low, high + 1)]


def _picture(folder: Path, stem: str) -> NDArray[np.uint8] | None:
    """A gray picture, or None where there is none of that name."""
    for suffix in _SUFFIXES:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return _gray(path)
    return None


def _mask(stem: Path, shape_HW: tuple[int, ...], name: str) -> NDArray[np.bool_]:
    gray_HW = _picture(stem.parent, stem.name)
    if gray_HW is None:
        raise DataError(f"{name} has no mask of its abnormality {stem.name}")
    if gray_HW.shape != shape_HW:
        raise DataError(
            f"{name}: the mask of abnormality {stem.name} is {gray_HW.shape}, its key slice {shape_HW}"
        )
    # lossy pictures of 0 and 255 (or of 0 and 1) have noise at the edges
    return np.asarray(gray_HW > min(_MASK_ABOVE, int(gray_HW.max()) // 2))


def _gray(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            if max(image.size) > _LARGEST_PICTURE:
                raise DataError(f"{path.name} is {image.size[0]} x {image.size[1]}, larger than any CT slice")
            return np.asarray(image.convert("L"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise DataError(f"{path.name} is no picture that can be read: download it again") from error
