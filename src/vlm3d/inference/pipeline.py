"""A chest CT on disk becomes a `Prediction`: the one path that the command line and a notebook share.

read -> anatomy -> prepare -> encode -> classify, localize -> masks on the scan's grid -> measure -> report.
"""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm3d.anatomy.mask_file import read_region_mask
from vlm3d.anatomy.measurement import (
    Component,
    drop_small_pieces,
    find_landmarks,
    measure_lesion,
)
from vlm3d.anatomy.regions import LEFT_LUNG_IDS, RIGHT_LUNG_IDS
from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.datasets.prepared import is_prepared_case, read_prepared_case
from vlm3d.errors import ResourceError, SeriesError
from vlm3d.inference.consistency import consistent_report
from vlm3d.inference.lesion_record import listed_piece, listed_places, volume_ml_by_region
from vlm3d.inference.prediction import (
    OTHER_ANATOMY_NOTE,
    TRAINING_NOTES,
    UNTRAINED_TASK_NOTES,
    AttentionPlace,
    DiseaseFinding,
    LesionFinding,
    ModelInfo,
    Prediction,
    Report,
    ScanInfo,
)
from vlm3d.inference.settings import PredictionSettings
from vlm3d.inference.uncertainty import entropy_bits, mask_entropy_bits
from vlm3d.io import read_volume
from vlm3d.labels import TASKS
from vlm3d.model.checkpoint import DEFAULT_THRESHOLD, StoredThresholds, threshold_of
from vlm3d.model.head_fusion import MaskDecision, draw_lesions
from vlm3d.model.heads import read_heads
from vlm3d.model.location import describe_findings, places_of
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.report_generator import LesionEvidence
from vlm3d.model.report_writing import GeneratedReport
from vlm3d.model.seen_places import SeenPlace
from vlm3d.model.vision_encoder import VisionFeatures
from vlm3d.preprocessing.geometry import ScanGeometry
from vlm3d.preprocessing.orientation import (
    axis_codes,
    canonical_view,
    from_canonical,
    to_canonical,
)
from vlm3d.preprocessing.preprocessor import PreparedScan, Preprocessor
from vlm3d.version import VERSION
from vlm3d.volume import RegionMap, Volume

__all__ = ["Pipeline", "PredictionSettings", "Result", "peak_rss_mb"]

logger = logging.getLogger(__name__)

MAX_LISTED_COMPONENTS = 20
REWRITING_TEMPERATURE = 0.7
"""Of reports that are written again, where the first was decoded greedily: another seed changes nothing at 0."""


@dataclass(frozen=True)
class Result:
    """A prediction with the arrays that belong to it.

    Attributes:
        prediction: Everything but arrays.
        volume: The scan on its own grid, HU.
        masks: Lesion key -> bool mask on the scan's grid.
        regions: Anatomy on the scan's grid, or None.
    """

    prediction: Prediction
    volume: Volume
    masks: dict[str, NDArray[np.bool_]]
    regions: RegionMap | None


