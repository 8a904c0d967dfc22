"""Plain sentences made from measurements: what repair adds to a report."""

from __future__ import annotations

from collections.abc import Sequence

from vlm3d.inference.grounding import lesions_showing
from vlm3d.inference.prediction import AttentionPlace, LesionComponent, LesionFinding
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.location import told_pieces

_LOBE = " lobe"


def located_sentence(
    disease: str, lesions: Sequence[LesionFinding], seen: Sequence[AttentionPlace] = ()
) -> str:
    """One sentence that affirms a disease, with the places and sizes that its mask measures.

    Such as "Lung nodule of 12 mm in the right upper lobe." or "Ground-glass opacity in the left upper lobe and left lower
    lobe."; without a mask the places at which the classifier saw it, and without those the name alone.
    """
    own = lesions_showing(disease, lesions)
    if not own:
        return f"{disease} {_seen(seen)}".rstrip() + "."
    lesion = own[0]
    name = disease if lesion.name in DISEASE_NAMES else lesion.name
    said = _SAID.get(lesion.key, _places)(lesion)
    return f"{name} {said}." if said else f"{name}."


def _seen(places: Sequence[AttentionPlace]) -> str:
    lobes = [place.region for place in places if place.region]
    sides = [place.side for place in places if not place.region]
    if lobes:
        return f"in the {_listed(lobes)}"
    if len(set(sides)) > 1:
        return "on both sides"
    return f"on the {sides[0]}" if sides else ""


def _volume(lesion: LesionFinding) -> str:
    return f"of about {lesion.volume_ml:.0f} ml"


def _sided_volume(lesion: LesionFinding) -> str:
    volume_ml = {
        side: sum(piece.volume_ml for piece in lesion.components if piece.side == side)
        for side in ("right", "left")
    }
    sides = [side for side, ml in volume_ml.items() if ml > 0]
    if not sides:
        return _volume(lesion)
    each = [f"about {volume_ml[side]:.0f} ml" for side in sides]
    if len(sides) == 1:
        return f"on the {sides[0]}, {each[0]}"
    return f"on both sides, {each[0]} on the right and {each[1]} on the left"


def _sizes(lesion: LesionFinding) -> str:
    told, more = told_pieces(lesion.key, lesion.components)
    words = [f"of {piece.max_diameter_mm:.0f} mm {_place(piece)}".rstrip() for piece in told]
    more += lesion.components_left_out if more else 0
    return _listed([*words, *([f"{more} more"] if more else [])])


def _places(lesion: LesionFinding) -> str:
    told, _ = told_pieces(lesion.key, lesion.components)
    lobes = [piece.region for piece in told if piece.region.endswith(_LOBE)]
    others = [_place(piece) for piece in told if not piece.region.endswith(_LOBE)]
    return _listed([*([f"in the {_listed(lobes)}"] if lobes else []), *filter(None, others)])


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
