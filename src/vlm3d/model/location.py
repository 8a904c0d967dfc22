"""What the heads found, and where, handed to the language model: as words, as tokens, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vlm3d.anatomy.measurement import Component, find_landmarks, measure_lesion
from vlm3d.labels import DISEASE_NAMES, LESIONS, STORED_LESIONS, Lesion, first_diseases, first_lesions
from vlm3d.model.head_fusion import shown_by
from vlm3d.model.projector import EmbeddingScale
from vlm3d.model.seen_places import SeenPlace, seen_places

LocationStrategy = Literal["text", "embedding", "both", "none"]

NO_FINDING_TEXT = "no abnormal finding"
MAX_PIECES = 3
MIN_VOLUME_ML = 0.02
MIN_SHARE_OF_LOBE, MIN_SHARE_OF_SIDE = 0.3, 0.15
"""What is told by its lobes, or sides, is told in those that hold this share of what the fullest holds, or"""
TOLD_FROM_ML = 50.0
"""this much: what a reader would miss is told however much there is elsewhere."""
MIN_SHARE_OF_NODULE = 0.3
"""A piece of it is told if it has this share of the largest one's volume."""


class MeasuredPiece(Protocol):
    """One connected piece of a lesion, as measured; read-only."""

    @property
    def side(self) -> str: ...
    @property
    def region(self) -> str: ...
    @property
    def level(self) -> str: ...
    @property
    def volume_ml(self) -> float: ...
    @property
    def max_diameter_mm(self) -> float: ...


Piece = TypeVar("Piece", bound=MeasuredPiece)


_TOLD_BY_PLACE = {lesion.key: lesion for lesion in STORED_LESIONS if not lesion.counted}


def _place_told(lesion: Lesion, piece: MeasuredPiece) -> tuple[str, ...]:
    """What pieces that are told together share."""
    if lesion.midline:
        return ()
    return (piece.side, piece.region) if lesion.lung else (piece.side,)


def told_pieces(
    key: str, pieces: Sequence[Piece], max_pieces: int = MAX_PIECES
) -> tuple[Sequence[Piece], int]:
    """The pieces of a lesion that words tell, and how many more there are.

    Nodules are told one by one, but for those much smaller than the largest. Opacities, bands and bronchi fall into many
    pieces, which a report tells by their lobes, and fluid by the side or, around the heart, as one: the largest piece of
    each place stands for all there, the fullest place first, and none is counted besides.

    Args:
        key: Of the lesion.
        pieces: Largest first.
        max_pieces: Told at most of what is counted.
    """
    lesion = _TOLD_BY_PLACE.get(key)
    if lesion is None:
        least_ml = MIN_SHARE_OF_NODULE * max((piece.volume_ml for piece in pieces), default=0.0)
        large = [piece for piece in pieces if piece.volume_ml >= least_ml]
        return large[:max_pieces], max(0, len(large) - max_pieces)
    places: dict[tuple[str, ...], list[Piece]] = {}
    for piece in pieces:
        places.setdefault(_place_told(lesion, piece), []).append(piece)
    total_ml = {place: sum(piece.volume_ml for piece in found) for place, found in places.items()}
    share = MIN_SHARE_OF_LOBE if lesion.lung else MIN_SHARE_OF_SIDE
    least_ml = min(share * max(total_ml.values(), default=0.0), TOLD_FROM_ML)
    full = [
        place for place in sorted(places, key=lambda place: -total_ml[place]) if total_ml[place] >= least_ml
    ]
    return [places[place][0] for place in full], 0


def describe_piece(piece: MeasuredPiece) -> str:
    """Say where one piece lies and how large it is: 'right upper lobe, upper third, 12 mm, 0.9 ml'."""
    place = piece.region
    if piece.side != "midline" and piece.side not in place.split():
        place = f"{piece.side} {place}".strip()
    volume = f"{piece.volume_ml:.1f}" if piece.volume_ml < 10 else f"{piece.volume_ml:.0f}"
    parts = [place or piece.side, f"{piece.level} third", f"{piece.max_diameter_mm:.0f} mm", f"{volume} ml"]
    return ", ".join(parts)


