"""Thresholds tuned on a validation split lie beside the weights that they were tuned for, and predict takes them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.phantoms import coarse_phantom
from support.small_models import small_model
from support.training_store import phantom_store
from vlm3d.datasets.augmentation import NO_AUGMENTATION
from vlm3d.datasets.prepared import PreparedArrays, PreparedDataset
from vlm3d.errors import CheckpointError, ConfigError, InputError
from vlm3d.evaluation.case_prediction import _varied, tuning_scans
from vlm3d.inference.loading import load_pipeline
from vlm3d.inference.pipeline import Pipeline, PredictionSettings
from vlm3d.inference.thresholds import thresholds_for, tune_checkpoint
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.checkpoint import (
    THRESHOLDS_FILE,
    StoredThresholds,
    heads_fingerprint,
    read_thresholds,
    write_thresholds,
)
from vlm3d.model.head_fusion import HeadFusion, MaskRule, Mix, Presence
from vlm3d.model.multi_task_model import VLM3DMultiTask

PLAIN = PredictionSettings(anatomy="none", report=False)


@pytest.fixture(scope="module")
def model() -> VLM3DMultiTask:
    return small_model(with_text=False)


@pytest.fixture
def folder(model: VLM3DMultiTask, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def stored(model: VLM3DMultiTask, **values: float) -> StoredThresholds:
    return StoredThresholds(values, "made up", heads_fingerprint(model.checkpoint_state_dict(), model.config))


def test_predict_takes_the_checkpoints_thresholds_unless_told_otherwise(
    model: VLM3DMultiTask, folder: Path
) -> None:
    write_thresholds(folder, stored(model, Emphysema=1.0, Cardiomegaly=0.0))
    pipeline = load_pipeline(folder, with_report=False, device="cpu")
    volume = coarse_phantom().volume
    prediction = pipeline(volume, PLAIN).prediction
    found = {disease.name: disease for disease in prediction.diseases}
    assert (found["Emphysema"].threshold, found["Emphysema"].positive) == (1.0, False)
    assert (found["Cardiomegaly"].threshold, found["Cardiomegaly"].positive) == (0.0, True)
    assert found["Atelectasis"].threshold == 0.5
    assert prediction.model.thresholds == "made up"
    asked = pipeline(volume, replace(PLAIN, classification_threshold=0.3)).prediction
    assert {disease.threshold for disease in asked.diseases} == {0.3}
    assert asked.model.thresholds == "0.3 for every disease, as asked"


def test_without_thresholds_it_is_one_half(model: VLM3DMultiTask, folder: Path) -> None:
    assert thresholds_for(model, folder) is None
    prediction = Pipeline(model, checkpoint="test")(coarse_phantom().volume, PLAIN).prediction
    assert {disease.threshold for disease in prediction.diseases} == {0.5}
    assert prediction.model.thresholds == "0.5 for every disease"


def test_thresholds_of_other_weights_are_refused_and_dropped_on_saving(
    model: VLM3DMultiTask, folder: Path
) -> None:
    write_thresholds(folder, stored(model, Emphysema=0.2))
    other = small_model(with_text=False)
    with torch.no_grad():
        next(other.vision_encoder.parameters()).add_(1.0)
    with pytest.raises(CheckpointError, match="other weights"):
        thresholds_for(other, folder)
    with_other_words = small_model(with_text=False)
    with torch.no_grad():
        next(with_other_words.report_generator.projector.parameters()).add_(1.0)
    assert thresholds_for(with_other_words, folder) is not None
    other.save_pretrained(folder)
    assert read_thresholds(folder) is None


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        "{}",
        json.dumps({"values": {"Emphysema": 1.5}, "source": "", "fingerprint": ""}),
        json.dumps({"values": {"Emphysema": "low"}, "source": "", "fingerprint": ""}),
        '{"values": {"Emphysema": NaN}, "source": "", "fingerprint": ""}',
        json.dumps({"values": {}, "source": "", "fingerprint": "", "fusion": {"diseases": {}}}),
        json.dumps({"values": {}, "source": "", "fingerprint": "", "fusion": 1}),
    ],
)
def test_damaged_thresholds_are_one_line(folder: Path, content: str) -> None:
    (folder / THRESHOLDS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"thresholds\.json") as caught:
        read_thresholds(folder)
    assert "\n" not in str(caught.value)


def test_thresholds_need_a_checkpoint(model: VLM3DMultiTask, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        write_thresholds(tmp_path, stored(model))


def test_tuning_writes_them_beside_the_weights(model: VLM3DMultiTask, folder: Path, tmp_path: Path) -> None:
    store = phantom_store(tmp_path / "store", model.config, train=1, valid=3)
    with pytest.raises(ConfigError, match="training split"):
        tune_checkpoint(folder, store, split="train")
    with pytest.raises(InputError, match="no case"):
        tune_checkpoint(folder, store, split="test")
    with pytest.raises(ConfigError, match="0 times or more"):
        tune_checkpoint(folder, store, variations=-1)
    assert read_thresholds(folder) is None
    tuned = tune_checkpoint(folder, store)
    assert read_thresholds(folder) == tuned
    assert list(tuned.values) == list(DISEASE_NAMES)
    assert "valid" in tuned.source
    assert set(tuned.values.values()) != {0.5}
    assert load_pipeline(folder, with_report=False, device="cpu").thresholds == tuned


def fused(model: VLM3DMultiTask, offset: float) -> StoredThresholds:
    """The nodule's probability and presence are those of an offset alone; its mask lies at every voxel."""
    rule = MaskRule(-1000.0, 0.0, 0.0, presence=Presence(0.0, 0.0, offset, dice_to_beat=0.5))
    fusion = HeadFusion({"Lung nodule": Mix(0.0, {"lung_nodule": 0.0}, offset)}, {"lung_nodule": rule})
    return replace(stored(model), fusion=fusion)


