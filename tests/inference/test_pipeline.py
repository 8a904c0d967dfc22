"""From a scan to a prediction: axes, formats and anatomy change nothing that they should not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from support.phantoms import coarse_phantom
from support.scan_files import canonical, reoriented
from support.small_cases import case
from support.small_models import small_model
from vlm3d.anatomy.regions import LEFT_LUNG_IDS, RIGHT_LUNG_IDS
from vlm3d.datasets.case import CaseData
from vlm3d.datasets.prepare import prepare
from vlm3d.errors import ConfigError, MaskError, ResourceError, UnreadableFileError
from vlm3d.inference.pipeline import Pipeline, PredictionSettings, Result
from vlm3d.inference.prediction import TRAINING_NOTES
from vlm3d.inference.uncertainty import entropy_bits, mask_entropy_bits
from vlm3d.io import read_volume
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.seen_places import SeenPlace
from vlm3d.volume import RegionMap, Volume


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(small_model(with_text=False), checkpoint="small")


@pytest.fixture(scope="module")
def settings(pipeline: Pipeline) -> PredictionSettings:
    """A mask threshold that the untrained model's voxels reach in part."""
    phantom = coarse_phantom()
    plain = PredictionSettings(report=False)
    found = pipeline(phantom.volume, plain, mask=phantom.regions).prediction.lesions
    return PredictionSettings(
        report=False, localization_threshold=0.98 * min(item.max_probability for item in found)
    )


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * (first & second).sum() / max(first.sum() + second.sum(), 1)


def compare(one: Result, two: Result) -> None:
    """Same probabilities; same masks in the patient's space."""
    for a, b in zip(one.prediction.diseases, two.prediction.diseases, strict=True):
        assert abs(a.probability - b.probability) < 1e-3
    seen = 0
    for key in LESION_KEYS:
        first, _ = canonical(one.masks[key], one.volume.affine)
        second, _ = canonical(two.masks[key], two.volume.affine)
        assert first.any() == second.any()
        assert not first.any() or dice(first, second) >= 0.99, key
        seen += int(first.any())
    assert seen > 0


def test_all_48_axis_orders_and_flips_give_one_prediction(
    pipeline: Pipeline, settings: PredictionSettings
) -> None:
    phantom = coarse_phantom()
    base = pipeline(phantom.volume, settings, mask=phantom.regions)
    for order in itertools.permutations(range(3)):
        for flips in itertools.product([False, True], repeat=3):
            voxels, affine = reoriented(phantom.volume.voxels_DHW, phantom.volume.affine, order, flips)
            labels, _ = reoriented(phantom.regions.labels_DHW, phantom.volume.affine, order, flips)
            result = pipeline(Volume(voxels, affine), settings, mask=RegionMap(labels, affine))
            assert result.masks["lung_nodule"].shape == voxels.shape
            compare(base, result)
            for a, b in zip(base.prediction.lesions, result.prediction.lesions, strict=True):
                assert [c.side for c in a.components] == [c.side for c in b.components]


@pytest.mark.parametrize(
    ("order", "flips"), [((2, 1, 0), (True, False, True)), ((1, 0, 2), (False, True, False))]
)
def test_the_embedded_anatomy_follows_the_axes_too(
    pipeline: Pipeline, settings: PredictionSettings, order: tuple[int, ...], flips: tuple[bool, ...]
) -> None:
    phantom = coarse_phantom()
    turned = Volume(*reoriented(phantom.volume.voxels_DHW, phantom.volume.affine, order, flips))
    settings = replace(settings, localization_threshold=0.9 * settings.localization_threshold)
    base, result = pipeline(phantom.volume, settings), pipeline(turned, settings)
    assert base.regions is not None
    assert result.regions is not None
    back, _ = canonical(result.regions.labels_DHW, turned.affine)
    np.testing.assert_array_equal(base.regions.labels_DHW, back)
    compare(base, result)


