"""Which of our 18 diseases and 5 lesions an abnormality of OmniAbnorm-CT is, by the words of its category and label.

The taxonomy has 404 findings of the whole body; the table below names those that are among ours, in the spellings that
radiology uses. A name that it does not know is counted, never guessed at. ``categories.json`` beside the data extends it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from vlm3d.errors import DataError
from vlm3d.labels import DISEASE_NAMES, LESIONS

_NAMES: Mapping[str, tuple[str, ...]] = {
    "Medical material": (
        "medical device", "foreign body", "pacemaker", "catheter", "central venous catheter", "stent", "surgical clip",
        "chest tube", "tracheal tube", "endotracheal tube", "prosthetic valve", "sternal wires", "port",
    ),
    "Arterial wall calcification": (
        "aortic calcification", "vascular calcification", "atherosclerotic plaque", "calcified plaque",
        "aortic atherosclerosis",
    ),
    "Cardiomegaly": ("enlarged heart", "cardiac enlargement", "heart enlargement"),
    "Pericardial effusion": ("pericardial fluid", "hydropericardium", "hemopericardium"),
    "Coronary artery wall calcification": (
        "coronary calcification", "coronary artery calcification", "coronary atherosclerosis",
    ),
    "Hiatal hernia": ("hiatus hernia", "diaphragmatic hiatal hernia", "sliding hiatal hernia"),
    "Lymphadenopathy": (
        "enlarged lymph node", "lymph node enlargement", "mediastinal lymphadenopathy", "hilar lymphadenopathy",
        "axillary lymphadenopathy", "thoracic lymphadenopathy",
    ),
    "Emphysema": (
        "pulmonary emphysema", "centrilobular emphysema", "paraseptal emphysema", "panlobular emphysema",
        "bullous emphysema", "bulla", "pulmonary bulla",
    ),
    "Atelectasis": (
        "pulmonary atelectasis", "lung collapse", "lobar collapse", "linear atelectasis", "subsegmental atelectasis",
        "passive atelectasis", "rounded atelectasis",
    ),
    "Lung nodule": (
        "pulmonary nodule", "solid nodule", "solitary pulmonary nodule", "pulmonary nodules", "micronodule",
        "ground-glass nodule", "part-solid nodule", "subsolid nodule", "calcified nodule of lung",
    ),
    "Lung opacity": (
        "ground-glass opacity", "ground glass opacity", "ground-glass opacification", "pulmonary opacity",
        "opacity of lung", "pulmonary infiltrate", "crazy paving",
    ),
    "Pulmonary fibrotic sequela": (
        "pulmonary fibrosis", "fibrotic band", "fibrotic bands", "pleuroparenchymal scarring", "parenchymal band",
        "lung scarring", "pulmonary scar", "honeycombing", "apical scarring",
    ),
    "Pleural effusion": ("pleural fluid", "hydrothorax", "hemothorax", "empyema", "pleural empyema"),
    "Mosaic attenuation pattern": ("mosaic attenuation", "mosaic perfusion", "air trapping"),
    "Peribronchial thickening": (
        "bronchial wall thickening", "peribronchial cuffing", "peribronchovascular thickening", "thickened bronchial wall",
    ),
    "Consolidation": ("pulmonary consolidation", "airspace consolidation", "lobar consolidation", "lung consolidation"),
    "Bronchiectasis": (
        "traction bronchiectasis", "cylindrical bronchiectasis", "cystic bronchiectasis", "bronchial dilatation",
    ),
    "Interlobular septal thickening": ("septal thickening", "interlobular thickening", "thickened interlobular septa"),
}  # fmt: skip

_LESIONS_BY_DISEASE = {lesion.disease: lesion.key for lesion in LESIONS}
_CATEGORIES_FILE = "categories.json"


class CategoryTable:
    """From the words of an abnormality to one of the 18 diseases.

    Args:
        more: Further names -> disease, which win over the table above; an empty disease says that it is none of ours.
    """

    def __init__(self, more: Mapping[str, str] | None = None) -> None:
        self._diseases = {_words(disease): disease for disease in DISEASE_NAMES}
        for disease, names in _NAMES.items():
            self._diseases.update(dict.fromkeys(map(_words, names), disease))
        self._diseases.update({_words(name): disease for name, disease in (more or {}).items()})

    @classmethod
    def of_folder(cls, folder: Path) -> CategoryTable:
        """The table above, extended by a folder's ``categories.json`` where it has one.

        Raises:
            DataError: The file is no JSON of names and diseases, or names an unknown disease.
        """
        path = folder / _CATEGORIES_FILE
        if not path.is_file():
            return cls()
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            more = {str(name): str(disease or "") for name, disease in told.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path} cannot be read: it holds names of categories with a disease each"
            ) from error
        foreign = sorted({disease for disease in more.values() if disease} - set(DISEASE_NAMES))
        if foreign:
            raise DataError(f"{path} names the disease '{foreign[0]}'; known are {', '.join(DISEASE_NAMES)}")
        return cls(more)

    def disease_of(self, names: Iterable[str]) -> str | None:
        """The disease that the most specific (last) known name stands for; ``""``: known to be none of ours.

        Args:
            names: From the widest category to the narrowest.

        Returns:
            None where no name is known.
        """
        for name in reversed(list(names)):
            disease = self._diseases.get(_words(name))
            if disease is not None:
                return disease
        return None


def lesion_of(disease: str, names: Iterable[str]) -> str | None:
    """The lesion whose mask an abnormality of a disease shows, or None where it is none of the five.

    A lung opacity is the lesion 'ground-glass opacity' only where its words say so.
    """
    if disease == "Lung opacity" and not any("ground glass" in _words(name) for name in names):
        return None
    return _LESIONS_BY_DISEASE.get(disease)


def _words(name: str) -> str:
    """A name for comparison: lower case, single spaces, no hyphens, no plural of its last word."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    if words.endswith("opacities"):
        return words[: -len("ies")] + "y"
    return words[:-1] if words.endswith("s") and not words.endswith(("ss", "sis")) else words