@pytest.mark.parametrize("offset", [-3.0, 3.0])
def test_a_lesion_is_drawn_only_where_both_heads_together_find_it(
    model: VLM3DMultiTask, folder: Path, offset: float
) -> None:
    volume, settings = coarse_phantom().volume, replace(PLAIN, localization_threshold=1e-6)
    plain = load_pipeline(folder, with_report=False, device="cpu")(volume, settings)
    write_thresholds(folder, fused(model, offset))
    found = load_pipeline(folder, with_report=False, device="cpu")(volume, settings)
    for lesion, alone in zip(found.prediction.lesions, plain.prediction.lesions, strict=True):
        assert alone.presence is None
        assert alone.expected_dice is None
        assert found.masks[lesion.key].any() == (offset > 0 or lesion.key != "lung_nodule")
        if lesion.key != "lung_nodule":
            assert lesion == alone
    nodule = found.prediction.lesions[-1]
    assert nodule.presence == pytest.approx(1 / (1 + math.exp(-offset)))
    assert nodule.expected_dice == pytest.approx(2 * 0.5 / (1 + 0.5))
    assert nodule.presence_threshold == pytest.approx(0.5 / (0.5 + 2 / 3))
    disease = next(item for item in found.prediction.diseases if item.name == "Lung nodule")
    assert disease.probability == pytest.approx(nodule.presence)


def test_a_fusion_of_another_localizer_is_refused(model: VLM3DMultiTask, folder: Path) -> None:
    write_thresholds(folder, fused(model, 1.0))
    other = small_model(with_text=False)
    with torch.no_grad():
        next(other.localizer.unet.parameters()).add_(1.0)
    with pytest.raises(CheckpointError, match="other weights"):
        thresholds_for(other, folder)


def test_thresholds_of_masks_that_were_read_otherwise_are_refused(
    model: VLM3DMultiTask, folder: Path
) -> None:
    write_thresholds(folder, fused(model, 1.0))
    other = small_model(with_text=False)
    sizes = other.config.model
    localizer = sizes.localizer.model_copy(update={"read_mirrored": True})
    other.config = other.config.model_copy(
        update={"model": sizes.model_copy(update={"localizer": localizer})}
    )
    with pytest.raises(CheckpointError, match="other weights"):
        thresholds_for(other, folder)


