"""One line names a data set, whatever it is: ``find_cases("ct_rate:/data/ct_rate:split=valid")``.

| specification | what |
|---|---|
| ``phantom:START-STOP[:…]`` | phantoms made while training, see `vlm3d.datasets.phantom_source` |
| ``phantom:FOLDER`` | folders of ``vlm3d phantom`` |
| ``ct_rate:FOLDER[:…]`` | a download of CT-RATE, see `vlm3d.datasets.ct_rate` |
| ``npz:FOLDER[:…]`` | MedSAM2-style NPZ cases, see `vlm3d.datasets.medsam_npz` |
| ``omniabnorm:FOLDER[:…]`` | OmniAbnorm-CT, see `vlm3d.datasets.omniabnorm` |
| ``FOLDER[:…]`` | whichever of these its files are |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from vlm3d.datasets import ct_rate, medsam_npz, omniabnorm, phantom_source
from vlm3d.datasets.case import Case
from vlm3d.datasets.ct_rate_tables import volume_key
from vlm3d.datasets.spec import parse_spec
from vlm3d.datasets.splits import assign_splits, check_unique_ids
from vlm3d.errors import ConfigError, DataError

SOURCES: dict[str, tuple[Callable[[str], list[Case]], Sequence[str]]] = {
    phantom_source.KIND: (phantom_source.find_phantom_cases, phantom_source.OPTIONS),
    ct_rate.KIND: (ct_rate.find_ct_rate_cases, ct_rate.OPTIONS),
    medsam_npz.KIND: (medsam_npz.find_npz_cases, medsam_npz.OPTIONS),
    omniabnorm.KIND: (omniabnorm.find_omniabnorm_cases, omniabnorm.OPTIONS),
}
"""Each kind's finder and the settings that it takes."""

_LIKE_A_KIND = re.compile(r"([A-Za-z][A-Za-z0-9_-]+):")


def find_cases(specs: str | Sequence[str]) -> list[Case]:
    """The cases of a data set, or of several together, each with its split; none of them is read yet.

    A split comes from the specification, else from the source, else from `vlm3d.datasets.splits`: a patient that nobody
    has placed is drawn by its identifier, 80 % to training and 10 % each to validation and test.

    Args:
        specs: One or several lines as in the table above.

    Raises:
        ConfigError: A specification cannot be read.
        DataError: A folder holds none of the known kinds, or its tables cannot be used; or an identifier names two cases;
            or a patient is in two splits.
    """
    lines = [specs] if isinstance(specs, str) else specs
    cases = [case for line in lines for case in _find(line)]
    check_unique_ids(cases)
    return assign_splits(cases)


def _find(spec: str) -> list[Case]:
    kind, colon, _ = spec.partition(":")
    if colon and kind in SOURCES:
        return SOURCES[kind][0](spec)
    every_option = sorted({option for _, options in SOURCES.values() for option in options})
    folder = Path(parse_spec(spec, "FOLDER", every_option).target)
    if not folder.exists():
        unknown = _LIKE_A_KIND.match(spec)
        if unknown:
            raise ConfigError(
                f"'{spec}': no data source '{unknown[1]}'; there are {', '.join(SOURCES)}, or give a folder"
            )
        raise DataError(
            f"there is no folder {folder}: give a folder, or KIND:FOLDER with KIND of {', '.join(SOURCES)}"
        )
    found = detect_kind(folder)
    return SOURCES[found][0](f"{found}:{spec}")


def detect_kind(folder: Path) -> str:
    """Which data source a folder's files are of.

    Raises:
        DataError: None that is known; says what was looked for.
    """
    if (folder / phantom_source.TRUTH_FILE).is_file() or any(folder.glob(f"*/{phantom_source.TRUTH_FILE}")):
        return phantom_source.KIND
    if omniabnorm.find_annotation_files(folder):
        return omniabnorm.KIND
    files = ct_rate.walk(folder)
    if any(
        path.name.lower().endswith(ct_rate.SUFFIXES) and ct_rate.parse_volume_name(volume_key(path.name))
        for path in files
    ):
        return ct_rate.KIND
    if any(path.suffix.lower() == ".npz" for path in files):
        return medsam_npz.KIND
    raise DataError(
        f"{folder} holds no known data set; looked for phantoms (truth.json), OmniAbnorm-CT (a JSON of images with "
        "abnormalities), CT-RATE (volumes named like valid_2_a_1.nii.gz) and NPZ cases (*.npz)"
    )