def test_the_prediction_says_what_it_is(pipeline: Pipeline, settings: PredictionSettings) -> None:
    prediction = pipeline(coarse_phantom().volume, settings).prediction
    assert [item.name for item in prediction.diseases] == list(DISEASE_NAMES)
    assert [item.key for item in prediction.lesions] == list(LESION_KEYS)
    assert "UNTRAINED" in prediction.training_note
    assert "not a medical device" in prediction.disclaimer
    assert prediction.scan.anatomy == "classical"
    assert set(prediction.seconds) >= {
        "read",
        "anatomy",
        "prepare",
        "encode",
        "classify",
        "localize",
        "measure",
    }
    assert len(prediction.model.fingerprint) == 16
    assert prediction.peak_rss_mb > 0
    assert not prediction.report.generated
    again = type(prediction).model_validate_json(prediction.model_dump_json())
    assert again == prediction


def test_lesions_are_measured_on_the_scans_grid(pipeline: Pipeline, settings: PredictionSettings) -> None:
    result = pipeline(coarse_phantom().volume, settings)
    voxel_ml = float(np.prod(result.volume.spacing_mm)) / 1000
    for lesion in result.prediction.lesions:
        assert lesion.volume_ml == pytest.approx(result.masks[lesion.key].sum() * voxel_ml)
        volumes = [component.volume_ml for component in lesion.components]
        assert volumes == sorted(volumes, reverse=True)
        assert all(volume >= settings.min_lesion_ml for volume in volumes)
        for component in lesion.components:
            place = result.volume.affine @ [*component.centroid_index_dhw, 1]
            assert component.centroid_ras_mm == pytest.approx(place[:3])
            assert component.mean_probability >= lesion.threshold - 1e-6


def test_a_report_is_written_and_is_deterministic(pipeline: Pipeline) -> None:
    settings = PredictionSettings(max_new_tokens=12, temperature=0.8, seed=3)
    phantom = coarse_phantom()
    texts = [pipeline(phantom.volume, settings, mask=phantom.regions).prediction.report for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].generated
    assert texts[0].text.startswith("Findings:")
    assert texts[0].uncertainty > 0


def test_labels_beyond_the_eighteen_are_told_without_a_place() -> None:
    base = small_model()
    text, llm = base.classifier.text_encoder, base.report_generator.llm
    assert text is not None
    assert llm is not None
    model = VLM3DMultiTask(
        base.config, num_diseases=20, text_encoder=text, load_llm=False, llm_dim=llm.hidden_size
    )
    model.report_generator.attach_llm(llm)
    phantom = coarse_phantom()
    settings = PredictionSettings(classification_threshold=1e-6, max_new_tokens=4)
    found = Pipeline(model, checkpoint="small")(phantom.volume, settings, mask=phantom.regions).prediction
    assert [disease.name for disease in found.diseases[18:]] == ["Disease 19", "Disease 20"]
    assert all(disease.positive and not disease.places for disease in found.diseases[18:])


def test_no_anatomy_works(pipeline: Pipeline) -> None:
    result = pipeline(coarse_phantom().volume, PredictionSettings(anatomy="none", report=False))
    assert result.regions is None
    assert result.prediction.scan.anatomy == "none"


def test_a_users_mask_is_used_and_checked(
    pipeline: Pipeline, settings: PredictionSettings, tmp_path: Path
) -> None:
    phantom = coarse_phantom()
    labels = phantom.regions.labels_DHW
    image = nib.Nifti1Image(labels.transpose(2, 1, 0), phantom.volume.affine[:, [2, 1, 0, 3]])
    nib.save(image, tmp_path / "mask.nii.gz")
    by_file = pipeline(phantom.volume, settings, mask=tmp_path / "mask.nii.gz")
    assert by_file.prediction.scan.anatomy == "file"
    compare(pipeline(phantom.volume, settings, mask=phantom.regions), by_file)
    nib.save(nib.Nifti1Image(labels[1:].transpose(2, 1, 0), image.affine), tmp_path / "short.nii.gz")
    with pytest.raises(MaskError, match="another grid"):
        pipeline(phantom.volume, settings, mask=tmp_path / "short.nii.gz")


