"""A chest CT on disk becomes a `Prediction`: the one path that the command line, a server and a notebook share.

read -> anatomy -> prepare -> encode -> classify, localize -> masks on the scan's grid -> measure -> report.
"""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm3d.anatomy.mask_file import read_region_mask
from vlm3d.anatomy.measurement import Component, drop_small_pieces, find_landmarks, measure_lesion
from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.errors import ConfigError, ResourceError
from vlm3d.inference.prediction import (
    TRAINING_NOTES,
    UNTRAINED_TASK_NOTES,
    DiseaseFinding,
    LesionComponent,
    LesionFinding,
    ModelInfo,
    Prediction,
    Report,
    ScanInfo,
)
from vlm3d.inference.uncertainty import entropy_bits, mask_entropy_bits
from vlm3d.io import read_volume
from vlm3d.labels import TASKS
from vlm3d.model.location import describe_findings
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.report_generator import LesionEvidence, parse_report
from vlm3d.model.vision_encoder import VisionFeatures
from vlm3d.preprocessing.orientation import (
    axis_codes,
    canonical_view,
    from_canonical,
    to_canonical,
)
from vlm3d.preprocessing.preprocessor import PreparedScan, Preprocessor
from vlm3d.version import VERSION
from vlm3d.volume import RegionMap, Volume

logger = logging.getLogger(__name__)

AnatomyMethod = Literal["classical", "totalsegmentator", "none"]
MaskLabels = Literal["auto", "vlm3d", "totalsegmentator"]
MAX_LISTED_COMPONENTS = 20


