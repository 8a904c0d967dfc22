"""Time, size and memory of preparing one scan for training, beside other ways to do it; prints JSON lines.

    python benchmarks/prepare.py [--rounds 3] [--shape 300 512 512] [--volumes 200]

One synthetic int16 chest CT in a gzip NIfTI goes from its file to a file that training can read. On CT-CLIP's grid
(1.5 x 0.75 x 0.75 mm, 240 x 480 x 480) run, without anatomy:

* ``vlm3d``: `prepare_case`, from reading and checking to the case's folder in the store;
* ``ctclip``: the steps of CT-CLIP's preparation in their order with their tools: nibabel to float, torch's trilinear
  interpolation, clip, divide, crop or pad, ``np.savez_compressed``;
* ``simpleitk``: SimpleITK reads, resamples and writes a compressed MetaImage;
* ``floor``: what no preparation can do without: isal decompresses the file, blosc2 writes an array of the result's size.

Then a 64 x 256 x 256 crop is read from the store and from the NPZ, `tiny`'s own grid is prepared, and the memory of a
process that prepares 20 and all small volumes is compared. Each runs in a process of its own, in turns; of the rounds the
one with the least processor time counts. ``cpu_seconds`` is the time of all threads, hardly touched by what else runs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from measuring import best_seconds, in_child

TARGET_MM = (1.5, 0.75, 0.75)
GRID = (240, 480, 480)
SPACING_MM = (1.25, 0.703, 0.703)
CROP = (64, 256, 256)
WAYS = ("vlm3d", "ctclip", "simpleitk", "floor")


def synthetic_chest(shape_DHW: tuple[int, int, int]) -> NDArray[np.int16]:
    """An ellipse of tissue with two lungs, a spine and noise as strong as a soft kernel's."""
    rng = np.random.default_rng(0)
    _, height, width = shape_DHW
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    hu_DHW = np.empty(shape_DHW, np.int16)
    for d in range(shape_DHW[0]):
        size = 1.0 + 0.1 * np.sin(d / 40)
        body = (x / 0.85) ** 2 + (y / 0.6) ** 2 < size
        lungs = ((np.abs(x) - 0.38) / 0.28) ** 2 + (y / 0.42) ** 2 < size
        plane_HW = np.where(lungs, -850.0, np.where(body, 40.0, -1000.0))
        plane_HW[(x / 0.1) ** 2 + ((y - 0.42) / 0.1) ** 2 < 1] = 300.0
        hu_DHW[d] = plane_HW + rng.normal(0.0, 18.0, plane_HW.shape)
    return np.maximum(hu_DHW, -1024)


def write_scan(path: Path, shape_DHW: tuple[int, int, int]) -> None:
    """A gzip NIfTI as archives hold them: zlib at level 6."""
    import nibabel as nib

    affine = np.diag([-SPACING_MM[2], -SPACING_MM[1], SPACING_MM[0], 1.0])
    image = nib.Nifti1Image(synthetic_chest(shape_DHW).transpose(2, 1, 0), affine)
    path.write_bytes(gzip.compress(image.to_bytes(), 6))


def load_scan(path: Path) -> Any:
    """A case's loader: what sources do with a NIfTI file."""
    from vlm3d.datasets.case import CaseData
    from vlm3d.io import read_volume

    return CaseData(read_volume(path))


def case_of(path: Path, case_id: str = "scan") -> Any:
    from vlm3d.datasets.case import Case

    return Case(case_id, case_id, "npz", partial(load_scan, path), split="train")


def vlm3d_way(scan: Path, out: Path, *, tiny: bool = False) -> None:
    from vlm3d.config import PreprocessingConfig, load_config
    from vlm3d.datasets.prepare import prepare

    own = PreprocessingConfig(
        spacing_mm=TARGET_MM,
        max_shape=GRID,
        fixed_shape=True,
        crop="center",
        antialias=False,
        ctclip_sizes=True,
    )
    config = load_config("tiny").preprocessing if tiny else own
    summary = prepare([case_of(scan)], out, config, anatomy="none", workers=1)
    assert summary.done == 1, summary


