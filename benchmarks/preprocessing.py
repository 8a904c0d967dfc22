"""Time and memory to prepare one scan, beside MONAI's, SimpleITK's and CT-CLIP's chains; prints JSON lines.

    python benchmarks/preprocessing.py [--rounds 3] [--scan ct.nii.gz]

Every chain turns the scan, resamples it to 1.5 x 0.75 x 0.75 mm, windows -1000..1000 HU to -1..1, and starts from
the same int16 array in memory (CT-CLIP's has no turning). Only ours averages where the grid coarsens. Each runs in
a process of its own; the chains take turns, and the best round counts. Without a scan the real one under
``$VLM3D_REAL_DATA`` or ``../shared/data`` serves, else noise of its shape.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TARGET_MM = (1.5, 0.75, 0.75)
WINDOW_HU = (-1000.0, 1000.0)
Prepare = Callable[[NDArray[np.int16], NDArray[np.float64]], Any]


def vlm3d_chain() -> Prepare:
    from vlm3d.config import PreprocessingConfig
    from vlm3d.preprocessing.preprocessor import Preprocessor
    from vlm3d.volume import Volume

    preprocessor = Preprocessor(PreprocessingConfig(spacing_mm=TARGET_MM, hu_window=WINDOW_HU, crop="center"))
    return lambda hu_DHW, affine: preprocessor.apply(Volume(hu_DHW, affine)).intensity_DHW


def monai_chain() -> Prepare:
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Compose, Orientation, ScaleIntensityRange, Spacing

    chain = Compose(
        [
            Orientation(axcodes="SPL", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            Spacing(pixdim=TARGET_MM, mode="bilinear", padding_mode="border"),
            ScaleIntensityRange(*WINDOW_HU, -1.0, 1.0, clip=True),
        ]
    )
    return lambda hu_DHW, affine: chain(
        MetaTensor(torch.from_numpy(hu_DHW.astype(np.float32))[None], affine=torch.from_numpy(affine))
    )


def simpleitk_chain() -> Prepare:
    import SimpleITK as sitk

    def prepare(hu_DHW: NDArray[np.int16], affine: NDArray[np.float64]) -> NDArray[np.float32]:
        image = sitk.GetImageFromArray(hu_DHW)
        spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
        image.SetSpacing([float(length) for length in spacing_mm[::-1]])
        image.SetDirection((affine[:3, 2::-1] / spacing_mm[::-1] * [[-1], [-1], [1]]).ravel().tolist())
        image = sitk.DICOMOrient(image, "LPS")
        size = [
            round(n * s / t)
            for n, s, t in zip(image.GetSize(), image.GetSpacing(), TARGET_MM[::-1], strict=True)
        ]
        image = sitk.Resample(
            image,
            size,
            sitk.Transform(),
            sitk.sitkLinear,
            image.GetOrigin(),
            TARGET_MM[::-1],
            image.GetDirection(),
            WINDOW_HU[0],
            sitk.sitkFloat32,
        )
        return sitk.GetArrayFromImage(sitk.IntensityWindowing(image, *WINDOW_HU, -1.0, 1.0))

    return prepare


def ctclip_chain() -> Prepare:
    import torch
    import torch.nn.functional as F

    def prepare(hu_DHW: NDArray[np.int16], affine: NDArray[np.float64]) -> NDArray[np.float32]:
        spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
        size = [int(n * (s / t)) for n, s, t in zip(hu_DHW.shape, spacing_mm, TARGET_MM, strict=True)]
        x = torch.from_numpy(hu_DHW.astype(np.float32))[None, None]
        x = F.interpolate(x, size=size, mode="trilinear", align_corners=False)[0, 0]
        return (x.clamp(*WINDOW_HU) / WINDOW_HU[1]).numpy()

    return prepare


CHAINS: dict[str, Callable[[], Prepare]] = {
    "vlm3d": vlm3d_chain,
    "monai": monai_chain,
    "simpleitk": simpleitk_chain,
    "ctclip": ctclip_chain,
}


def status_mib(field: str) -> float:
    """Memory of this process as Linux counts it: ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def run_one(name: str, folder: Path) -> dict[str, Any]:
    """Run one chain twice in this process: the faster time, and memory beyond scan and libraries."""
    hu_DHW, affine = np.load(folder / "hu.npy"), np.load(folder / "affine.npy")
    prepare = CHAINS[name]()
    prepare(np.ascontiguousarray(hu_DHW[:8, :64, :64]), affine)
    before_mib = status_mib("VmRSS")
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        shape = tuple(prepare(hu_DHW, affine).shape)
        seconds.append(time.perf_counter() - start)
    peak_mib = status_mib("VmHWM") - before_mib
    return {"seconds": min(seconds), "peak_mib": peak_mib, "shape": shape[-3:]}


def load(scan: Path | None) -> tuple[NDArray[np.int16], NDArray[np.float64], str]:
    """The scan as a (D, H, W) array with its affine, and what to call it."""
    if scan is None:
        root = Path(os.environ.get("VLM3D_REAL_DATA", "../shared/data"))
        scan = root / "lidc0001" / "ct.nii.gz"
        if not scan.exists():
            affine = np.array([[0, 0, -0.7, 0], [0, -0.7, 0, 0], [2.5, 0, 0, 0], [0, 0, 0, 1.0]])
            return (
                np.random.default_rng(0).integers(-1000, 1000, (133, 512, 512)).astype(np.int16),
                affine,
                "noise",
            )
    import nibabel

    image = nibabel.load(scan)
    hu_DHW = np.ascontiguousarray(np.asarray(image.dataobj).T.astype(np.int16))
    return hu_DHW, image.affine[:, [2, 1, 0, 3]], f"{scan.parent.name}/{scan.name}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("CHAIN", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments.one[0], Path(arguments.one[1]))))
        return
    hu_DHW, affine, source = load(arguments.scan)
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "hu.npy", hu_DHW)
        np.save(Path(folder) / "affine.npy", affine)
        for _ in range(arguments.rounds):
            for name in CHAINS:
                command = [sys.executable, __file__, "--one", name, folder]
                line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                result = json.loads(line.splitlines()[-1])
                if name not in best or result["seconds"] < best[name]["seconds"]:
                    best[name] = result
    for name, result in best.items():
        print(
            json.dumps(
                {
                    "benchmark": "preprocessing",
                    "chain": name,
                    "input": source,
                    "input_shape": hu_DHW.shape,
                    "threads": os.environ.get("OMP_NUM_THREADS", "all"),
                    "shape": result["shape"],
                    "seconds": round(result["seconds"], 3),
                    "peak_mib": round(result["peak_mib"]),
                    "times_vlm3d": round(result["seconds"] / best["vlm3d"]["seconds"], 2),
                }
            )
        )


if __name__ == "__main__":
    main()
