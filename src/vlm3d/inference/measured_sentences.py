"""Plain sentences made from measurements: what repair adds to a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set

from vlm3d.inference.grounding import lesions_showing
from vlm3d.inference.prediction import AttentionPlace, LesionComponent, LesionFinding
from vlm3d.labels import DISEASE_NAMES, STORED_LESIONS
from vlm3d.model.location import told_pieces

_LOBE = " lobe"

ADVISED = frozenset({"Lung nodule", "Consolidation", "Pericardial effusion", "Cardiomegaly"})
"""Diseases of which `advice` says more than nothing."""
FOLLOW_UP_MM, WORK_UP_MM = 6.0, 8.0
"""Of a solid nodule, after the Fleischner Society's recommendations of 2017 (Radiology 284:228)."""

DENIALS: Mapping[str, str] = {
    "Pleural effusion": "No pleural effusion.",
    "Pericardial effusion": "No pericardial effusion.",
    "Lymphadenopathy": "No enlarged lymph nodes.",
    "Cardiomegaly": "The heart is of normal size.",
    "Lung nodule": "No lung nodule.",
    "Consolidation": "No consolidation.",
    "Emphysema": "No emphysema.",
    "Hiatal hernia": "No hiatal hernia.",
    "Bronchiectasis": "No bronchiectasis.",
}
"""What readers expect to be told of a chest CT even where it is absent, by disease."""


def located_sentence(
    disease: str, lesions: Sequence[LesionFinding], seen: Sequence[AttentionPlace] = ()
) -> str:
    """One sentence that affirms a disease, with the places and sizes that its mask measures.

    Such as "Lung nodule of 12 mm in the right upper lobe.", "Two lung nodules of 9 mm in the left upper lobe." or
    "Ground-glass opacity in the left upper lobe and left lower lobe."; without a mask the places at which the classifier
    saw it, and without those the name alone.
    """
    name, lesion = _shown(disease, lesions)
    said = _seen(seen) if lesion is None else _SAID.get(lesion.key, _places)(lesion)
    number, _, rest = said.partition(" ")
    if number in _NUMBERS.values():
        return f"{number.capitalize()} {name.lower()}s {rest}."
    return f"{name} {said}".rstrip() + "."


def sided_line(disease: str, lesions: Sequence[LesionFinding], seen: Sequence[AttentionPlace] = ()) -> str:
    """A line of an impression: the disease and its sides, such as "Atelectasis on both sides." or "Cardiomegaly."."""
    name, lesion = _shown(disease, lesions)
    places: Sequence[AttentionPlace | LesionComponent] = seen
    if lesion is not None:
        places, _ = told_pieces(lesion.key, lesion.components)
    sides = {place.side for place in places} & {"right", "left"}
    where = "" if lesion is not None and lesion.key in _MIDLINE else _on(sides)
    return f"{name} {where}".rstrip() + "."


def advice(findings: Set[str], lesions: Sequence[LesionFinding]) -> list[str]:
    """What follows from findings, as the phantoms' reports advise it: of a nodule by its largest diameter.

    Args:
        findings: Names of diseases.
        lesions: The localizer's findings.
    """
    nodules_mm = [
        piece.max_diameter_mm
        for lesion in lesions_showing("Lung nodule", lesions)
        for piece in lesion.components
    ]
    lines = []
    if "Lung nodule" in findings and max(nodules_mm, default=0.0) >= WORK_UP_MM:
        lines.append("Further work-up of the largest nodule.")
    elif "Lung nodule" in findings and (not nodules_mm or max(nodules_mm) >= FOLLOW_UP_MM):
        lines.append("Follow-up CT of the nodule.")
    if "Consolidation" in findings:
        lines.append("Control after treatment.")
    if findings & {"Pericardial effusion", "Cardiomegaly"}:
        lines.append("Echocardiography.")
    return lines or ["None."]


def _shown(disease: str, lesions: Sequence[LesionFinding]) -> tuple[str, LesionFinding | None]:
    """What a disease is called, and the lesion that shows it: the mask knows which opacity is ground glass."""
    own = lesions_showing(disease, lesions)
    if not own:
        return disease, None
    return disease if own[0].name in DISEASE_NAMES else own[0].name, own[0]


def _on(sides: Set[str]) -> str:
    return "on both sides" if len(sides) > 1 else f"on the {next(iter(sides))}" if sides else ""


def _seen(places: Sequence[AttentionPlace]) -> str:
    lobes = [place.region for place in places if place.region]
    return f"in the {_listed(lobes)}" if lobes else _on({place.side for place in places})


def _volume(lesion: LesionFinding) -> str:
    return f"of {_about(lesion.volume_ml)}"


def _about(volume_ml: float) -> str:
    return "less than 1 ml" if volume_ml < 1 else f"about {volume_ml:.0f} ml"


def _sided_volume(lesion: LesionFinding) -> str:
    told, _ = told_pieces(lesion.key, lesion.components)
    volume_ml = {
        side: sum(piece.volume_ml for piece in lesion.components if piece.side == side)
        for side in ("right", "left")
        if any(piece.side == side for piece in told)
    }
    if not volume_ml:
        return _volume(lesion)
    each = [_about(ml) for ml in volume_ml.values()]
    if len(each) == 1:
        return f"{_on(volume_ml.keys())}, {each[0]}"
    return f"on both sides, {each[0]} on the right and {each[1]} on the left"


def _sizes(lesion: LesionFinding) -> str:
    told, more = told_pieces(lesion.key, lesion.components)
    counts = Counter(f"of {piece.max_diameter_mm:.0f} mm {_place(piece)}".rstrip() for piece in told)
    words = [f"{_NUMBERS.get(count, '')} {said}".strip() for said, count in counts.items()]
    more += lesion.components_left_out if more else 0
    return _listed([*words, *([f"{more} more"] if more else [])])


def _places(lesion: LesionFinding) -> str:
    told, _ = told_pieces(lesion.key, lesion.components)
    lobes = [piece.region for piece in told if piece.region.endswith(_LOBE)]
    others = [_place(piece) for piece in told if not piece.region.endswith(_LOBE)]
    return _listed([*([f"in the {_listed(lobes)}"] if lobes else []), *filter(None, others)])


_NUMBERS = {2: "two", 3: "three"}
"""At most `vlm3d.model.location.MAX_PIECES` are told."""
_MIDLINE = {lesion.key for lesion in STORED_LESIONS if lesion.midline}
_SAID = {"pericardial_effusion": _volume, "pleural_effusion": _sided_volume, "lung_nodule": _sizes}
"""By lesion key; the others tell their places."""


def _place(piece: LesionComponent) -> str:
    """A lobe, else the side; a report would place no finding in the ribs."""
    if piece.region.endswith(_LOBE):
        return f"in the {piece.region}"
    return f"on the {piece.side}" if piece.side in ("right", "left") else ""


def _listed(words: Sequence[str]) -> str:
    unique = list(dict.fromkeys(words))
    return " and ".join([", ".join(unique[:-1]), unique[-1]] if len(unique) > 1 else unique)