def test_a_localizer_that_learned_is_weighed_in(model: VLM3DMultiTask, folder: Path, tmp_path: Path) -> None:
    store = phantom_store(tmp_path / "store", model.config, train=1, valid=14)
    trained = small_model(with_text=False)
    trained.untrained_tasks = ()
    trained.save_pretrained(folder)
    fusion = tune_checkpoint(folder, store).fusion
    assert fusion is not None
    assert fusion.masks
    varied = tune_checkpoint(folder, store, variations=2).fusion
    assert varied is not None
    assert (varied.diseases, varied.masks.keys()) == (fusion.diseases, fusion.masks.keys())
    assert varied.masks != fusion.masks
    again = tune_checkpoint(folder, store)
    assert again.fusion == fusion
    assert read_thresholds(folder) == thresholds_for(VLM3DMultiTask.from_pretrained(folder), folder)


def test_a_scan_is_read_as_stored_and_then_varied(
    model: VLM3DMultiTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PreparedDataset(phantom_store(tmp_path / "store", model.config, train=1, valid=1), ("valid",))
    (case,) = dataset.cases
    dataset.cases = [replace(case, known_lesions=("lung_nodule", "pleural_effusion"))]
    stored, first, second = tuning_scans(model, dataset, 0, variations=2)
    assert set(stored.counts) == set(first.counts) == {"lung_nodule", "pleural_effusion"}
    (alone,) = tuning_scans(model, dataset, 0)
    assert alone.odds == stored.odds
    assert first.odds != stored.odds
    assert first.odds != second.odds
    again = tuning_scans(model, dataset, 0, variations=1)[1]
    assert again.odds == first.odds
    voxels = {scan.counts["lung_nodule"].voxels_B.sum() for scan in (stored, first, second)}
    assert voxels == {float(np.prod(case.shape_DHW))}
    only_mirrored = NO_AUGMENTATION.model_copy(update={"flip_probability": 1.0})
    training = model.config.training.model_copy(update={"augmentation": only_mirrored})
    monkeypatch.setattr(model, "config", model.config.model_copy(update={"training": training}))
    assert tuning_scans(model, dataset, 0, variations=1)[1].odds == stored.odds
    dataset.cases = [replace(case, known_lesions=())]
    (unannotated,) = tuning_scans(model, dataset, 0, variations=2)
    assert unannotated.counts == {}
    (without_masks,) = tuning_scans(model, dataset, 0, masks=False, variations=2)
    assert without_masks.odds.peaks == {}


@pytest.mark.parametrize("seed", range(3))
def test_a_varied_scan_takes_its_lesions_and_regions_along(model: VLM3DMultiTask, seed: int) -> None:
    moving = model.config.training.augmentation.model_copy(
        update={"geometry_probability": 1.0, "rotate_degrees": 10.0, "translate_voxels": 4.0}
    )
    training = model.config.training.model_copy(update={"augmentation": moving})
    moved = SimpleNamespace(config=model.config.model_copy(update={"training": training}))
    lesion = np.zeros((16, 40, 40), bool)
    lesion[5:11, 8:20, 22:34] = True
    scan = PreparedArrays(
        np.where(lesion, 300, -900).astype(np.int16), lesion.astype(np.uint8), lesion.astype(np.uint8)
    )
    case = SimpleNamespace(regions_method="made up", report=None, case_id="one", spacing_mm=(3.0, 1.5, 1.5))
    varied = _varied(moved, scan, case, [seed])  # type: ignore[arg-type]
    there = varied.lesion_bits_DHW > 0
    assert there.any()
    assert not np.array_equal(there, lesion)
    np.testing.assert_array_equal(there, varied.regions_DHW > 0)
    assert varied.hu_DHW[there].mean() > 0
    assert varied.hu_DHW[~there].mean() < -700
    np.testing.assert_array_equal(scan.lesion_bits_DHW, lesion)  # what is stored stays
