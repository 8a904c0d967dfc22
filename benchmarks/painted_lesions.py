"""How far a checkpoint is from reality: lesions painted into real scans, found or not.

Each of the five lesions is painted into each real scan at a number of seeds, on the model's grid. For a lesion, AUROC tells
scans painted with it from the clean scan and from scans painted with the others, by its disease's probability; Dice
compares the drawn mask with the painted one. Two scans are no study: this says how a model that has seen phantoms alone
meets other anatomy, noise and texture.

    python benchmarks/painted_lesions.py [--checkpoint tiny] [--seeds 20]

Needs the real scans in ../shared/data or $VLM3D_REAL_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.datasets.phantom import paint_into_scan
from vlm3d.evaluation.metrics import auroc
from vlm3d.inference.loading import load_pipeline
from vlm3d.inference.pipeline import Pipeline, PredictionSettings
from vlm3d.io import read_volume
from vlm3d.labels import DISEASE_NAMES, LESIONS
from vlm3d.preprocessing.orientation import to_canonical
from vlm3d.volume import RegionMap, Volume

SCANS = {"lidc0001": "lidc0001/ct.nii.gz", "lung_dx_a0001": "lung_dx_a0001/dicom"}


def on_model_grid(path: Path, pipeline: Pipeline) -> tuple[Volume, RegionMap]:
    """A real scan in HU and its anatomy, on the model's grid."""
    scan = to_canonical(read_volume(path))
    prepared = pipeline.preprocessor.apply(scan, segment_anatomy(scan))
    low, high = pipeline.model.config.preprocessing.hu_window
    hu_DHW = (prepared.intensity_DHW + 1) / 2 * (high - low) + low
    assert prepared.regions_DHW is not None
    volume = Volume(np.rint(hu_DHW).astype(np.int16), prepared.affine, source=path.name)
    return volume, RegionMap(prepared.regions_DHW, prepared.affine, "classical")


def read_by(
    pipeline: Pipeline, volume: Volume, regions: RegionMap
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Disease probabilities and lesion masks, as `vlm3d predict` gives them."""
    found = pipeline(volume, PredictionSettings(report=False), mask=regions)
    probability = {item.name: item.probability for item in found.prediction.diseases}
    return np.array([probability[name] for name in DISEASE_NAMES]), found.masks


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """2 |a and b| / (|a| + |b|)."""
    return float(2 * (a & b).sum() / max(int(a.sum()) + int(b.sum()), 1))


def measure(pipeline: Pipeline, name: str, path: Path, seeds: int) -> list[dict[str, object]]:
    """One line a lesion."""
    volume, regions = on_model_grid(path, pipeline)
    clean_K, _ = read_by(pipeline, volume, regions)
    scores: list[tuple[str, np.ndarray]] = [("", clean_K)]
    overlaps: dict[str, list[float]] = {lesion.key: [] for lesion in LESIONS}
    for lesion in LESIONS:
        for seed in range(seeds):
            painted = paint_into_scan(volume, regions, {lesion.disease: 0.6}, seed=seed)
            truth_DHW = painted.lesion_masks[lesion.key]
            if not truth_DHW.any():
                continue
            probability_K, masks = read_by(pipeline, painted.volume, regions)
            scores.append((lesion.key, probability_K))
            overlaps[lesion.key].append(dice(masks[lesion.key], truth_DHW))
    lines = []
    for lesion in LESIONS:
        probability_N = np.array([p[DISEASE_NAMES.index(lesion.disease)] for _, p in scores], np.float64)
        # consolidated lung is opaque lung: it is no negative for the disease of ground glass
        counted = [lesion.key != "ground_glass_opacity" or key != "consolidation" for key, _ in scores]
        probability_N = probability_N[counted]
        painted_N = np.array([key == lesion.key for key, _ in scores])[counted]
        lines.append(
            {
                "scan": name,
                "lesion": lesion.key,
                "painted": int(painted_N.sum()),
                "others": int((~painted_N).sum()),
                "auroc": round(auroc(probability_N, painted_N), 3),
                "dice": round(float(np.mean(overlaps[lesion.key])), 3) if overlaps[lesion.key] else None,
            }
        )
    return lines


def main() -> int:
    """Print one JSON line a scan and lesion."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    data = Path(os.environ.get("VLM3D_REAL_DATA", "../shared/data"))
    if not data.is_dir():
        print(json.dumps({"skipped": f"no real scans in {data}: set VLM3D_REAL_DATA"}))
        return 0
    pipeline = load_pipeline(arguments.checkpoint, with_report=False)
    start = time.perf_counter()
    for name, file in SCANS.items():
        for line in measure(pipeline, name, data / file, arguments.seeds):
            print(json.dumps({**line, "status": pipeline.model.training_status}), flush=True)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
