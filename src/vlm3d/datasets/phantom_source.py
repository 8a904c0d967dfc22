"""Phantoms as a data source: made from seeds while training, or read from the folders of ``vlm3d phantom``.

A made phantom is described by ``phantom:START-STOP[:key=value,...]``, seeds from START to STOP - 1:

| key | what |
|---|---|
| ``split`` | ``train``, ``valid`` or ``test`` |
| ``spacing`` | voxel size in mm along (D, H, W), such as ``3x1.5x1.5`` |
| ``protocol`` | which scanners take it: ``default`` or ``shifted`` |
| ``prevalence_scale`` | how much commoner each finding is than in a hospital, such as ``1.6`` |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.mask_file import read_region_mask
from vlm3d.datasets.case import Case, CaseData, Split
from vlm3d.datasets.phantom import Phantom, generate_phantom
from vlm3d.datasets.phantom.scanner import protocol_of
from vlm3d.datasets.spec import Spec, as_float, as_split, parse_spec
from vlm3d.errors import ConfigError, DataError
from vlm3d.io import read_mask, read_volume
from vlm3d.labels import DISEASE_NAMES, LESIONS, STORED_LESIONS
from vlm3d.volume import Volume

KIND = "phantom"
OPTIONS = ("split", "spacing", "protocol", "prevalence_scale")
MAX_PHANTOMS = 1_000_000
TRUTH_FILE, SCAN_FILE, REPORT_FILE, REGIONS_FILE = "truth.json", "ct.nii.gz", "report.txt", "regions.nii.gz"


def find_phantom_cases(spec: str) -> list[Case]:
    """The phantoms that a specification names; none is made yet.

    Labels, report and facts come with the data, since nobody knows them before the phantom is made. A phantom's
    identifier carries the settings that are not the defaults, so that one seed at two spacings is two scans of one
    patient.

    Args:
        spec: Such as ``phantom:0-600:prevalence_scale=1.6,split=train``, or ``phantom:FOLDER[:split=test]`` for folders
            that ``vlm3d phantom`` wrote.

    Raises:
        ConfigError: The specification cannot be read.
        DataError: The folder holds no phantom.
    """
    parsed = parse_spec(spec, KIND, OPTIONS)
    seeds = _seeds(parsed)
    if seeds is None:
        return find_phantom_folders(Path(parsed.target), split=as_split(parsed))
    settings = _settings(parsed)
    tag = "".join(f"-{_tag(settings[key])}" for key in sorted(settings))
    return [
        Case(
            case_id=f"phantom_{seed:06d}{tag}",
            patient_id=f"phantom_{seed:06d}",
            source=KIND,
            load=partial(load_phantom, seed, settings),
            split=as_split(parsed),
        )
        for seed in seeds
    ]


def load_phantom(seed: int, settings: Mapping[str, Any]) -> CaseData:
    """Make one phantom, with its regions, all masks, labels, report and facts.

    Args:
        seed: Of the phantom.
        settings: Further arguments of `generate_phantom`.

    Raises:
        DataError: The generator refuses the settings.
    """
    try:
        phantom = generate_phantom(seed, **settings)
    except (TypeError, ValueError) as error:
        raise DataError(f"phantom seed {seed} cannot be made: {error}") from error
    return phantom_data(phantom)


def phantom_data(phantom: Phantom) -> CaseData:
    """A phantom in the form that every source delivers."""
    return CaseData(
        volume=phantom.volume,
        regions=phantom.regions,
        lesion_masks=phantom.lesion_masks,
        labels_K=tuple(float(value) for value in phantom.disease_labels),
        report=phantom.report.text,
        report_is_synthetic=True,
        facts={
            "seed": phantom.seed,
            "patient": dict(phantom.patient),
            "findings": [_plain(asdict(item)) for item in phantom.truth],
        },
    )


def find_phantom_folders(folder: Path, *, split: Split | None = None) -> list[Case]:
    """The phantoms that ``vlm3d phantom`` wrote: the folder itself, or the folders in it.

    Raises:
        DataError: No phantom is there, or a truth file cannot be read.
    """
    truths = (
        [folder / TRUTH_FILE]
        if (folder / TRUTH_FILE).is_file()
        else sorted(path for path in folder.glob(f"*/{TRUTH_FILE}") if path.is_file())
    )
    if not truths:
        raise DataError(
            f"{folder} holds no phantom: no {TRUTH_FILE} in it or in a folder of it; vlm3d phantom writes them"
        )
    return [_folder_case(path.parent, split) for path in truths]


def load_phantom_folder(folder: Path) -> CaseData:
    """Read a phantom from its folder; a lesion without a mask file is known to be absent, unless the truth names it.

    Raises:
        InputError: A file is missing, damaged or on another grid.
    """
    labels = _read_truth(folder / TRUTH_FILE)["labels"]
    volume = read_volume(folder / SCAN_FILE)
    regions = read_region_mask(folder / REGIONS_FILE, volume, labels="vlm3d")
    return CaseData(
        volume=volume,
        regions=regions,
        lesion_masks={
            lesion.key: mask_DHW
            for lesion in STORED_LESIONS
            if (mask_DHW := _lesion_mask(folder / "masks" / f"{lesion.key}.nii.gz", volume)).any()
            or lesion in LESIONS
            or not labels[lesion.disease]
        },
    )


def _folder_case(folder: Path, split: Split | None) -> Case:
    truth = _read_truth(folder / TRUTH_FILE)
    report = folder / REPORT_FILE
    name = f"phantom_{truth['seed']:06d}"
    return Case(
        case_id=name,
        patient_id=name,
        source=KIND,
        load=partial(load_phantom_folder, folder),
        split=split,
        labels_K=tuple(float(truth["labels"][disease]) for disease in DISEASE_NAMES),
        report=report.read_text(encoding="utf-8").strip() if report.is_file() else None,
        report_is_synthetic=report.is_file(),
        facts={key: truth[key] for key in ("seed", "patient", "findings")},
    )


def _read_truth(path: Path) -> dict[str, Any]:
    try:
        truth = json.loads(path.read_text(encoding="utf-8"))
        complete = (
            isinstance(truth["seed"], int)
            and isinstance(truth["findings"], list)
            and isinstance(truth["patient"], dict)
            and all(truth["labels"][disease] in (0, 1) for disease in DISEASE_NAMES)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a phantom's truth: write the phantom again") from error
    if not complete:
        raise DataError(
            f"{path} lacks seed, findings, patient or one of the 18 labels: write the phantom again"
        )
    return dict(truth)


def _lesion_mask(path: Path, volume: Volume) -> NDArray[np.bool_]:
    if not path.is_file():
        return np.zeros(volume.shape_DHW, bool)
    mask = read_mask(path)
    if mask.labels_DHW.shape != volume.shape_DHW or not np.allclose(mask.affine, volume.affine, atol=1e-2):
        raise DataError(f"{path} lies on another grid than its scan: write the phantom again")
    return np.asarray(mask.labels_DHW > 0)


def _seeds(spec: Spec) -> range | None:
    """START to STOP, or None where the target is no such range."""
    start, dash, stop = spec.target.partition("-")
    if not (dash and start.isdecimal() and stop.isdecimal()):
        return None
    seeds = range(int(start), int(stop))
    if not 0 < len(seeds) <= MAX_PHANTOMS:
        raise ConfigError(
            f"'{spec.text}' names {len(seeds)} phantoms; give START-STOP with 1 to {MAX_PHANTOMS} seeds, STOP not in it"
        )
    return seeds


def _settings(spec: Spec) -> dict[str, Any]:
    """Arguments of `generate_phantom`, only those that were given."""
    settings: dict[str, Any] = {}
    if "spacing" in spec.options:
        settings["spacing_mm"] = _spacing(spec)
    protocol = spec.options.get("protocol", "default")
    if protocol != "default":
        try:
            protocol_of(protocol)
        except ValueError as error:
            raise ConfigError(f"'{spec.text}': {error}") from error
        settings["protocol"] = protocol
    if "prevalence_scale" in spec.options:
        settings["prevalence_scale"] = as_float(spec, "prevalence_scale", 0.0, 100.0)
    return settings


def _spacing(spec: Spec) -> tuple[float, float, float]:
    sides = spec.options["spacing"].split("x")
    try:
        depth, height, width = (float(side) for side in sides)
    except ValueError:
        depth = height = width = 0.0
    if not all(0.3 <= side <= 20 for side in (depth, height, width)):
        raise ConfigError(
            f"'{spec.text}': spacing is DxHxW in mm, each 0.3 to 20, such as 3x1.5x1.5; got '{spec.options['spacing']}'"
        )
    return depth, height, width


def _tag(value: Any) -> str:
    """A setting as part of a file's name."""
    text = "x".join(f"{side:g}" for side in value) if isinstance(value, tuple) else str(value)
    return "".join(c if c.isascii() and (c.isalnum() or c == ".") else "_" for c in text)


def _plain(value: Any) -> Any:
    """Tuples as lists, so that facts made and facts read from JSON are equal."""
    return json.loads(json.dumps(value))