def describe_findings(
    positive_diseases: Sequence[str],
    pieces_by_lesion: Mapping[str, Sequence[MeasuredPiece]],
    lesions: Sequence[Lesion] = LESIONS,
    max_pieces: int = MAX_PIECES,
    *,
    seen: Mapping[str, Sequence[SeenPlace]] | None = None,
) -> str:
    """List the findings in CT-RATE's order, each lesion with its places and sizes.

    Args:
        positive_diseases: Names of the diseases that are present.
        pieces_by_lesion: Measured pieces by the lesion's key, largest first.
        lesions: The lesions that have masks.
        max_pieces: Pieces told of each lesion, see `told_pieces`.
        seen: Places of diseases that no mask shows, from `places_of`.

    Returns:
        Such as 'Cardiomegaly; Lung nodule: right upper lobe, upper third, 12 mm, 0.9 ml'.
    """
    present = set(positive_diseases)
    entries = []
    others = present | {lesion.disease for lesion in lesions}
    for disease in (*DISEASE_NAMES, *sorted(others - set(DISEASE_NAMES))):
        own = [lesion for lesion in lesions if lesion.disease == disease and pieces_by_lesion.get(lesion.key)]
        if disease in present and disease not in {lesion.name for lesion in own}:
            places = " and ".join(place.words for place in (seen or {}).get(disease, ()))
            entries.append(f"{disease}: {places}" if places else disease)
        for lesion in own:
            told, more = told_pieces(lesion.key, pieces_by_lesion[lesion.key], max_pieces)
            words = " and ".join(describe_piece(piece) for piece in told)
            entries.append(f"{lesion.name}: {words}{f' and {more} more' if more else ''}")
    return "; ".join(entries) or NO_FINDING_TEXT