@dataclass
class _Stopwatch:
    """Wall time a stage; a stage that starts is told to whoever listens."""

    listener: Callable[[str], None] | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.listener is not None:
            self.listener(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


class Pipeline:
    """Reads scans and predicts; the model is loaded once and used for any number of scans.

    Args:
        model: In evaluation mode after this.
        checkpoint: What to call its weights in the outputs.
        device: ``"cpu"``, ``"cuda"`` or a torch device.
        thresholds: Of the diseases, tuned for these weights.
    """

    def __init__(
        self,
        model: VLM3DMultiTask,
        *,
        checkpoint: str,
        device: str | torch.device = "cpu",
        thresholds: StoredThresholds | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.preprocessor = Preprocessor(model.config.preprocessing)
        self.thresholds = thresholds
        self.model_info = ModelInfo(
            config=model.config.name,
            checkpoint=checkpoint,
            fingerprint=model.fingerprint(),
            training=model.training_status,
            llm=model.config.model.report.llm_name,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            untrained_tasks=list(model.untrained_tasks),
        )

    @torch.inference_mode()
    def __call__(
        self,
        scan: str | Path | Volume,
        settings: PredictionSettings | None = None,
        *,
        mask: str | Path | RegionMap | None = None,
        series: str | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Result:
        """Predict one scan.

        Args:
            scan: A file, a DICOM folder or zip, a case of a prepared store, or a volume in HU.
            settings: What to predict and how.
            mask: The user's anatomy on the scan's grid, instead of segmenting it.
            series: Which DICOM series, by number or UID.
            on_stage: Called with the name of each stage as it begins.

        Raises:
            InputError: The scan or the mask cannot be used.
            ResourceError: The machine has too little memory.
        """
        settings = settings or PredictionSettings()
        watch = _Stopwatch(on_stage)
        try:
            return self._predict(scan, settings, mask, series, watch)
        except (MemoryError, torch.cuda.OutOfMemoryError) as error:
            raise ResourceError(f"{_name(scan)}: too little memory for this scan on {self.device}") from error
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            raise ResourceError(f"{_name(scan)}: too little memory for this scan on {self.device}") from error

    def _predict(
        self,
        scan: str | Path | Volume,
        settings: PredictionSettings,
        mask: str | Path | RegionMap | None,
        series: str | None,
        watch: _Stopwatch,
    ) -> Result:
        with watch.stage("read"):
            volume, stored = _read(scan, series)
        with watch.stage("anatomy"):
            takes_stored = stored is not None and mask is None and settings.anatomy == "classical"
            regions = stored if takes_stored else self._regions(volume, mask, settings)
        with watch.stage("prepare"):
            prepared = self.preprocessor.apply(volume, regions)
        found = read_heads(self.model, *self._tensors(prepared), stage=watch.stage)
        features, odds, seen_KZYX = found.features, found.odds, found.seen_KZYX
        fusion = None if self.thresholds is None else self.thresholds.fusion
        with watch.stage("measure"):
            assert found.mask_logits_LDHW is not None, "masks are asked for by default"
            probability_LDHW, decisions = draw_lesions(
                found.mask_logits_LDHW, self.model.lesions, odds, fusion
            )
            del found
            lesions, masks, pieces = self._lesions(
                probability_LDHW.cpu().numpy(), decisions, prepared, volume, regions, settings
            )
            diseases = self._diseases(odds.probabilities(fusion), settings)
            positive = [disease.name for disease in diseases if disease.positive]
            seen = places_of(positive, seen_KZYX, prepared.regions_DHW, pieces, self.model.lesions)
            diseases = [
                disease.model_copy(
                    update={"places": self._places(seen.get(disease.name, ()), prepared.geometry)}
                )
                for disease in diseases
            ]
        with watch.stage("report"):
            words = describe_findings(positive, pieces, self.model.lesions, seen=seen)
            report = self._report(features, probability_LDHW[None], words, diseases, lesions, settings)
        prediction = Prediction(
            training_note=self._training_note(regions, searched=mask is None),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=_versions(),
            settings=asdict(settings),
            scan=_scan_info(volume, prepared, regions),
            model=self.model_info.model_copy(update={"thresholds": self._thresholds_source(settings)}),
            diseases=diseases,
            lesions=lesions,
            report=report,
            seconds=watch.seconds,
            peak_rss_mb=peak_rss_mb(),
        )
        return Result(prediction, volume, masks, regions)

    def _diseases(
        self, probabilities: Mapping[str, float], settings: PredictionSettings
    ) -> list[DiseaseFinding]:
        findings = []
        for name, probability in probabilities.items():
            threshold = settings.classification_threshold
            if threshold is None:
                threshold = threshold_of(name, self.thresholds)
            findings.append(
                DiseaseFinding(
                    name=name,
                    probability=probability,
                    threshold=threshold,
                    positive=probability >= threshold,
                    uncertainty=float(entropy_bits(np.asarray(probability))),
                )
            )
        return findings

    def _places(self, places: Sequence[SeenPlace], geometry: ScanGeometry) -> list[AttentionPlace]:
        depth = self.model.config.model.vision.patch_size[0]

        def slice_of(patch_z: float) -> int:
            index_d = (patch_z + 0.5) * depth - 0.5
            on_scan = round(geometry.step_DHW[0] * index_d + geometry.offset_DHW[0])
            return min(max(on_scan, 0), geometry.canonical_shape_DHW[0] - 1)

        return listed_places(places, slice_of)

    def _thresholds_source(self, settings: PredictionSettings) -> str:
        if settings.classification_threshold is not None:
            return f"{settings.classification_threshold:g} for every disease, as asked"
        return (
            f"{DEFAULT_THRESHOLD:g} for every disease" if self.thresholds is None else self.thresholds.source
        )

    def _regions(
        self, volume: Volume, mask: str | Path | RegionMap | None, settings: PredictionSettings
    ) -> RegionMap | None:
        if isinstance(mask, RegionMap):
            return mask
        if mask is not None:
            return read_region_mask(mask, volume, settings.mask_labels)
        if settings.anatomy == "none":
            return None
        canonical = to_canonical(volume)
        if settings.anatomy == "totalsegmentator":
            from vlm3d.anatomy.totalsegmentator import run_totalsegmentator

            found = run_totalsegmentator(canonical)
        else:
            found = segment_anatomy(canonical)
        labels_DHW = from_canonical(found.labels_DHW, volume.affine)
        return RegionMap(np.ascontiguousarray(labels_DHW), volume.affine, found.method)

    def _tensors(self, prepared: PreparedScan) -> tuple[Tensor, Tensor | None]:
        intensity = torch.from_numpy(prepared.intensity_DHW)[None, None].to(self.device)
        if prepared.regions_DHW is None:
            return intensity, None
        return intensity, torch.from_numpy(prepared.regions_DHW)[None].to(self.device)

    def _lesions(
        self,
        probability_LDHW: NDArray[np.float32],
        decisions: Mapping[str, MaskDecision],
        prepared: PreparedScan,
        volume: Volume,
        regions: RegionMap | None,
        settings: PredictionSettings,
    ) -> tuple[list[LesionFinding], dict[str, NDArray[np.bool_]], dict[str, list[Component]]]:
        """Masks on the scan's grid, and what each piece measures there."""
        canonical_volume = to_canonical(volume)
        regions_DHW = None if regions is None else canonical_view(regions.labels_DHW, volume.affine)
        landmarks = find_landmarks(regions_DHW, canonical_volume.shape_DHW)
        voxel_ml = float(np.prod(volume.spacing_mm)) / 1000.0
        threshold = settings.localization_threshold
        findings: list[LesionFinding] = []
        masks: dict[str, NDArray[np.bool_]] = {}
        pieces: dict[str, list[Component]] = {}
        for lesion, probability_DHW in zip(self.model.lesions, probability_LDHW, strict=True):
            mask_DHW = self.preprocessor.invert_mask(probability_DHW, prepared.geometry, threshold)
            mask_view_DHW = canonical_view(mask_DHW, volume.affine)
            drop_small_pieces(mask_view_DHW, settings.min_lesion_ml / voxel_ml)
            on_scan_DHW = None
            if mask_view_DHW.any():
                on_scan_DHW = self.preprocessor.invert_probability(probability_DHW, prepared.geometry)
                on_scan_DHW = canonical_view(on_scan_DHW, volume.affine)
            found = measure_lesion(
                mask_view_DHW,
                regions_DHW,
                canonical_volume.spacing_mm,
                lesion=lesion,
                probability_DHW=on_scan_DHW,
                landmarks=landmarks,
            )
            masks[lesion.key], pieces[lesion.key] = mask_DHW, found
            decision = decisions.get(lesion.key)
            findings.append(
                LesionFinding(
                    key=lesion.key,
                    name=lesion.name,
                    mask_file=None,
                    threshold=threshold,
                    presence=None if decision is None else decision.presence,
                    presence_threshold=None if decision is None else decision.presence_threshold,
                    expected_dice=None if decision is None else decision.expected_dice,
                    max_probability=float(probability_DHW.max()),
                    uncertainty=mask_entropy_bits(probability_DHW, threshold),
                    volume_ml=float(np.count_nonzero(mask_DHW)) * voxel_ml,
                    components=[
                        listed_piece(piece, canonical_volume) for piece in found[:MAX_LISTED_COMPONENTS]
                    ],
                    components_left_out=max(0, len(found) - MAX_LISTED_COMPONENTS),
                    volume_ml_by_region=volume_ml_by_region(mask_view_DHW, regions_DHW, voxel_ml),
                )
            )
        return findings, masks, pieces

    def _training_note(self, regions: RegionMap | None, *, searched: bool) -> str:
        """What a reader must know of the weights: tasks and kinds of anatomy that they never learned included."""
        status = self.model_info.training
        if status == "untrained":
            return TRAINING_NOTES[status]
        notes = [UNTRAINED_TASK_NOTES[task] for task in TASKS if task in self.model.untrained_tasks]
        learned, found = self.model.learned_anatomy, "none" if regions is None else regions.method
        if searched and learned and found not in learned:
            notes.append(OTHER_ANATOMY_NOTE.format(learned=", ".join(learned), found=found))
        return " ".join([TRAINING_NOTES[status], *notes]).strip()

    def _report(
        self,
        features: VisionFeatures,
        mask_probability_BLDHW: Tensor,
        words: str,
        diseases: list[DiseaseFinding],
        lesions: list[LesionFinding],
        settings: PredictionSettings,
    ) -> Report:
        if not settings.report:
            return Report(text="", findings="", impression="", recommendations="", generated=False)
        generator = self.model.report_generator
        generator.load_llm(self.device)

        def write(attempt: int) -> GeneratedReport:
            temperature = settings.temperature
            if attempt and not (generator.config.temperature if temperature is None else temperature):
                temperature = REWRITING_TEMPERATURE
            return generator.generate(
                features.global_BC,
                features.region_BRC,
                features.patch_BNC,
                prompt_texts=[words if generator.location.uses_text else ""],
                evidence=LesionEvidence(masks_BLDHW=mask_probability_BLDHW, grid=features.grid),
                region_present_BR=features.region_present_BR,
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
                top_p=settings.top_p,
                num_beams=None if attempt else settings.num_beams,
                seed=settings.seed + attempt,
            )[0]

        return consistent_report(
            write, diseases, lesions, settings.on_contradiction, settings.regenerate_attempts
        )


def _scan_info(volume: Volume, prepared: PreparedScan, regions: RegionMap | None) -> ScanInfo:
    d, h, w = prepared.intensity_DHW.shape
    return ScanInfo(
        source=volume.source,
        shape_dhw=volume.shape_DHW,
        spacing_mm_dhw=volume.spacing_mm,
        orientation="".join(axis_codes(volume.affine)),
        model_grid_dhw=(d, h, w),
        model_spacing_mm_dhw=prepared.geometry.model_spacing_mm,
        anatomy="none" if regions is None else regions.method,
        notes=[*volume.notes, *prepared.geometry.notes, *_lung_notes(prepared)],
    )


def _lung_notes(prepared: PreparedScan) -> list[str]:
    """A scan of one lung tells less of sides than one of two."""
    if prepared.regions_DHW is None:
        return []
    ids = set(np.unique(prepared.regions_DHW[::2, ::2, ::2]).tolist())
    found = [
        side for side, own in (("right", RIGHT_LUNG_IDS), ("left", LEFT_LUNG_IDS)) if ids.intersection(own)
    ]
    return [f"Only a {found[0]} lung was found: check the sides that are told."] if len(found) == 1 else []


def _versions() -> dict[str, str]:
    return {
        "vlm3d": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def peak_rss_mb() -> float:
    """The most memory that this process has held so far, in MB; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024**2 if sys.platform == "darwin" else 1024), 1)


def _read(scan: str | Path | Volume, series: str | None) -> tuple[Volume, RegionMap | None]:
    """The scan, and the regions that it was prepared with, if it was."""
    if isinstance(scan, Volume):
        return scan, None
    if is_prepared_case(scan):
        if series is not None:
            raise SeriesError(f"{_name(scan)} is a case of a store: it has no series to choose from")
        return read_prepared_case(scan)
    return read_volume(scan, series=series), None


def _name(scan: str | Path | Volume) -> str:
    return scan.source if isinstance(scan, Volume) else str(scan)