@dataclass(frozen=True)
class PredictionSettings:
    """What a caller may choose for a prediction.

    Attributes:
        anatomy: Where the regions come from when no mask file is given.
        mask_labels: Whose ids a mask file holds; see `read_region_mask`.
        classification_threshold: Probabilities from here on are positive.
        localization_threshold: Voxel probabilities from here on are lesion.
        min_lesion_ml: Smaller pieces are removed from the masks.
        report: Whether to write a report.
        max_new_tokens: Longest report; None takes the model's own.
        temperature: 0 decodes greedily; None takes the model's own.
        top_p: Nucleus of sampling; None takes the model's own.
        seed: Makes sampling reproducible.
    """

    anatomy: AnatomyMethod = "classical"
    mask_labels: MaskLabels = "auto"
    classification_threshold: float = 0.5
    localization_threshold: float = 0.5
    min_lesion_ml: float = 0.05
    report: bool = True
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("classification_threshold", "localization_threshold"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ConfigError(f"{name} is a probability between 0 and 1, got {value}")
        if self.min_lesion_ml < 0:
            raise ConfigError(f"min_lesion_ml is a volume of 0 or more, got {self.min_lesion_ml}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is 1 or more, got {self.max_new_tokens}")
        if self.temperature is not None and self.temperature < 0:
            raise ConfigError(f"temperature is 0 or more, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is above 0 and at most 1, got {self.top_p}")


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
    """

    def __init__(self, model: VLM3DMultiTask, *, checkpoint: str, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.preprocessor = Preprocessor(model.config.preprocessing)
        self.model_info = ModelInfo(
            config=model.config.name,
            checkpoint=checkpoint,
            fingerprint=model.fingerprint(),
            training=model.training_status,
            llm=model.config.model.report.llm_name,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
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
            scan: A file, a DICOM folder or zip, or a volume in HU.
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
            volume = scan if isinstance(scan, Volume) else read_volume(scan, series=series)
        with watch.stage("anatomy"):
            regions = self._regions(volume, mask, settings)
        with watch.stage("prepare"):
            prepared = self.preprocessor.apply(volume, regions)
        with watch.stage("encode"):
            intensity, region_mask = self._tensors(prepared)
            features = self.model.encode(intensity, region_mask)
        with watch.stage("classify"):
            probabilities_K = self.model.classify(features)["probabilities"][0].float().cpu().numpy()
        with watch.stage("localize"):
            mask_probability_BLDHW = (
                self.model.localize(intensity, features)["mask_logits"].float().sigmoid_()
            )
        with watch.stage("measure"):
            lesions, masks, pieces = self._lesions(
                mask_probability_BLDHW[0].cpu().numpy(), prepared, volume, regions, settings
            )
        with watch.stage("report"):
            report = self._report(features, mask_probability_BLDHW, probabilities_K, pieces, settings)
        diseases = [
            DiseaseFinding(
                name=name,
                probability=float(probability),
                threshold=settings.classification_threshold,
                positive=bool(probability >= settings.classification_threshold),
                uncertainty=float(entropy_bits(probability)),
            )
            for name, probability in zip(self.model.disease_names, probabilities_K, strict=True)
        ]
        prediction = Prediction(
            training_note=self._training_note(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=_versions(),
            settings=asdict(settings),
            scan=_scan_info(volume, prepared, regions),
            model=self.model_info,
            diseases=diseases,
            lesions=lesions,
            report=report,
            seconds=watch.seconds,
            peak_rss_mb=peak_rss_mb(),
        )
        return Result(prediction, volume, masks, regions)

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
                midline=lesion.midline,
                probability_DHW=on_scan_DHW,
                landmarks=landmarks,
            )
            masks[lesion.key], pieces[lesion.key] = mask_DHW, found
            findings.append(
                LesionFinding(
                    key=lesion.key,
                    name=lesion.name,
                    mask_file=None,
                    threshold=threshold,
                    max_probability=float(probability_DHW.max()),
                    uncertainty=mask_entropy_bits(probability_DHW, threshold),
                    volume_ml=float(np.count_nonzero(mask_DHW)) * voxel_ml,
                    components=[_listed(piece, canonical_volume) for piece in found[:MAX_LISTED_COMPONENTS]],
                    components_left_out=max(0, len(found) - MAX_LISTED_COMPONENTS),
                )
            )
        return findings, masks, pieces

    def _training_note(self) -> str:
        """What a reader must know of the weights, the tasks that they never learned included."""
        status = self.model_info.training
        untrained = [UNTRAINED_TASK_NOTES[task] for task in TASKS if task in self.model.untrained_tasks]
        return " ".join([TRAINING_NOTES[status], *(untrained if status != "untrained" else [])]).strip()

    def _report(
        self,
        features: VisionFeatures,
        mask_probability_BLDHW: Tensor,
        probabilities_K: NDArray[np.float32],
        pieces: dict[str, list[Component]],
        settings: PredictionSettings,
    ) -> Report:
        if not settings.report:
            return Report(text="", findings="", impression="", recommendations="", generated=False)
        generator = self.model.report_generator
        generator.load_llm(self.device)
        positive = [
            name
            for name, probability in zip(self.model.disease_names, probabilities_K, strict=True)
            if probability >= settings.classification_threshold
        ]
        written = generator.generate(
            features.global_BC,
            features.region_BRC,
            features.patch_BNC,
            prompt_texts=[
                describe_findings(positive, pieces, self.model.lesions)
                if generator.location.uses_text
                else ""
            ],
            evidence=LesionEvidence(masks_BLDHW=mask_probability_BLDHW, grid=features.grid),
            region_present_BR=features.region_present_BR,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
        )[0]
        sections = parse_report(written.text)
        return Report(
            text=written.text,
            findings=sections.findings,
            impression=sections.impression,
            recommendations=sections.recommendations,
            uncertainty=written.mean_surprisal_bits,
            generated=True,
        )


def _listed(piece: Component, canonical: Volume) -> LesionComponent:
    d, h, w = piece.centroid_index_dhw
    x, y, z = (canonical.affine @ np.array([d, h, w, 1.0]))[:3]
    return LesionComponent(
        side=piece.side,
        region=piece.region,
        level=piece.level,
        volume_ml=piece.volume_ml,
        max_diameter_mm=piece.max_diameter_mm,
        centroid_ras_mm=(float(x), float(y), float(z)),
        centroid_index_dhw=piece.centroid_index_dhw,
        key_slice=piece.key_slice,
        mean_probability=float(np.clip(piece.mean_probability or 0.0, 0.0, 1.0)),
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
        notes=[*volume.notes, *prepared.geometry.notes],
    )


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


def _name(scan: str | Path | Volume) -> str:
    return scan.source if isinstance(scan, Volume) else str(scan)
