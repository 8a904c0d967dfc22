"""The figures of an evaluation as a plain text that a person reads in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm3d.evaluation.case_ids import count, named
from vlm3d.labels import LESIONS

_LESION_NAMES = {lesion.key: lesion.name for lesion in LESIONS}
_READINGS = {
    "official": "words as the challenge reads them",
    "words": "words in lower case without punctuation",
}
_MISSING = "-"


def evaluation_text(figures: Mapping[str, Any]) -> str:
    """Everything that `evaluation.json` holds, as tables.

    Args:
        figures: `Evaluation.figures`.
    """
    lines = [
        f"{figures['predictions']} against {figures['truth']}: "
        f"{figures['cases']} cases of {figures['patients']} patients"
        + (f", {len(figures['left_out'])} left out" if figures["left_out"] else ""),
        *_silent(figures["silent"], figures["predictions"]),
    ]
    if figures["training"] not in (None, "trained"):
        words = {
            "untrained": "UNTRAINED: random predictions",
            "synthetic": "trained on synthetic phantoms only",
        }
        lines.append(f"weights: {words[figures['training']]}")
    if figures["training"] != "untrained" and figures["untrained_tasks"]:
        lines.append(f"NOT TRAINED, random: {', '.join(figures['untrained_tasks'])}")
    intervals = figures["intervals"]
    if intervals["resamples"]:
        lines.append(
            f"intervals: {intervals['level']:.0%}, {intervals['method']}, {intervals['resamples']} resamples"
        )
    for title, section in (
        ("Classification", _classification),
        ("Localization", _localization),
        ("Boxes, scored as the VLM3D challenge does", _boxes),
        ("Reports", _reports),
        ("Grounding", _grounding),
        ("Comparison", _comparison),
    ):
        content = figures.get(title.split(",")[0].lower())
        if content is not None:
            lines += ["", title, *section(content, figures)]
    return "\n".join(lines) + "\n"


def number(value: Any, digits: int = 3) -> str:
    """A figure as it is read: with its interval where it has one, a dash where it is not defined."""
    if isinstance(value, Mapping):
        middle = number(value["value"], digits)
        if middle == _MISSING or value.get("low") is None:
            return middle
        ends = f" ({number(value['low'], digits)} to {number(value['high'], digits)})"
        return middle + ends + (f" p={value['p_value']:.3g}" if value.get("p_value") is not None else "")
    return _MISSING if value is None else f"{value:.{digits}f}"


def short(value: Any, digits: int = 3) -> str:
    """A figure without its interval."""
    return number(value["value"] if isinstance(value, Mapping) else value, digits)


def _classification(content: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    columns = ("auroc", "ap", "f1", "precision", "recall", "accuracy", "ece", "threshold")
    rows = [
        [name, *(short(found[column]) for column in columns), f"{found['positives']}/{found['cases']}"]
        for name, found in content["per_disease"].items()
    ]
    for group in ("macro", "micro"):
        rows.append([group, *(short(content[group].get(column)) for column in columns), ""])
    totals = ", ".join(f"{name} {number(content['macro'][name])}" for name in ("auroc", "ap", "f1"))
    return [
        f"thresholds: {figures['thresholds']['source']}",
        *_table(["disease", *columns, "positive"], rows),
        f"macro: {totals}",
        f"CRG: {number(content['crg'])}",
    ]


def _localization(content: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    columns = ("dice", "iou", "sensitivity", "precision", "hd95_mm", "average_surface_mm", "surface_dice")
    rows, singles = [], []
    for key, found in content["per_lesion"].items():
        name, single = _LESION_NAMES.get(key, key), found["single_lesions"]
        values = [number(found["dice"]), *(short(found[column]) for column in columns[1:])]
        with_lesion = f"{found['with_lesion']}/{found['cases']}"
        rows.append([name, *values, with_lesion, str(found["missed"]), str(found["invented"])])
        counts = f"{single['truth']}/{single['predicted']}"
        rates = [short(single[column]) for column in ("sensitivity", "precision", "ap50")]
        singles.append([name, counts, *rates, *(short(value) for value in single["froc"].values())])
        singles += [
            [f"  {size}", str(part["truth"]), short(part["sensitivity"]), *[""] * (2 + len(single["froc"]))]
            for size, part in single["by_size"].items()
            if part["truth"]
        ]
    rows.append(["macro", *(short(content["macro"][column]) for column in columns), "", "", ""])
    froc = next(iter(content["per_lesion"].values()))["single_lesions"]["froc"]
    left = ", ".join(_LESION_NAMES.get(key, key) for key in content["not_drawn"])
    header = ["single lesions", "true/predicted", "sensitivity", "precision", "ap50"]
    return [
        *_table(["lesion", *columns, "with lesion", "missed", "invented"], rows),
        *([f"not scored, since the predictions hold no mask of it in any case: {left}"] if left else []),
        "",
        *_table([*header, *(f"at {rate} FP/scan" for rate in froc)], singles),
    ]


def _boxes(content: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    rows = [
        [_LESION_NAMES.get(key, key), short(found["iou"]), short(found["distance_mm"], 1)]
        for key, found in content["per_lesion"].items()
    ]
    rows.append(["macro", short(content["macro"]["iou"]), short(content["macro"]["distance_mm"], 1)])
    froc = ", ".join(f"{short(value)} at {rate}" for rate, value in content["froc"].items())
    return [*_table(["lesion", "iou", "distance_mm"], rows), f"sensitivity at false positives a scan: {froc}"]


def _reports(content: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    lines = [f"{content['cases']} reports, {content['missing']} of them not written"]
    for reading, title in _READINGS.items():
        if reading in content:
            lines += [f"{title}:", *(f"  {name} {number(value)}" for name, value in content[reading].items())]
    if "meaning" in content:
        meaning = content["meaning"]
        values = ", ".join(f"{name} {number(meaning[name])}" for name in ("precision", "recall", "f1"))
        lines.append(f"BERTScore with {meaning['encoder']}: {values}")
    clinical = content["clinical"]
    columns = ("f1", "precision", "recall", "accuracy")
    rows = [
        [name, *(short(found[column]) for column in columns), f"{found['positives']}/{found['cases']}"]
        for name, found in clinical["per_disease"].items()
    ]
    rows.append(["macro", *(short(clinical["macro"][column]) for column in columns), ""])
    lines.append(f"findings in the text, read by {clinical['labeler']}; truth: {clinical['truth']}")
    lines += _table(["finding", *columns, "positive"], rows)
    return [*lines, f"macro F1: {number(clinical['macro']['f1'])}", f"CRG: {number(clinical['crg'])}"]


def grounding_rows(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Whether the reports say what the scans show: name and figure; names that begin with a space belong to the one before.

    Args:
        content: The section ``grounding`` of an evaluation.
    """
    return [
        ("macro F1 of the findings in the texts", number(content["report_macro_f1"])),
        ("macro F1 of the classifier", number(content["classifier_macro_f1"])),
        ("  texts minus classifier", number(content["macro_f1_difference"])),
        ("  as the language model wrote them", number(content["written_macro_f1"])),
        *(
            (f"right {place} of true positives ({found['right']}/{found['judged']})", number(found["share"]))
            for place, found in (("side", content["right_side"]), ("lobe", content["right_lobe"]))
        ),
        ("valid format", number(content["valid_format"])),
        (
            f"no contradiction with the heads ({content['contradictions_checked']} checked)",
            number(content["no_contradiction"]),
        ),
        ("  as the language model wrote them", number(content["no_contradiction_written"])),
        ("BLEU-4, as the challenge reads words", number(content["bleu_4"])),
        ("  as the language model wrote them", number(content["bleu_4_written"])),
    ]


