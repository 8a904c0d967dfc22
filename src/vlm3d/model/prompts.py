"""The sentences that the text encoder reads, for any number of diseases and lesions."""

from __future__ import annotations

from vlm3d.labels import DISEASES, LESIONS


def disease_prompts(num_diseases: int) -> list[str]:
    """The shipped prompts; a label past the 18th is named by its number until it gets a prompt of its own."""
    shipped = [f"{disease.name}. {disease.prompt}" for disease in DISEASES]
    return _extend(shipped, num_diseases, "Disease")


def lesion_prompts(num_lesions: int) -> list[str]:
    """The shipped lesions, then the diseases that are no lesion yet, then numbers."""
    drawn = {lesion.disease for lesion in LESIONS}
    others = [f"{disease.name}. {disease.prompt}" for disease in DISEASES if disease.name not in drawn]
    return _extend([lesion.prompt for lesion in LESIONS] + others, num_lesions, "Lesion")


def _extend(prompts: list[str], count: int, noun: str) -> list[str]:
    return (prompts + [f"{noun} {index + 1}." for index in range(len(prompts), count)])[:count]
