"""Small cases whose loaders can be pickled, for tests that prepare them in other processes."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.config import PreprocessingConfig
from vlm3d.datasets.case import Case, CaseData
from vlm3d.errors import NotAChestCTError
from vlm3d.labels import DISEASE_NAMES
from vlm3d.volume import RegionMap, Volume

GRID = PreprocessingConfig(spacing_mm=(2.0, 2.0, 2.0), max_shape=(32, 48, 48), crop="center")
SHAPE = (40, 36, 44)


def ball(shape_DHW: tuple[int, ...], center: tuple[float, ...], radius: float) -> NDArray[np.bool_]:
    """A ball in voxels."""
    grid = np.meshgrid(*(np.arange(size) for size in shape_DHW), indexing="ij")
    return np.asarray(sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)) <= radius**2)


def small_data(seed: int = 0) -> CaseData:
    """1.5 mm voxels on axes of their own (I, A, R), with regions, one known lesion and one known to be absent."""
    rng = np.random.default_rng(seed)
    hu_DHW = rng.normal(-300, 400, SHAPE).astype(np.int16)
    affine = np.array([[0, 0, 1.5, 3], [0, 1.5, 0, -20], [-1.5, 0, 0, 7], [0, 0, 0, 1]], float)
    regions = RegionMap(rng.integers(0, 21, SHAPE, dtype=np.uint8), affine, "file")
    masks = {"lung_nodule": ball(SHAPE, (20, 18, 22), 5), "consolidation": np.zeros(SHAPE, bool)}
    return CaseData(Volume(hu_DHW, affine, notes=("a note",)), regions, masks, report=f"Report of {seed}.")


def load_small(seed: int, log: Path | None = None, wait_s: float = 0.0) -> CaseData:
    """Read one, after a while, and leave a line in a log."""
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{seed}\n")
    time.sleep(wait_s)
    return small_data(seed)


def load_broken() -> CaseData:
    """What a loader does with a file that cannot be used."""
    raise NotAChestCTError("scan.nii.gz is constant:\n there is no image in it.")


def load_with_bug() -> CaseData:
    """What no loader should do."""
    raise KeyError("spacing")


def load_and_die() -> CaseData:
    """The process is killed, as for want of memory."""
    os._exit(9)


def load_with_wrong_mask() -> CaseData:
    """The mask lies on another grid."""
    data = small_data()
    return CaseData(data.volume, None, {"lung_nodule": np.zeros((4, 4, 4), bool)})


def case(case_id: str, load: Any, **fields: Any) -> Case:
    """A case of its own patient in the training split."""
    labels_K = (1.0, float("nan"), *(0.0,) * (len(DISEASE_NAMES) - 2))
    values = {"patient_id": f"p_{case_id}", "source": "npz", "split": "train", "labels_K": labels_K, **fields}
    return Case(case_id=case_id, load=load, **values)


def small_cases(count: int, log: Path | None = None, wait_s: float = 0.0) -> list[Case]:
    """Some small cases."""
    return [case(f"case_{seed}", partial(load_small, seed, log, wait_s)) for seed in range(count)]
