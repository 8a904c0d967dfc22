"""A chest CT on disk becomes a `Prediction`: the one path that the command line, a server and a notebook share.

read -> anatomy -> prepare -> encode -> classify, localize -> masks on the scan's grid -> measure -> report.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import vlm3d
from vlm3d.anatomy.mask_file import read_region_mask
from vlm3d.anatomy.measurement import Component, measure_lesion
from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.errors import ConfigError, ResourceError
from vlm3d.inference.prediction import (
    TRAINING_NOTES,
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
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.preprocessing.orientation import (
    axis_codes,
    canonical_view,
    from_canonical,
    to_canonical,
)
from vlm3d.preprocessing.preprocessor import PreparedScan, Preprocessor
from vlm3d.volume import RegionMap, Volume

logger = logging.getLogger(__name__)

AnatomyMethod = Literal["classical", "totalsegmentator", "none"]
MAX_LISTED_COMPONENTS = 20


@dataclass(frozen=True)
class PredictionSettings:
    """What a caller may choose for a prediction.

    Attributes:
        anatomy: Where the regions come from when no mask file is given.
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
            regions = self._regions(volume, mask, settings.anatomy)
        with watch.stage("prepare"):
            prepared = self.preprocessor.apply(volume, regions)
        with watch.stage("encode"):
            intensity, region_mask = self._tensors(prepared)
            features = self.model.encode(intensity, region_mask)
        with watch.stage("classify"):
            probabilities_K = self.model.classify(features)["probabilities"][0].float().cpu().numpy()
        with watch.stage("localize"):
            mask_probability_LDHW = (
                self.model.localize(intensity, features)["mask_logits"][0].float().sigmoid_()
            )
            mask_probability_LDHW = mask_probability_LDHW.cpu().numpy()
        with watch.stage("measure"):
            lesions, masks, components = self._lesions(
                mask_probability_LDHW, prepared, volume, regions, settings
            )
        del mask_probability_LDHW
        with watch.stage("report"):
            report = self._report(features, intensity, probabilities_K, components, settings)
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
            training_note=TRAINING_NOTES[self.model_info.training],
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=_versions(),
            settings=_as_dict(settings),
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
        self, volume: Volume, mask: str | Path | RegionMap | None, method: AnatomyMethod
    ) -> RegionMap | None:
        if isinstance(mask, RegionMap):
            return mask
        if mask is not None:
            return read_region_mask(mask, volume)
        if method == "none":
            return None
        canonical = to_canonical(volume)
        if method == "totalsegmentator":
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
        canonical = to_canonical(volume)
        regions_DHW = None if regions is None else canonical_view(regions.labels_DHW, volume.affine)
        threshold = settings.localization_threshold
        lesions: list[LesionFinding] = []
        masks: dict[str, NDArray[np.bool_]] = {}
        pieces: dict[str, list[Component]] = {}
        for (key, name), probability_DHW in zip(
            self.model.lesion_names.items(), probability_LDHW, strict=True
        ):
            mask_DHW = self.preprocessor.invert_mask(probability_DHW, prepared.geometry, threshold)
            seen_DHW = canonical_view(mask_DHW, volume.affine)
            found = measure_lesion(
                seen_DHW, regions_DHW, canonical.spacing_mm, min_volume_ml=settings.min_lesion_ml
            )
            keep_only(seen_DHW, found)
            masks[key], pieces[key] = mask_DHW, found
            voxel_ml = float(np.prod(volume.spacing_mm)) / 1000.0
            lesions.append(
                LesionFinding(
                    key=key,
                    name=name,
                    mask_file=None,
                    threshold=threshold,
                    max_probability=float(probability_DHW.max()),
                    uncertainty=mask_entropy_bits(probability_DHW, threshold),
                    volume_ml=float(np.count_nonzero(mask_DHW)) * voxel_ml,
                    components=[
                        _component(piece, canonical, probability_DHW, prepared)
                        for piece in found[:MAX_LISTED_COMPONENTS]
                    ],
                    components_left_out=max(0, len(found) - MAX_LISTED_COMPONENTS),
                )
            )
        return lesions, masks, pieces
