"""Scans in an order that follows from numbers alone, whole or as boxes of which the labels are true."""

from __future__ import annotations

import numpy as np
import pytest

from support.training_store import phantom_store, training_config, write_small_pretrained
from vlm3d.config import Config, LocalPhase, PhaseConfig
from vlm3d.datasets.augmentation import NO_AUGMENTATION
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.losses import stack_lesion_masks
from vlm3d.training.data import ScanStream, StepSampler, collate


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return training_config(write_small_pretrained(tmp_path_factory.mktemp("pretrained")))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, config: Config) -> PreparedDataset:
    return PreparedDataset(phantom_store(tmp_path_factory.mktemp("data") / "store", config, train=4, valid=0))


def test_a_position_gives_the_same_scan_whatever_came_before(
    dataset: PreparedDataset, config: Config
) -> None:
    phase = PhaseConfig(localization_crop=(24, 48, 48))
    first, second = (ScanStream(dataset, config, phase, 2) for _ in range(2))
    for position in (7, 3, 12):
        _ = second[position + 1]
        a, b = first[position], second[position]
        assert (a.case_id, a.box) == (b.case_id, b.box)
        np.testing.assert_array_equal(a.intensity_DHW, b.intensity_DHW)
        np.testing.assert_array_equal(a.masks_LDHW, b.masks_LDHW)


def test_an_epoch_shows_every_scan_once(dataset: PreparedDataset, config: Config) -> None:
    stream = ScanStream(dataset, config, PhaseConfig(), 1)
    for epoch in (0, 5):
        shown = {stream[epoch * len(dataset) + place].case_id for place in range(len(dataset))}
        assert len(shown) == len(dataset)


def test_processes_share_the_scans_of_a_step(config: Config) -> None:
    phase = PhaseConfig(batch_size=2, accumulate=2, steps=3)
    alone = [position for batch in StepSampler(phase, 0, 0, 1) for position in batch]
    halved = phase.model_copy(update={"accumulate": 1})
    ranks = [list(StepSampler(halved, 0, rank, 2)) for rank in range(2)]
    together = [position for pair in zip(*ranks, strict=True) for batch in pair for position in batch]
    assert together == alone == list(range(12))
    assert [p for batch in StepSampler(phase, 1, 0, 1) for p in batch] == alone[4:]


def test_a_box_of_a_scan_is_labeled_by_what_lies_in_it(dataset: PreparedDataset, config: Config) -> None:
    training = config.training.model_copy(update={"augmentation": NO_AUGMENTATION})
    quiet = config.model_copy(update={"training": training})
    phase = LocalPhase(scan_crop=(16, 32, 32), without_regions=0.0)
    stream = ScanStream(dataset, quiet, phase, 1)
    whole = ScanStream(dataset, quiet, PhaseConfig(without_regions=0.0), 1)
    seen = absent = 0
    for position in range(12):
        cut = stream[position]
        scan = next(w for w in (whole[p] for p in range(len(dataset))) if w.case_id == cut.case_id)
        assert cut.place is not None
        (z, y, x), grid = cut.place
        assert grid == scan.guidance_KZYX.shape[1:]
        part = scan.intensity_DHW[z[0] * 4 : z[1] * 4, y[0] * 16 : y[1] * 16, x[0] * 16 : x[1] * 16]
        np.testing.assert_array_equal(cut.intensity_DHW, part)
        for disease, label in enumerate(cut.labels_K):
            if scan.labels_K[disease] == 0:
                assert label == 0
            elif not scan.guidance_KZYX[disease].any():
                assert np.isnan(label)
            else:
                assert label == cut.guidance_KZYX[disease].any()
                seen, absent = seen + (label == 1), absent + (label == 0)
    assert seen > 5
    assert absent > 5


def test_boxes_of_one_scan_differ_and_do_not_depend_on_what_was_read(
    dataset: PreparedDataset, config: Config
) -> None:
    phase = LocalPhase(scan_crop=(16, 32, 32), boxes_per_scan=3)
    in_order = ScanStream(dataset, config, phase, 1)
    boxes = [in_order[position] for position in range(3 * len(dataset))]
    scans = [box.case_id for box in boxes]
    assert scans == [name for name in scans[::3] for _ in range(3)]
    assert len(set(scans)) == len(dataset)
    assert len({box.place for box in boxes}) > len(dataset)
    for position in (10, 4, 5):
        again = ScanStream(dataset, config, phase, 1)[position]
        assert again.place == boxes[position].place
        np.testing.assert_array_equal(again.intensity_DHW, boxes[position].intensity_DHW)
        np.testing.assert_array_equal(again.labels_K, boxes[position].labels_K)


def test_boxes_that_teach_masks_alone_are_laid_over_lesions(dataset: PreparedDataset, config: Config) -> None:
    phase = PhaseConfig(tasks={"localization": 1.0}, scan_crop=(16, 32, 32), lesion_crops=1.0)
    stream = ScanStream(dataset, config, phase, 3)
    with_lesion = {
        case.case_id for case in dataset.cases if any(case.lesion_voxels[key] for key in stream.lesion_keys)
    }
    shown = [scan for scan in (stream[p] for p in range(12)) if scan.case_id in with_lesion]
    assert len(shown) > 5
    assert all((scan.masks_LDHW == 1).any() for scan in shown)


def test_a_scan_and_a_step_of_the_same_number_are_drawn_apart(
    dataset: PreparedDataset, config: Config
) -> None:
    """Else a step without a task would be the one whose scan comes without its anatomy."""
    phase = PhaseConfig(tasks={"classification": 0.5, "localization": 0.5}, without_regions=0.5)
    stream = ScanStream(dataset, config, phase, 1)
    hidden = [stream[position].regions_DHW is None for position in range(24)]
    seed = config.training.seed
    first = [np.random.default_rng([seed, 1, 2, step]).random() < 0.5 for step in range(24)]
    assert 0 < sum(a == b for a, b in zip(hidden, first, strict=True)) < 24


def test_scans_of_different_size_are_padded_with_air(dataset: PreparedDataset, config: Config) -> None:
    stream = ScanStream(dataset, config, LocalPhase(scan_crop=(16, 32, 32)), 1)
    small = stream[0]
    large = stream[1]._replace(
        intensity_DHW=np.zeros((20, 48, 32), np.float32),
        masks_LDHW=np.zeros((len(small.masks_LDHW), 20, 48, 32), np.int8),
        guidance_KZYX=np.zeros((18, 5, 3, 2), bool),
        regions_DHW=None,
    )
    batch = collate([small, large])
    assert batch.intensity_B1DHW.shape == (2, 1, 20, 48, 32)
    assert (batch.intensity_B1DHW[0, 0, 16:] == -1).all()
    assert batch.guidance_BKZYX.shape == (2, 18, 5, 3, 2)


def test_padding_tells_nothing_of_lesions_that_nobody_annotated(
    dataset: PreparedDataset, config: Config
) -> None:
    stream = ScanStream(dataset, config, PhaseConfig(scan_crop=(16, 32, 32)), 1)
    small = stream[0]
    unknown = small._replace(masks_LDHW=np.full_like(small.masks_LDHW, -1))
    large = ScanStream(dataset, config, PhaseConfig(scan_crop=(24, 48, 48)), 1)[1]
    masks = collate([unknown, large]).masks_BLDHW
    assert (masks[0] == -1).all()
    _, known_BL, annotated = stack_lesion_masks(masks, masks.shape[1])
    assert not known_BL[0].any()
    assert annotated is None
    padded = collate([small, large]).masks_BLDHW[0]
    assert (padded[4, 16:] == 0).all()
