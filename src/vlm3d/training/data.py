"""From a prepared store to batches, in an order that a resumed run finds again.

Which scan stands where, how it is varied and which box of it is drawn follow from (seed, phase, position) alone, not
from what ran before. Position p of a phase belongs to step p // (scans a step); among the processes of a group the scans
of a step are dealt so that two processes see together what one sees with twice the accumulation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vlm3d.config import Config, PhaseConfig
from vlm3d.datasets.augmentation import Augmenter, TrainingSample
from vlm3d.datasets.guidance import guidance_bits, patch_guidance
from vlm3d.datasets.prepared import PreparedDataset, lesion_masks
from vlm3d.errors import DataError
from vlm3d.labels import DISEASE_NAMES, first_lesions
from vlm3d.model.patch_embedding import PatchBox, Place
from vlm3d.preprocessing.intensity import OUTSIDE_VALUE, window_in_place

logger = logging.getLogger(__name__)

_LESION_BITS = 8  # of the stored lesions; the marks of guidance follow while a scan is varied
_NOT_ANNOTATED = np.uint32(1 << 31)
"""Marks slices of which the masks say nothing."""
_TRIES = 50  # damaged scans in a row, after which a store is beyond use


class Scan(NamedTuple):
    """One scan as the model takes it.

    Attributes:
        case_id: Names it in logs.
        intensity_DHW: float32 in -1..1.
        regions_DHW: uint8 region ids, or None for a scan shown without its anatomy.
        masks_LDHW: int8: 1 lesion, 0 none, -1 unknown.
        guidance_KZYX: Patches where each disease can be seen, as far as that is known.
        labels_K: 0, 1 or NaN.
        report: Text, or None.
        box: The patches in which masks are drawn, or None for the whole scan.
        place: Where in the scan this cut-out lies, or None for the whole scan.
        damaged: Cases that were to come before it and could not be read.
    """

    case_id: str
    intensity_DHW: NDArray[np.float32]
    regions_DHW: NDArray[np.uint8] | None
    masks_LDHW: NDArray[np.int8]
    guidance_KZYX: NDArray[np.bool_]
    labels_K: NDArray[np.float32]
    report: str | None
    box: PatchBox | None
    place: Place | None
    damaged: tuple[str, ...]


@dataclass
class Batch:
    """Scans of one forward pass, padded to one shape.

    Attributes:
        case_ids: One a scan.
        intensity_B1DHW: float32 in -1..1.
        regions_BDHW: uint8; a scan without anatomy is background throughout. None if all are.
        masks_BLDHW: int8: 1 lesion, 0 none, -1 unknown.
        guidance_BKZYX: bool, patches where each disease can be seen, as far as that is known.
        labels_BK: 0, 1 or NaN.
        reports: Texts; empty where there is none.
        boxes: In patches, one a scan, or None.
        places: Where cut-outs lie in their scans, one a scan, or None.
        damaged: Cases that could not be read and were passed over.
    """

    case_ids: list[str]
    intensity_B1DHW: Tensor
    regions_BDHW: Tensor | None
    masks_BLDHW: Tensor
    guidance_BKZYX: Tensor
    labels_BK: Tensor
    reports: list[str]
    boxes: list[PatchBox] | None
    places: list[Place] | None
    damaged: list[str]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in memory that a GPU copies from while it computes; what torch's loader asks for."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


class ScanStream(Dataset[Scan]):
    """The scans of a phase by position; epochs follow each other without end.

    Args:
        dataset: The training split of a prepared store.
        config: The run's settings.
        phase: The phase's.
        phase_number: Tells the phases' random numbers apart.

    Raises:
        DataError: When a scan is asked for and none of those tried in its place can be read.
    """

    def __init__(
        self, dataset: PreparedDataset, config: Config, phase: PhaseConfig, phase_number: int
    ) -> None:
        self.dataset = dataset
        self.phase = phase
        self.seed = (config.training.seed, phase_number)
        self.hu_window = config.preprocessing.hu_window
        self.patch_size = config.model.vision.patch_size
        self.lesion_keys = [
            lesion.key for lesion in first_lesions(config.model.localizer.num_lesion_diseases)
        ]
        # keys begin with the stored lesions
        self.drawn_bits = range(min(len(self.lesion_keys), _LESION_BITS))
        self.num_diseases = config.model.classifier.num_diseases
        self.augment = Augmenter(config.training.augmentation)
        self._last: tuple[int, TrainingSample, Sequence[str], tuple[str, ...]] | None = None

    def __getitem__(self, position: int) -> Scan:
        number = position // self.phase.boxes_per_scan
        if self._last is None or self._last[0] != number:
            self._last = (number, *self._varied(number))
        _, sample, known, damaged = self._last
        rng = np.random.default_rng([*self.seed, 5, position])  # 2 to 4 and 6 are steps' and GRPO's
        first = position % self.phase.boxes_per_scan == 0
        return self._scan(sample, known, rng, damaged if first else ())

    def _varied(self, position: int) -> tuple[TrainingSample, Sequence[str], tuple[str, ...]]:
        """A scan after augmentation, its annotated lesions, and the cases that were to come before it."""
        rng = np.random.default_rng([*self.seed, 1, position])
        damaged: list[str] = []
        for _ in range(_TRIES):
            # A scan that cannot be read is passed over for the one that stands half an epoch further on.
            index = self._index(position + len(damaged) * (len(self.dataset) // 2 + 1))
            case = self.dataset.cases[index]
            try:
                sample = self._sample(index)
            except DataError as error:
                logger.warning("%s", error)
                damaged.append(case.case_id)
                continue
            return self.augment(sample, rng), case.known_lesions, tuple(damaged)
        raise DataError(
            f"{_TRIES} scans in a row cannot be read, the last one {damaged[-1]}: prepare the store anew"
        )

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        order = np.random.default_rng([*self.seed, 0, epoch]).permutation(len(self.dataset))
        return int(order[place])

    def _sample(self, index: int) -> TrainingSample:
        case, arrays = self.dataset.cases[index], self.dataset.read(index)
        labels_K = np.full(self.num_diseases, np.nan, np.float32)
        if case.labels_K is not None:
            count = min(self.num_diseases, len(case.labels_K))
            labels_K[:count] = case.labels_K[:count]
        regions_DHW = arrays.regions_DHW if case.regions_method is not None else None
        if case.is_annotated_throughout:
            marks_DHW = guidance_bits(case, regions_DHW, arrays.lesion_bits_DHW) << np.uint32(_LESION_BITS)
        else:  # where findings lie beyond these slices is not known
            marks_DHW = np.full(case.shape_DHW, _NOT_ANNOTATED)
            marks_DHW[case.annotated_slices] = 0
        return TrainingSample(
            arrays.hu_DHW,
            regions_DHW,
            marks_DHW | arrays.lesion_bits_DHW,
            labels_K,
            case.report,
            case.case_id,
            case.spacing_mm,
        )

    def _scan(
        self,
        sample: TrainingSample,
        known: Sequence[str],
        rng: np.random.Generator,
        damaged: tuple[str, ...],
    ) -> Scan:
        hidden = rng.random() < self.phase.without_regions
        place = None
        if self.phase.scan_crop is not None:
            sample, place = self._cut_out(sample, rng)
        intensity_DHW = window_in_place(sample.hu_DHW.astype(np.float32), self.hu_window)
        bits_DHW = sample.lesion_bits_DHW
        masks_LDHW = lesion_masks(bits_DHW.astype(np.uint8), known, self.lesion_keys)
        masks_LDHW[:, (bits_DHW & _NOT_ANNOTATED) > 0] = -1
        return Scan(
            sample.case_id,
            intensity_DHW,
            None if hidden else sample.regions_DHW,
            masks_LDHW,
            patch_guidance(
                (bits_DHW & ~_NOT_ANNOTATED) >> np.uint32(_LESION_BITS), self.patch_size, self.num_diseases
            ),
            sample.labels_K,
            sample.report,
            self._box(sample, self.phase.localization_crop, self.drawn_bits, rng),
            place,
            damaged,
        )

    def _cut_out(self, sample: TrainingSample, rng: np.random.Generator) -> tuple[TrainingSample, Place]:
        """A box of a scan as if it were all of it: what lies elsewhere is not there; what nobody placed is unknown."""
        diseases = range(_LESION_BITS, _LESION_BITS + len(DISEASE_NAMES))
        over = diseases if "classification" in self.phase.tasks else self.drawn_bits
        box = self._box(sample, self.phase.scan_crop, over, rng)
        assert box is not None
        z, y, x = (
            slice(start * side, stop * side) for (start, stop), side in zip(box, self.patch_size, strict=True)
        )
        cut = (z, y, x)
        labels_K = sample.labels_K.copy()
        for disease in np.flatnonzero(labels_K[: len(DISEASE_NAMES)] == 1):
            flag = np.uint32(1 << (_LESION_BITS + int(disease)))
            if not (sample.lesion_bits_DHW & flag).any():
                labels_K[disease] = np.nan
            elif not (sample.lesion_bits_DHW[cut] & flag).any():
                labels_K[disease] = 0.0
        part = replace(
            sample,
            hu_DHW=sample.hu_DHW[cut],
            regions_DHW=None if sample.regions_DHW is None else sample.regions_DHW[cut],
            lesion_bits_DHW=sample.lesion_bits_DHW[cut],
            labels_K=labels_K,
        )
        depth, rows, columns = (
            size // side for size, side in zip(sample.hu_DHW.shape, self.patch_size, strict=True)
        )
        return part, (box, (depth, rows, columns))

    def _box(
        self,
        sample: TrainingSample,
        voxels: tuple[int, int, int] | None,
        over: Iterable[int],
        rng: np.random.Generator,
    ) -> PatchBox | None:
        """A box over one of some marks as often as asked for (each kind as likely), else anywhere."""
        if voxels is None:
            return None
        grid = np.array(sample.hu_DHW.shape) // self.patch_size
        size = np.minimum(np.array(voxels) // self.patch_size, grid)
        over_lesion, where = rng.random() < self.phase.lesion_crops, rng.random(3)
        start = np.floor(where * (grid - size + 1)).astype(int)
        bits = sample.lesion_bits_DHW
        present = [bit for bit in over if over_lesion and (bits & np.uint32(1 << bit)).any()]
        if present:
            marked = np.argwhere(bits & np.uint32(1 << int(rng.choice(present))))
            center = marked[rng.integers(len(marked))] // self.patch_size
            start = np.clip(center - np.floor(where * size).astype(int), 0, grid - size)
        (z0, z1), (y0, y1), (x0, x1) = ((int(a), int(a + n)) for a, n in zip(start, size, strict=True))
        return (z0, z1), (y0, y1), (x0, x1)


class StepSampler(Sampler[list[int]]):
    """The positions of each forward pass of one process, from a step on.

    Args:
        phase: Batch size, accumulation and number of steps.
        first_step: The step to start at.
        rank: Number of this process.
        world_size: Processes of the group.
    """

    def __init__(self, phase: PhaseConfig, first_step: int, rank: int, world_size: int) -> None:
        self.phase, self.first_step, self.rank, self.world_size = phase, first_step, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        size, world = self.phase.batch_size, self.world_size
        for forward in range(
            self.first_step * self.phase.accumulate, self.phase.steps * self.phase.accumulate
        ):
            first = (forward * world + self.rank) * size
            yield list(range(first, first + size))

    def __len__(self) -> int:
        return (self.phase.steps - self.first_step) * self.phase.accumulate


def collate(scans: Sequence[Scan]) -> Batch:
    """Pad scans (D, H, W) of any shapes with air at their ends to one shape and stack them; see `Batch`."""
    shape = tuple(np.max([scan.intensity_DHW.shape for scan in scans], axis=0))
    intensity = np.full((len(scans), 1, *shape), OUTSIDE_VALUE, np.float32)
    regions = np.zeros((len(scans), *shape), np.uint8)
    masks = np.zeros((len(scans), len(scans[0].masks_LDHW), *shape), np.int8)
    grid = tuple(np.max([scan.guidance_KZYX.shape[1:] for scan in scans], axis=0))
    guidance = np.zeros((len(scans), len(scans[0].guidance_KZYX), *grid), bool)
    for index, scan in enumerate(scans):
        d, h, w = scan.intensity_DHW.shape
        intensity[index, 0, :d, :h, :w] = scan.intensity_DHW
        in_doubt_L = (scan.masks_LDHW < 0).any(axis=(1, 2, 3))
        masks[
            index, in_doubt_L
        ] = -1  # what is not annotated throughout is not annotated beyond the scan either
        masks[index, :, :d, :h, :w] = scan.masks_LDHW
        z, y, x = scan.guidance_KZYX.shape[1:]
        guidance[index, :, :z, :y, :x] = scan.guidance_KZYX
        if scan.regions_DHW is not None:
            regions[index, :d, :h, :w] = scan.regions_DHW
    boxes = [scan.box for scan in scans if scan.box is not None]
    places = [scan.place for scan in scans if scan.place is not None]
    return Batch(
        case_ids=[scan.case_id for scan in scans],
        intensity_B1DHW=torch.from_numpy(intensity),
        regions_BDHW=torch.from_numpy(regions) if any(s.regions_DHW is not None for s in scans) else None,
        masks_BLDHW=torch.from_numpy(masks),
        guidance_BKZYX=torch.from_numpy(guidance),
        labels_BK=torch.from_numpy(np.stack([scan.labels_K for scan in scans])),
        reports=[scan.report or "" for scan in scans],
        boxes=_of_one_size(boxes) if boxes else None,
        places=places or None,
        damaged=[case_id for scan in scans for case_id in scan.damaged],
    )


def _of_one_size(boxes: Sequence[PatchBox]) -> list[PatchBox]:
    """Boxes cut to the smallest along each axis: a small scan's box is small."""
    size = np.min([[stop - start for start, stop in box] for box in boxes], axis=0)
    cut = []
    for box in boxes:
        z, y, x = ((start, start + int(length)) for (start, _), length in zip(box, size, strict=True))
        cut.append((z, y, x))
    return cut


def batches(
    stream: ScanStream, phase: PhaseConfig, *, first_step: int, rank: int, world_size: int, workers: int
) -> DataLoader[Any]:
    """Batches of one process from a step on, read ahead by worker processes.

    Args:
        stream: The phase's scans.
        phase: Its ``batch_size`` and ``accumulate`` say which positions a step takes.
        first_step: Steps of the phase that are done.
        rank: Number of this process, from 0.
        world_size: Processes; together they take each position once.
        workers: Processes that read for this one; 0 reads when a batch is asked for.
    """
    return DataLoader(
        stream,
        batch_sampler=StepSampler(phase, first_step, rank, world_size),
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=3 if workers else None,
        worker_init_fn=_one_thread if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each start of a loader would draw from what dropout draws from
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