@pytest.mark.parametrize(("lost", "noted"), [(LEFT_LUNG_IDS, "right"), (RIGHT_LUNG_IDS, "left"), ((), None)])
def test_a_scan_of_one_lung_says_that_sides_deserve_a_look(
    pipeline: Pipeline, settings: PredictionSettings, lost: tuple[int, ...], noted: str | None
) -> None:
    phantom = coarse_phantom()
    labels_DHW = np.where(np.isin(phantom.regions.labels_DHW, lost), 0, phantom.regions.labels_DHW).astype(
        np.uint8
    )
    mask = RegionMap(labels_DHW, phantom.volume.affine, "file")
    notes = pipeline(phantom.volume, settings, mask=mask).prediction.scan.notes
    told = [note for note in notes if "lung was found" in note]
    assert told == ([f"Only a {noted} lung was found: check the sides that are told."] if noted else [])


def test_too_little_memory_is_one_line(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(pipeline.model, "encode", out_of_memory)
    with pytest.raises(ResourceError, match="memory"):
        pipeline(coarse_phantom().volume, PredictionSettings(anatomy="none", report=False))


@pytest.mark.parametrize(
    "wrong",
    [
        {"classification_threshold": 1.0},
        {"localization_threshold": 0.0},
        {"min_lesion_ml": -1.0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"on_contradiction": "ignore"},
        {"regenerate_attempts": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PredictionSettings(**wrong)


def test_entropy() -> None:
    assert entropy_bits(np.array([0.5])) == pytest.approx(1.0)
    assert entropy_bits(np.array([0.0, 1.0])) == pytest.approx(0.0, abs=1e-9)
    sure, unsure = np.zeros((4, 4, 4), np.float32), np.zeros((4, 4, 4), np.float32)
    sure[1, 1, 1], unsure[1, 1, 1] = 0.999, 0.6
    assert 0 <= mask_entropy_bits(sure, 0.5) < mask_entropy_bits(unsure, 0.5) <= 1


@pytest.mark.real_data
def test_a_dicom_series_and_the_nifti_made_from_it_predict_alike(
    pipeline: Pipeline, settings: PredictionSettings, real_data: Path, tmp_path: Path
) -> None:
    series = read_volume(real_data / "lung_dx_a0001" / "dicom")
    image = nib.Nifti1Image(series.voxels_DHW.transpose(2, 1, 0), series.affine[:, [2, 1, 0, 3]])
    nib.save(image, tmp_path / "ct.nii.gz")
    one, two = (
        pipeline(path, settings) for path in (real_data / "lung_dx_a0001" / "dicom", tmp_path / "ct.nii.gz")
    )
    assert one.prediction.diseases == two.prediction.diseases
    assert one.prediction.lesions == two.prediction.lesions
    for key in LESION_KEYS:
        np.testing.assert_array_equal(one.masks[key], two.masks[key])


def test_a_task_that_was_never_trained_is_named_in_the_note() -> None:
    model = small_model()
    model.training_status, model.untrained_tasks = "synthetic", ("generation",)
    settings, phantom = PredictionSettings(report=False, anatomy="none"), coarse_phantom()
    note = Pipeline(model, checkpoint="test")(phantom.volume, settings).prediction.training_note
    assert "synthetic phantoms" in note
    assert "report writer was NOT TRAINED" in note
    model.untrained_tasks = ()
    note = Pipeline(model, checkpoint="test")(phantom.volume, settings).prediction.training_note
    assert note == TRAINING_NOTES["synthetic"]


@pytest.mark.parametrize(
    ("learned", "anatomy", "own_mask", "told"),
    [
        (("phantom",), "none", False, "(phantom) than was found for this scan (none)"),
        (("phantom",), "classical", False, "(phantom) than was found for this scan (classical)"),
        (("phantom", "classical"), "classical", False, ""),
        (("phantom",), "classical", True, ""),
        ((), "classical", False, ""),
    ],
)
def test_an_anatomy_that_no_weights_learned_with_is_named_in_the_note(
    learned: tuple[str, ...], anatomy: str, own_mask: bool, told: str
) -> None:
    model, phantom = small_model(with_text=False), coarse_phantom()
    model.training_status, model.untrained_tasks, model.learned_anatomy = "synthetic", (), learned
    settings = PredictionSettings(report=False, anatomy=anatomy)  # type: ignore[arg-type]
    mask = phantom.regions if own_mask else None
    note = Pipeline(model, checkpoint="test")(phantom.volume, settings, mask=mask).prediction.training_note
    assert ("another anatomy" in note) == bool(told)
    assert told in note


def test_a_report_is_checked_against_its_own_findings(pipeline: Pipeline) -> None:
    phantom = coarse_phantom()
    base = PredictionSettings(max_new_tokens=4, classification_threshold=1e-6, on_contradiction="flag")
    flagged = pipeline(phantom.volume, base, mask=phantom.regions).prediction
    check = flagged.report.check
    assert check is not None
    assert {item.finding for item in check.contradictions if item.kind == "not_mentioned"} == set(
        DISEASE_NAMES
    )
    assert check.count == len(check.contradictions)
    again = replace(base, on_contradiction="regenerate", regenerate_attempts=2)
    check = pipeline(phantom.volume, again, mask=phantom.regions).prediction.report.check
    assert check is not None
    assert len(check.counts_by_attempt) == 3
    assert check.count == min(check.counts_by_attempt)
    repaired = pipeline(
        phantom.volume, replace(base, on_contradiction="repair"), mask=phantom.regions
    ).prediction
    assert repaired.report.check is not None
    assert repaired.report.check.count == 0
    assert repaired.report.text != flagged.report.text
    assert type(repaired).model_validate_json(repaired.model_dump_json()) == repaired


def test_volume_by_region_adds_up(pipeline: Pipeline, settings: PredictionSettings) -> None:
    phantom = coarse_phantom()
    result = pipeline(phantom.volume, settings, mask=phantom.regions)
    for lesion in result.prediction.lesions:
        in_regions = (result.masks[lesion.key] & (phantom.regions.labels_DHW > 0)).sum()
        voxel_ml = float(np.prod(result.volume.spacing_mm)) / 1000
        assert sum(lesion.volume_ml_by_region.values()) == pytest.approx(in_regions * voxel_ml)
        assert list(lesion.volume_ml_by_region.values()) == sorted(
            lesion.volume_ml_by_region.values(), reverse=True
        )


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_place_that_was_looked_at_leads_to_its_slice(pipeline: Pipeline, order: tuple[int, ...]) -> None:
    scan = coarse_phantom().volume
    depth = pipeline.model.config.model.vision.patch_size[0]
    for flips in itertools.product((False, True), repeat=3):
        volume = Volume(*reoriented(scan.voxels_DHW, scan.affine, order, flips))
        geometry = pipeline.preprocessor.apply(volume).geometry
        for patch_z in (1.0, 1.5, 2.25):
            (place,) = pipeline._places([SeenPlace("left", "", "lower", patch_z)], geometry)
            looked_mm = (geometry.model_affine @ np.array([(patch_z + 0.5) * depth - 0.5, 0, 0, 1]))[2]
            slice_mm = (geometry.canonical_affine @ np.array([place.key_slice, 0, 0, 1]))[2]
            assert abs(looked_mm - slice_mm) <= abs(geometry.canonical_affine[2, 0]) / 2 + 1e-6


def test_a_case_of_a_store_is_predicted_with_its_regions(pipeline: Pipeline, tmp_path: Path) -> None:
    phantom = coarse_phantom()
    data = partial(CaseData, phantom.volume, phantom.regions)
    config = pipeline.model.config.preprocessing
    prepare([case("a", data)], tmp_path / "store", config, anatomy="given", workers=1)
    folder = tmp_path / "store" / "cases" / "a"
    settings = PredictionSettings(report=False)
    stored = pipeline(folder, settings).prediction
    assert stored.scan.anatomy == phantom.regions.method
    direct = pipeline(phantom.volume, settings, mask=phantom.regions).prediction
    for a, b in zip(stored.diseases, direct.diseases, strict=True):
        assert a.probability == pytest.approx(b.probability, abs=0.02)
    (folder / "image.b2nd").write_bytes(b"cut")
    with pytest.raises(UnreadableFileError, match="no whole prepared case"):
        pipeline(folder, settings)
