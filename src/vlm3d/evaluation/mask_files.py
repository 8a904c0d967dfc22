"""Lesion masks in files: which file is whose, and their voxels when a case's turn comes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm3d.errors import InputError, MaskError
from vlm3d.evaluation.case_findings import LesionMasks
from vlm3d.evaluation.case_ids import case_id_of, named
from vlm3d.evaluation.official import read_json
from vlm3d.io import read_mask
from vlm3d.labels import LESION_KEYS, LESIONS

ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd")
NUMBERS_FILE = "labels.json"
"""Beside masks that number their lesions: ``{"lung_nodule": 1, …}``; without it they count from 1 in `LESIONS`' order."""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_KEY_OF = {
    _plain(name): lesion.key
    for lesion in LESIONS
    for name in (lesion.key, lesion.name, lesion.challenge_name)
}


@dataclass(frozen=True)
class MaskFiles:
    """The files of one case.

    Attributes:
        by_lesion: One file a lesion.
        numbered: One file with all lesions, told apart by number.
        numbers: Lesion key -> its number there.
    """

    by_lesion: Mapping[str, Path] = field(default_factory=dict)
    numbered: Path | None = None
    numbers: Mapping[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """Lesions that the files speak of."""
        return frozenset(self.by_lesion) | (frozenset(self.numbers) if self.numbered else frozenset())


def masks_of_folder(folder: Path) -> dict[str, MaskFiles]:
    """Find the masks of all cases in a folder.

    Returns:
        Case id -> its files; empty where the folder holds none.

    Raises:
        InputError: A file names no known lesion beside files that do, or a case has two masks of one lesion.
    """
    numbers = _numbers(folder)
    found: dict[str, dict[str, Path]] = {}
    numbered: dict[str, Path] = {}
    foreign: list[str] = []
    for path in sorted(item for item in folder.glob("**/*") if item.is_file() and _is_image(item)):
        stem, inner = case_id_of(path.name), path.parent.relative_to(folder).parts
        case_id, key = _case_and_lesion(stem, inner)
        if key is None and not inner:
            if stem in numbered:
                raise InputError(f"{folder.name} has two masks of case {stem}")
            numbered[stem] = path
        elif key is None or case_id is None:
            foreign.append(path.relative_to(folder).as_posix())
        elif key in found.setdefault(case_id, {}):
            raise InputError(f"{folder.name} has two masks of {key} for case {case_id}")
        else:
            found[case_id][key] = path
    if found and (numbered or foreign):
        raise InputError(
            f"{folder.name} holds images that name no lesion: {named([*numbered, *foreign])}; "
            f"lesions are {', '.join(LESION_KEYS)}"
        )
    cases = {case_id: MaskFiles(files) for case_id, files in found.items()}
    return cases or {case_id: MaskFiles({}, path, numbers) for case_id, path in numbered.items()}


def load_files(files: MaskFiles | Mapping[str, Path], absent: Iterable[str] = ()) -> LesionMasks:
    """Read a case's masks onto canonical axes.

    Args:
        files: From `masks_of_folder`, or lesion key -> file.
        absent: Lesions known not to be there.

    Raises:
        MaskError: The files lie on different grids, or hold numbers that mean no lesion.
        InputError: A file cannot be read.
    """
    files = files if isinstance(files, MaskFiles) else MaskFiles(files)
    affine: NDArray[np.float64] = np.eye(4)
    masks: dict[str, NDArray[np.bool_]] = {}
    first: Path | None = None
    for key, path in files.by_lesion.items():
        mask = read_mask(path)
        if first is None:
            first, affine = path, mask.affine
        elif mask.labels_DHW.shape != next(iter(masks.values())).shape or not np.allclose(
            mask.affine, affine, atol=1e-3
        ):
            raise MaskError(f"{path.parent.name}: {path.name} and {first.name} lie on different grids")
        masks[key] = mask.labels_DHW != 0
    if files.numbered is not None:
        mask = read_mask(files.numbered)
        affine = mask.affine
        unknown = set(np.unique(mask.labels_DHW).tolist()) - {0, *files.numbers.values()}
        if unknown:
            raise MaskError(
                f"{files.numbered.name} holds the numbers {sorted(unknown)[:5]}, which mean no lesion; "
                f"say what they mean in {NUMBERS_FILE} beside it"
            )
        masks = {key: mask.labels_DHW == number for key, number in files.numbers.items()}
    return LesionMasks.on_grid(masks, affine, absent)


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS) and not path.name.startswith(".")


def _case_and_lesion(stem: str, folders: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Whose mask of what a file is: by its folder and name, or by its name alone."""
    key = _KEY_OF.get(_plain(stem))
    return (folders[0], key) if folders and key else _split_name(stem)


def _split_name(stem: str) -> tuple[str | None, str | None]:
    """``<case>_<lesion>`` taken apart; the longest lesion name that ends it."""
    parts = re.split(r"([_\-. ])", stem)
    for cut in range(1, len(parts), 2):
        key = _KEY_OF.get(_plain("".join(parts[cut + 1 :])))
        if key is not None:
            return "".join(parts[:cut]), key
    return None, None


def _numbers(folder: Path) -> dict[str, int]:
    path = folder / NUMBERS_FILE
    if not path.is_file():
        return {key: number for number, key in enumerate(LESION_KEYS, start=1)}
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} gives no numbers by lesion name")
    numbers = {_KEY_OF.get(_plain(str(name)), ""): value for name, value in content.items()}
    values = list(numbers.values())
    fits = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)
    if "" in numbers or not fits or len(set(values)) != len(values) or len(numbers) != len(content):
        raise InputError(
            f"{path} must give each lesion its own number of at least 1; lesions are {', '.join(LESION_KEYS)}"
        )
    return numbers