def _grounding(content: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    lines = [f"{content['reports']} reports, written from findings at thresholds: {content['thresholds']}"]
    rows = grounding_rows(content)
    width = max(len(name) for name, _ in rows)
    return [*lines, *(f"  {name.ljust(width)}  {value}" for name, value in rows)]


def _comparison(content: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    rows = comparison_rows(content)
    width = max((len(name) for name, _ in rows), default=0)
    return [
        f"{figures['predictions']} minus {content['against']}, the same patients in every resample",
        *_silent(content["silent"], content["against"]),
        f"thresholds of {content['against']}: {content['thresholds']}",
        *(f"  {name.ljust(width)}  {number(value)}" for name, value in rows),
    ]


def comparison_rows(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What two systems are compared by: name and difference."""
    rows: list[tuple[str, Any]] = []
    if (found := content.get("classification")) is not None:
        rows += [(f"macro {name}", found["macro"][name]) for name in ("auroc", "ap", "f1")]
        rows.append(("CRG", found["crg"]))
        rows += [
            (f"AUROC of {name.lower()}", values["auroc"]) for name, values in found["per_disease"].items()
        ]
    if (found := content.get("localization")) is not None:
        rows.append(("mean Dice", found["macro"]["dice"]))
        rows += [
            (f"Dice of {_LESION_NAMES.get(key, key).lower()}", values["dice"])
            for key, values in found["per_lesion"].items()
        ]
    if (found := content.get("reports")) is not None:
        for reading, title in _READINGS.items():
            if reading in found:
                rows += [(f"{name}, {title}", value) for name, value in found[reading].items()]
        rows.append(("macro F1 of the reports' findings", found["clinical"]["macro"]["f1"]))
        rows.append(("CRG of the reports' findings", found["clinical"]["crg"]))
    return rows


def _silent(silent: Mapping[str, Sequence[str]], name: str) -> list[str]:
    return [
        f"{name} says nothing of the {part} of {count(len(ids), 'case')}: {named(ids)}"
        for part, ids in silent.items()
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