def ctclip_way(scan: Path, out: Path) -> None:
    import nibabel as nib
    import torch
    import torch.nn.functional as F

    image = nib.load(scan)
    voxels = np.transpose(image.get_fdata(), (2, 0, 1)).astype(np.float32)  # slope and intercept applied
    x, y, z = (float(side) for side in image.header.get_zooms())
    size = [
        int(n * (side / wanted)) for n, side, wanted in zip(voxels.shape, (z, x, y), TARGET_MM, strict=True)
    ]
    volume = torch.from_numpy(voxels)[None, None]
    volume = F.interpolate(volume, size=size, mode="trilinear", align_corners=False)[0, 0]
    volume = volume.clamp(-1000, 1000) / 1000
    pads: list[int] = []
    for axis in (2, 1, 0):
        extra = GRID[axis] - volume.shape[axis]
        if extra < 0:
            volume = volume.narrow(axis, -extra // 2, GRID[axis])
        pads += [max(0, extra) // 2, max(0, extra) - max(0, extra) // 2]
    volume = F.pad(volume, pads, value=-1.0)
    np.savez_compressed(out.with_suffix(".npz"), volume.numpy())


def simpleitk_way(scan: Path, out: Path) -> None:
    import SimpleITK as sitk

    image = sitk.DICOMOrient(sitk.ReadImage(str(scan)), "LPS")
    old = zip(image.GetSize(), image.GetSpacing(), TARGET_MM[::-1], strict=True)
    size = [int(n * (side / wanted)) for n, side, wanted in old]
    image = sitk.Resample(
        image,
        size,
        sitk.Transform(),
        sitk.sitkLinear,
        image.GetOrigin(),
        TARGET_MM[::-1],
        image.GetDirection(),
        -1000,
    )
    extra = [wanted - n for n, wanted in zip(image.GetSize(), GRID[::-1], strict=True)]
    image = sitk.ConstantPad(
        image, [max(0, n) // 2 for n in extra], [max(0, n) - max(0, n) // 2 for n in extra], -1000
    )
    image = sitk.Crop(image, [max(0, -n) // 2 for n in extra], [max(0, -n) - max(0, -n) // 2 for n in extra])
    sitk.WriteImage(image, str(out.with_suffix(".mha")), useCompression=True)


def floor_way(scan: Path, out: Path) -> None:
    from isal import igzip

    from vlm3d.datasets.store import compressed

    with igzip.open(scan, "rb") as stream:
        header = stream.read(352)
        count = int(np.prod(np.frombuffer(header, np.int16, 3, 42).astype(np.int64)))
        stored = np.empty(count, np.int16)
        stream.readinto(stored.view(np.uint8).data)
    result = np.resize(stored, GRID) if count < np.prod(GRID) else stored[: np.prod(GRID)].reshape(GRID)
    out.with_suffix(".b2nd").write_bytes(compressed(result))


def peak_mb() -> int:
    """The most memory that this process has held since it started; ``getrusage`` would count its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def child(name: str, folder: str, *rest: str) -> dict[str, Any]:
    """What one process measures."""
    scan, out = Path(folder) / "scan.nii.gz", Path(folder) / name
    if name == "crop_store":
        return {"seconds": best_seconds(crop_of_store(Path(folder) / "kept"), 9)}
    if name == "crop_npz":
        return {"seconds": best_seconds(crop_of_npz(Path(folder) / "kept.npz"), 3)}
    if name == "memory":
        return memory(Path(folder), int(rest[0]))
    ways: dict[str, Callable[[Path, Path], None]] = {
        "vlm3d": vlm3d_way,
        "vlm3d_tiny": partial(vlm3d_way, tiny=True),
        "ctclip": ctclip_way,
        "simpleitk": simpleitk_way,
        "floor": floor_way,
    }
    small = Path(folder) / "small.nii.gz"
    ways[name](small, Path(folder) / f"{name}_small")  # imports and first calls are not what is measured
    start, cpu_start = time.perf_counter(), time.process_time()
    ways[name](scan, out)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    files = [
        path
        for path in Path(folder).glob(f"{name}*/**/*")
        if path.suffix == ".b2nd" and "small" not in str(path)
    ]
    files += list(Path(folder).glob(f"{name}.*"))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak_mb(),
        "stored_mb": round(sum(path.stat().st_size for path in files) / 1e6, 1),
    }


def crop_of_store(store: Path) -> Callable[[], object]:
    from vlm3d.datasets.prepared import PreparedDataset

    dataset = PreparedDataset(store)
    rng = np.random.default_rng(0)

    def read() -> object:
        starts = [
            int(rng.integers(0, n - m + 1)) for n, m in zip(dataset.cases[0].shape_DHW, CROP, strict=True)
        ]
        box = [(start, start + side) for start, side in zip(starts, CROP, strict=True)]
        return dataset.read(0, (box[0], box[1], box[2]))

    return read


def crop_of_npz(path: Path) -> Callable[[], object]:
    return lambda: np.ascontiguousarray(np.load(path)["arr_0"][tuple(slice(50, 50 + side) for side in CROP)])


def memory(folder: Path, count: int) -> dict[str, Any]:
    """Peak memory of a process that prepares many small volumes, one after the other."""
    from vlm3d.config import load_config
    from vlm3d.datasets.prepare import prepare

    cases = [case_of(folder / "small.nii.gz", f"case_{number:04d}") for number in range(count)]
    prepare(cases, folder / f"memory_{count}", load_config("tiny").preprocessing, anatomy="none", workers=1)
    return {"peak_mb": peak_mb()}


def emit(**row: Any) -> None:
    print(json.dumps({"benchmark": "prepare", **row}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512), metavar=("D", "H", "W"))
    parser.add_argument("--volumes", type=int, default=200)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scan(folder / "scan.nii.gz", tuple(arguments.shape))
        write_scan(folder / "small.nii.gz", (60, 128, 128))
        time_ways(folder, arguments)
        compare_crops(folder)
        few, many = (
            in_child(__file__, "memory", name, str(count))["peak_mb"] for count in (20, arguments.volumes)
        )
        emit(
            measured="memory",
            volumes=(20, arguments.volumes),
            peak_mb=(few, many),
            growth=round(many / few, 3),
        )


def time_ways(folder: Path, arguments: argparse.Namespace) -> None:
    """Each way in turn, some rounds; the outputs of the last round stay."""
    import shutil

    best: dict[str, dict[str, Any]] = {}
    for _ in range(arguments.rounds):
        for name in (*WAYS, "vlm3d_tiny"):
            for old in folder.glob(f"{name}*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            found = in_child(__file__, name, str(folder))
            if name not in best or found["cpu_seconds"] < best[name]["cpu_seconds"]:
                best[name] = found
    ours = best["vlm3d"]
    for name, found in best.items():
        emit(
            measured="one scan",
            way=name,
            input_shape=list(arguments.shape),
            threads=os.environ.get("OMP_NUM_THREADS", "all"),
            seconds=round(found["seconds"], 3),
            cpu_seconds=round(found["cpu_seconds"], 3),
            peak_mb=found["peak_mb"],
            stored_mb=found["stored_mb"],
            times_vlm3d=round(found["seconds"] / ours["seconds"], 2),
            times_vlm3d_cpu=round(found["cpu_seconds"] / ours["cpu_seconds"], 2),
        )
    (folder / "vlm3d").rename(folder / "kept")
    (folder / "ctclip.npz").rename(folder / "kept.npz")


def compare_crops(folder: Path) -> None:
    rows = {name: in_child(__file__, f"crop_{name}", str(folder))["seconds"] for name in ("store", "npz")}
    for name, seconds in rows.items():
        emit(
            measured="crop 64x256x256",
            source=name,
            ms=round(seconds * 1000, 2),
            times_store=round(seconds / rows["store"], 1),
        )


if __name__ == "__main__":
    main()
