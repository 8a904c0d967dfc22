"""Reports of phantoms: varied prose from the truth alone. Nothing is said to be present that is not, and the reverse.

The findings go through the chest organ by organ, as radiologists read, with what is there and what is not beside each
other. Every present finding gets at least one sentence with its place. Sizes are told of what a mask outlines, and of
nothing else: who learns from reports with numbers that no mask holds learns to make numbers up. How the scan was taken is
not among the findings, as it is not in CT-RATE's. The impression tells what is most urgent first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from vlm3d.anatomy.regions import REGION_BY_ID, REGION_IDS
from vlm3d.datasets.phantom.truth import FindingTruth, names
from vlm3d.labels import DISEASE_NAMES, ORGAN_OF, READING_ORDERS

Rng = np.random.Generator


@dataclass(frozen=True)
class ReportText:
    """A report in three parts."""

    findings: str
    impression: str
    recommendations: str

    @property
    def text(self) -> str:
        """The whole report under its headings."""
        return f"Findings:\n{self.findings}\n\nImpression:\n{self.impression}\n\nRecommendations:\n{self.recommendations}"


_LUNGS_FIRST_SHARE = 1 / 3

_DENIED_SHARE = 0.7
"""How often an absent finding of `_NEGATIVES` is denied."""

_URGENCY = (
    *("Pericardial effusion", "Pleural effusion", "Consolidation", "Lung nodule", "Lymphadenopathy"),
    *("Lung opacity", "Atelectasis", "Interlobular septal thickening", "Cardiomegaly", "Emphysema"),
    *(
        "Bronchiectasis",
        "Pulmonary fibrotic sequela",
        "Mosaic attenuation pattern",
        "Peribronchial thickening",
    ),
    *(
        "Hiatal hernia",
        "Coronary artery wall calcification",
        "Arterial wall calcification",
        "Medical material",
    ),
)
"""In which an impression tells findings."""


def write_report(truth: Sequence[FindingTruth], *, rng: Rng) -> ReportText:
    """Write a phantom's report.

    Args:
        truth: All pieces of all findings.
        rng: Chooses among wordings and reading orders.
    """
    present = names(truth)
    by_name = {
        name: sorted((t for t in truth if t.finding == name), key=lambda t: -t.volume_ml)
        for name in DISEASE_NAMES
        if name in present
    }
    middle_first, lungs_first = READING_ORDERS
    order = lungs_first if rng.random() < _LUNGS_FIRST_SHARE else middle_first
    sentences: list[str] = []
    for name in sorted(DISEASE_NAMES, key=lambda name: order.index(ORGAN_OF[name])):
        if name in by_name:
            sentences.extend(_SENTENCES[name](by_name[name], rng))
        elif name in _NEGATIVES and rng.random() < _DENIED_SHARE:
            sentences.append(_pick(rng, *_NEGATIVES[name]))
    findings = " ".join(sentences) or "The lungs are clear."
    return ReportText(findings, _impression(by_name, rng), _recommendations(by_name, rng))


def place(item: FindingTruth) -> str:
    """Where a piece lies, in words: 'right upper lobe', 'left pleural space', 'mediastinum'."""
    return REGION_BY_ID[REGION_IDS[item.region]].name


def _pick(rng: Rng, *wordings: str) -> str:
    return wordings[int(rng.integers(len(wordings)))]


def _degree(item: FindingTruth, rng: Rng) -> str:
    if item.severity < 0.34:
        return _pick(rng, "mild", "slight", "minor")
    return _pick(rng, "moderate") if item.severity < 0.67 else _pick(rng, "marked", "pronounced", "extensive")


def listed(words: Sequence[str]) -> str:
    """``a, b and c``, each once."""
    unique = list(dict.fromkeys(words))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} and {unique[-1]}"


def _ml(item: FindingTruth) -> str:
    return f"{max(item.volume_ml, 1.0):.0f} ml"


def _a(words: str) -> str:
    return f"{'An' if words.startswith(('a', 'e', 'i', 'o', 'u')) else 'A'} {words}"


def _nodules(items: Sequence[FindingTruth], rng: Rng) -> list[str]:
    said = []
    for item in items[:4]:
        kind = "" if item.kind == "solid" and rng.random() < 0.5 else f"{item.kind} "
        size = f"{item.size_mm:.0f} mm"
        said.append(
            _pick(
                rng,
                f"{_a(kind + 'nodule')} of {size} is seen in the {place(item)}.",
                f"{_a(kind + 'pulmonary nodule')} measuring {size} lies in the {place(item)}.",
                f"In the {place(item)} there is a {kind}nodule, {size} in diameter.",
            )
        )
    if len(items) > 4:
        more = len(items) - 4
        said.append(
            "A further lung nodule is smaller." if more == 1 else f"{more} further lung nodules are smaller."
        )
    return said


def _sided_effusion(items: Sequence[FindingTruth], rng: Rng) -> list[str]:
    if len({item.side for item in items}) == 2:
        kinds = listed([f"{item.kind} on the {item.side} ({_ml(item)})" for item in items])
        return [
            _pick(rng, f"Bilateral pleural effusion, {kinds}.", f"Pleural effusion on both sides, {kinds}.")
        ]
    item = items[0]
    return [
        _pick(
            rng,
            f"A {item.kind} {item.side} pleural effusion of about {_ml(item)}.",
            f"On the {item.side} there is a {item.kind} pleural effusion, about {_ml(item)}.",
        )
    ]


def _lungs(items: Sequence[FindingTruth]) -> str:
    sides = {item.side for item in items}
    return f"{sides.pop()} lung" if len(sides) == 1 and sides <= {"right", "left"} else "both lungs"


def _lobar(noun: str, *forms: str) -> Callable[[Sequence[FindingTruth], Rng], list[str]]:
    """Sentences of lungs and vessels; forms may use {degree}, {Degree}, {places}, {show}, {has}, {lungs}, {size}."""

    def say(items: Sequence[FindingTruth], rng: Rng) -> list[str]:
        degree = _degree(items[0], rng)
        is_one = len({place(item) for item in items}) == 1
        text = _pick(rng, *forms).format(
            degree=degree,
            Degree=degree.capitalize(),
            places=listed([place(item) for item in items]),
            show="shows" if is_one else "show",
            has="has" if is_one else "have",
            lungs=_lungs(items),
            size=f"{items[0].size_mm:.0f} mm",
            kind=items[0].kind,
        )
        assert noun.lower() in text.lower(), f"'{text}' does not name {noun}"
        return [text]

    return say


_BANDS = _lobar(
    "atelectasis", "Band-shaped atelectasis in the {places}.", "Subsegmental atelectasis of the {places}."
)
_COLLAPSE = _lobar(
    "atelectasis",
    "Atelectasis of the whole {places} with volume loss.",
    "Lobar atelectasis: the {places} {has} collapsed and the mediastinum has moved toward it.",
)


def _atelectasis(items: Sequence[FindingTruth], rng: Rng) -> list[str]:
    return (_COLLAPSE if items[0].kind == "lobar" else _BANDS)(items, rng)


_SENTENCES: dict[str, Callable[[Sequence[FindingTruth], Rng], list[str]]] = {
    "Medical material": lambda items, rng: [
        _pick(
            rng,
            f"Medical material: {items[0].kind} in place.",
            "Sternal wires are in place (medical material)."
            if items[0].kind == "sternal wires"
            else f"{_a(items[0].kind)} is in place (medical material).",
        )
    ],
    "Arterial wall calcification": _lobar(
        "calcif",
        "{Degree} calcification of the aortic wall.",
        "Arterial wall calcifications, {degree}, along the aorta.",
    ),
    "Cardiomegaly": lambda items, rng: [
        _pick(
            rng,
            "The heart is enlarged.",
            f"{_degree(items[0], rng).capitalize()} cardiomegaly.",
        )
    ],
    "Pericardial effusion": lambda items, rng: [
        _pick(
            rng,
            f"Pericardial effusion of about {_ml(items[0])}, deepest posteriorly.",
            f"There is pericardial effusion, about {_ml(items[0])}.",
        )
    ],
    "Coronary artery wall calcification": _lobar(
        "coronary",
        "{Degree} coronary artery calcification.",
        "The coronary arteries show {degree} wall calcifications.",
    ),
    "Hiatal hernia": lambda items, rng: [
        _pick(
            rng,
            "Hiatal hernia behind the heart.",
            "There is a sliding hiatal hernia.",
        )
    ],
    "Lymphadenopathy": lambda items, rng: [
        _pick(
            rng,
            f"Enlarged mediastinal lymph nodes{_on({item.side for item in items})}.",
            f"Mediastinal lymphadenopathy{_on({item.side for item in items})}.",
        )
    ],
    "Emphysema": _lobar(
        "emphysema", "{Degree} emphysema of {lungs}.", "{Degree} centrilobular emphysema in {lungs}."
    ),
    "Atelectasis": _atelectasis,
    "Lung nodule": _nodules,
    "Lung opacity": _lobar(
        "ground-glass",
        "{Degree} ground-glass opacities in the {places}.",
        "Ground-glass opacity is present in the {places}.",
    ),
    "Pulmonary fibrotic sequela": _lobar(
        "fibro", "Fibrotic bands in the {places}.", "Fibrotic sequelae, {degree}, in the {places}."
    ),
    "Pleural effusion": _sided_effusion,
    "Mosaic attenuation pattern": _lobar(
        "mosaic",
        "{Degree} mosaic attenuation of {lungs}.",
        "Mosaic attenuation pattern in {lungs}, {degree}.",
    ),
    "Peribronchial thickening": _lobar(
        "peribronchial",
        "{Degree} peribronchial thickening in {lungs}.",
        "Peribronchial wall thickening in {lungs}, {degree}.",
    ),
    "Consolidation": _lobar(
        "consolidation",
        "Consolidation with air bronchograms in the {places}.",
        "The {places} {show} consolidation of up to {size}.",
    ),
    "Bronchiectasis": _lobar(
        "bronchiectasis", "{Degree} bronchiectasis in the {places}.", "Bronchiectasis of the {places}."
    ),
    "Interlobular septal thickening": _lobar(
        "interlobular",
        "{Degree} interlobular septal thickening in {lungs}.",
        "Interlobular septa of {lungs} are thickened, {degree}.",
    ),
}

_NEGATIVES: dict[str, tuple[str, ...]] = {
    "Pleural effusion": ("No pleural effusion.", "The pleural spaces are free of fluid."),
    "Pericardial effusion": ("No pericardial effusion.",),
    "Lymphadenopathy": ("No enlarged lymph nodes.", "Lymph nodes are of normal size."),
    "Cardiomegaly": ("The heart is of normal size.", "Heart size is normal."),
    "Lung nodule": ("No suspicious lung nodule.",),
    "Consolidation": ("No consolidation.", "There is no consolidation."),
    "Emphysema": ("No emphysema.",),
    "Hiatal hernia": ("No hiatal hernia.",),
    "Bronchiectasis": ("No bronchiectasis.",),
}


def _on(sides: AbstractSet[str]) -> str:
    sides = sides & {"right", "left"}
    return " on both sides" if len(sides) == 2 else f" on the {next(iter(sides))}" if sides else ""


def _impression(by_name: dict[str, list[FindingTruth]], rng: Rng) -> str:
    if not by_name:
        return _pick(rng, "No abnormality of the chest.", "Normal chest CT.")
    lines = []
    for name in sorted(by_name, key=_URGENCY.index):
        wording = "Ground-glass opacity" if name == "Lung opacity" else name
        lines.append(f"{wording}{_on({item.side for item in by_name[name]})}.")
    return " ".join(lines)


def _recommendations(by_name: dict[str, list[FindingTruth]], rng: Rng) -> str:
    advice = []
    nodules = [item.size_mm for item in by_name.get("Lung nodule", []) if item.kind != "calcified"]
    if nodules and max(nodules) >= 8:
        advice.append(
            _pick(
                rng,
                "Further work-up of the largest nodule.",
                "Follow-up CT in three months, or tissue sampling.",
            )
        )
    elif nodules and max(nodules) >= 6:
        advice.append("Follow-up CT of the nodule in six to twelve months.")
    if "Consolidation" in by_name:
        advice.append(_pick(rng, "Control after treatment.", "Imaging control after therapy in six weeks."))
    if {"Pericardial effusion", "Cardiomegaly"} & by_name.keys():
        advice.append("Echocardiography.")
    return " ".join(advice) or _pick(rng, "None.", "No follow-up is needed on these findings.")
