"""A prediction with made-up values, so that outputs can be tested without a model."""

from __future__ import annotations

from typing import Any

from vlm3d.inference.prediction import TRAINING_NOTES, Prediction
from vlm3d.labels import DISEASE_NAMES, LESIONS, STORED_LESIONS

SHAPE = (12, 40, 44)


def component(key_slice: int = 6, region: str = "right upper lobe", diameter: float = 17.0) -> dict[str, Any]:
    return {
        "side": "right",
        "region": region,
        "level": "upper",
        "volume_ml": 2.5,
        "max_diameter_mm": diameter,
        "centroid_ras_mm": (50.0, 20.0, -250.0),
        "centroid_index_dhw": (key_slice, 15, 12),
        "key_slice": key_slice,
        "mean_probability": 0.8,
    }


def make_prediction(
    components: dict[str, list[dict[str, Any]]] | None = None,
    training: str = "untrained",
    notes: tuple[str, ...] = (),
    source: str = "ct.nii.gz",
    **report: Any,
) -> Prediction:
    components = components or {}
    values: dict[str, Any] = {
        "training_note": TRAINING_NOTES[training],  # type: ignore[index]
        "created": "2026-01-01T09:30:00+00:00",
        "versions": {"vlm3d": "0.0"},
        "settings": {"seed": 0, "preprocessing": {"crop": True}},
        "scan": {
            "source": source,
            "shape_dhw": SHAPE,
            "spacing_mm_dhw": (8.0, 7.0, 6.5),
            "orientation": "SPL",
            "model_grid_dhw": SHAPE,
            "model_spacing_mm_dhw": (8.0, 7.0, 6.5),
            "anatomy": "classical",
            "notes": list(notes),
        },
        "model": {
            "config": "tiny",
            "checkpoint": "c",
            "fingerprint": "0123456789abcdef",
            "training": training,
            "llm": "llm",
            "parameters": 5,
        },
        "diseases": [
            {
                "name": name,
                "probability": i / 20,
                "threshold": 0.5,
                "positive": i in (3, 12),
                "uncertainty": 0.5,
            }
            for i, name in enumerate(DISEASE_NAMES)
        ],
        "lesions": [
            {
                "key": lesion.key,
                "name": lesion.name,
                "mask_file": None,
                "threshold": 0.5,
                "max_probability": 0.6 + 0.04 * i if components.get(lesion.key) else 0.1,
                "uncertainty": 0.4,
                "volume_ml": 2.5,
                "components": components.get(lesion.key, []),
            }
            for i, lesion in enumerate(STORED_LESIONS)
            if lesion in LESIONS or lesion.key in components
        ],
        "report": {
            "text": "T",
            "findings": "Clear lungs.",
            "impression": "Normal.",
            "recommendations": "",
            "generated": True,
            **report,
        },
        "seconds": {"read": 0.1},
        "peak_rss_mb": 100.0,
    }
    return Prediction.model_validate(values)