class LesionLocationInjector(nn.Module):
    """Tell the language model which lesions there are and where.

    * **text**: `describe` measures the masks and words the result.
    * **embedding**: `embed` averages the patch features under each mask into one token a lesion; a learned
      'absent' token stands in where the mask is empty.

    Args:
        strategy: ``"text"``, ``"embedding"``, ``"both"`` or ``"none"``.
        vision_dim: Width C of the patch features.
        llm_dim: Width M of the language model.
        num_lesions: Masks L a scan, those of `vlm3d.labels.first_lesions`.
        output_rms: Scale of the tokens, see `EmbeddingScale`.
    """

    def __init__(
        self,
        strategy: LocationStrategy,
        vision_dim: int,
        llm_dim: int,
        num_lesions: int = len(LESIONS),
        output_rms: float = 0.02,
    ) -> None:
        super().__init__()
        self.strategy = strategy
        self.lesions = first_lesions(num_lesions)
        self.uses_text = strategy in ("text", "both")
        self.uses_embedding = strategy in ("embedding", "both")
        if self.uses_embedding:
            self.norm = nn.LayerNorm(vision_dim)
            self.projection = nn.Linear(vision_dim, llm_dim)
            self.lesion_identity = nn.Parameter(0.02 * torch.randn(num_lesions, llm_dim))
            self.absent = nn.Parameter(torch.randn(llm_dim))
            self.output_scale = EmbeddingScale(output_rms)

    def embed(self, patch_BNC: Tensor, masks_BLDHW: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """One token a lesion from the patch features under its mask.

        Args:
            patch_BNC: Patch features, N = Z*Y*X with z slowest.
            masks_BLDHW: Masks or probabilities, 0..1, on the model's voxel grid.
            grid: (Z, Y, X).

        Returns:
            (B, L, M). Between 0 and 1, a mask's maximum blends the lesion's token with the 'absent' one.
        """
        if not self.uses_embedding:
            raise ValueError(f"the location strategy '{self.strategy}' makes no embeddings")
        masks = masks_BLDHW.to(patch_BNC.dtype)
        presence_BL1 = masks.flatten(2).amax(dim=2, keepdim=True)
        weights_BLN = functional.adaptive_avg_pool3d(masks, grid).flatten(2)
        weights_BLN = weights_BLN / weights_BLN.sum(dim=2, keepdim=True).clamp(min=1e-6)
        found_BLM = self.projection(self.norm(weights_BLN @ patch_BNC))
        token_BLM = presence_BL1 * found_BLM + (1 - presence_BL1) * self.absent + self.lesion_identity
        scaled: Tensor = self.output_scale(token_BLM)
        return scaled

    def describe(
        self,
        disease_probabilities_BK: Tensor,
        masks_BLDHW: Tensor | None = None,
        regions_BDHW: Tensor | None = None,
        spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
        disease_thresholds: Sequence[float] | float = 0.5,
        mask_threshold: float = 0.5,
        seen_BKZYX: Tensor | None = None,
    ) -> list[str]:
        """Word each scan's findings.

        Args:
            disease_probabilities_BK: Probabilities or labels in CT-RATE's order.
            masks_BLDHW: Masks or probabilities in canonical orientation, or None.
            regions_BDHW: Region ids on the masks' grid, or None.
            spacing_mm: Voxel size along (D, H, W).
            disease_thresholds: One for all, or one a disease.
            mask_threshold: Voxels at or above it belong to the lesion.
            seen_BKZYX: How much each patch shows each disease, or None.
        """
        probabilities = disease_probabilities_BK.detach().float().cpu().numpy()
        thresholds = np.broadcast_to(np.asarray(disease_thresholds, np.float32), probabilities.shape[1:])
        diseases = first_diseases(probabilities.shape[1])
        texts = []
        for index, row_K in enumerate(probabilities):
            names = [diseases[k].name for k in np.flatnonzero(row_K >= thresholds)]
            pieces: dict[str, list[Component]] = {}
            regions = None if regions_BDHW is None else _region_ids(regions_BDHW[index])
            if masks_BLDHW is not None:
                masks_LDHW = (masks_BLDHW[index].detach() >= mask_threshold).cpu().numpy()
                pieces = self.measure(masks_LDHW, regions, spacing_mm)
            seen = None
            if seen_BKZYX is not None:
                seen = places_of(names, seen_BKZYX[index], regions, pieces, self.lesions)
            texts.append(describe_findings(names, pieces, self.lesions, seen=seen))
        return texts

    def measure(
        self,
        masks_LDHW: NDArray[np.bool_],
        regions_DHW: NDArray[np.uint8] | None,
        spacing_mm: tuple[float, float, float],
    ) -> dict[str, list[Component]]:
        """The pieces of each lesion's mask as a report tells them, largest first, by the lesion's key."""
        landmarks = find_landmarks(regions_DHW, masks_LDHW.shape[1:])
        return {
            lesion.key: measure_lesion(
                mask_DHW,
                regions_DHW,
                spacing_mm,
                min_volume_ml=MIN_VOLUME_ML,
                lesion=lesion,
                landmarks=landmarks,
            )
            for lesion, mask_DHW in zip(self.lesions, masks_LDHW, strict=False)
        }


def places_of(
    diseases: Sequence[str],
    seen_KZYX: Tensor,
    regions_DHW: NDArray[np.uint8] | None,
    pieces_by_lesion: Mapping[str, Sequence[MeasuredPiece]],
    lesions: Sequence[Lesion],
) -> dict[str, list[SeenPlace]]:
    """Where the classifier saw the diseases of which no mask shows a piece; see `seen_places`.

    Args:
        diseases: Names of those that are present; one that is not of the 18 has no known places.
        seen_KZYX: How much each patch is looked at for each disease, in CT-RATE's order; bool where it is known.
        regions_DHW: Region ids, or None.
        pieces_by_lesion: As in `describe_findings`.
        lesions: As in `describe_findings`.
    """
    weight_KZYX = (seen_KZYX if seen_KZYX.dtype == torch.bool else seen_KZYX.detach().float()).cpu().numpy()
    drawn = {key for key, pieces in pieces_by_lesion.items() if pieces}
    depth, rows, columns = weight_KZYX.shape[1:] if regions_DHW is None else regions_DHW.shape
    landmarks = find_landmarks(regions_DHW, (depth, rows, columns))
    return {
        name: seen_places(name, weight_KZYX[DISEASE_NAMES.index(name)], regions_DHW, landmarks)
        for name in diseases
        if name in DISEASE_NAMES and drawn.isdisjoint(shown_by(name, lesions))
    }


def _region_ids(regions_DHW: Tensor) -> NDArray[np.uint8]:
    ids: NDArray[np.uint8] = regions_DHW.detach().to(torch.uint8).cpu().numpy()
    return ids
