"""The report labeler and the location facts: agreement with hand-made labels and with phantoms' truth, and speed, as JSON.

python benchmarks/labeler.py                    labels on 600 + 200 reports (if they are there), speed, 300 phantoms
python benchmarks/labeler.py --phantoms 30      fewer phantoms (about a second each)

Reports: 800 with hand-made labels in ``$VLM3D_REAL_DATA/reports`` or ``../shared/data/reports``. They are put in order of
the SHA-256 of their AccessionNo; rules were written while looking at the first 600, of the other 200 only the score.

A location fact is **exact** if its finding, side, lobe and size (in whole mm) are those of the pieces that the report's
sentence was written from: each of the four largest nodules, the lobes of atelectasis, ground glass, fibrosis,
consolidation and bronchiectasis, the sides of a pleural effusion, the sizes of heart, hernia and nodes. The figure is the
number of exact facts by that of the facts to tell plus those that were told too much.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.datasets.phantom import generate_phantom
from vlm3d.datasets.phantom.truth import FindingTruth
from vlm3d.evaluation.labeler import label_report, label_reports
from vlm3d.evaluation.location_facts import LocationFact, location_facts
from vlm3d.labels import DISEASE_NAMES, IMPLIED

TUNED, FIRST_SEED = 600, 10_000
COARSE_MM = (8.0, 4.0, 4.0)
IN_LOBES = (
    *("Atelectasis", "Lung opacity", "Pulmonary fibrotic sequela", "Consolidation", "Bronchiectasis"),
)
SIZED = ("Cardiomegaly", "Hiatal hernia", "Lymphadenopathy")
Fact = tuple[str, str | None, str | None, int | None]
"""Finding, side, lobe, size in whole mm."""


def main() -> None:
    """Print one JSON line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phantoms", type=int, default=300)
    arguments = parser.parse_args()
    data = Path(os.environ.get("VLM3D_REAL_DATA", "../shared/data"))
    table = data / "reports" / "ct_clip_reports_with_manual_labels.csv"
    if table.is_file():
        measure_reports(table)
    else:
        print(json.dumps({"skipped": "no labeled reports: set VLM3D_REAL_DATA"}))
    if arguments.phantoms:
        measure_phantoms(arguments.phantoms)


def measure_reports(table: Path) -> None:
    """Agreement with hand-made labels, and speed."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: hashlib.sha256(row["AccessionNo"].encode()).hexdigest())
    texts = [row["report_text"] for row in rows]
    truth_NK = np.array([[float(row[name]) > 0.5 for name in DISEASE_NAMES] for row in rows])
    label_reports(texts[:20])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        called_NK = label_reports(texts)
        seconds.append(time.process_time() - start)
    for name, part in (("tuned_on", slice(0, TUNED)), ("held_out", slice(TUNED, None))):
        figures = f1_scores(called_NK[part], truth_NK[part])
        macro = round(float(np.mean(list(figures.values()))), 4)
        print(json.dumps({"reports": name, "count": len(texts[part]), "macro_f1": macro, "f1": figures}))
    print(json.dumps({"reports_per_cpu_second": round(len(texts) / min(seconds)), "runs": 3, "best_of": 3}))


def measure_phantoms(count: int) -> None:
    """Labels and location facts of phantoms' reports against what they were written from."""
    called, truth = [], []
    exact = told = too_much = 0
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        phantom = generate_phantom(seed, spacing_mm=COARSE_MM)
        labels = label_report(phantom.report.text)
        implied = {IMPLIED[name] for name in labels.present if name in IMPLIED}
        called.append([name in {*labels.present, *implied} for name in DISEASE_NAMES])
        truth.append(phantom.disease_labels > 0.5)
        hits, expected, extra = score_facts(location_facts(phantom.report.text), phantom.truth)
        exact, told, too_much = exact + hits, told + expected, too_much + extra
    figures = f1_scores(np.array(called), np.array(truth))
    row: dict[str, Any] = {
        "phantoms": count,
        "first_seed": FIRST_SEED,
        "facts_exact": round(exact / (told + too_much), 4),
        "facts": {"exact": exact, "to_tell": told, "too_much": too_much},
        "macro_f1": round(float(np.mean(list(figures.values()))), 4),
        "labels_equal": round(float(np.mean(np.array(called) == np.array(truth))), 5),
        "f1": figures,
    }
    print(json.dumps(row))


def score_facts(facts: Sequence[LocationFact], truth: Sequence[FindingTruth]) -> tuple[int, int, int]:
    """Exact facts, facts to tell, and facts told too much, of the findings whose sentences give a place or a size."""
    expected = expected_facts(truth)
    compared = {name for name, *_ in expected} | {"Lung nodule", "Pleural effusion", *IN_LOBES, *SIZED}
    said = Counter(
        (fact.finding, fact.side, fact.region, None if fact.size_mm is None else round(fact.size_mm))
        for fact in facts
        if fact.finding in compared
    )
    said = Counter(
        {(n, None, None, size) if n in SIZED else (n, *rest, size): c for (n, *rest, size), c in said.items()}
    )
    first_size = largest_consolidation(truth)
    said = Counter(
        {_without_size(fact) if fact == first_size else fact: number for fact, number in said.items()}
    )
    hits = sum((said & expected).values())
    return hits, sum(expected.values()), sum((said - expected).values())


def expected_facts(truth: Sequence[FindingTruth]) -> Counter[Fact]:
    """What the sentences of a phantom's report give of its pieces; sides of heart and nodes are not compared."""
    by_name: dict[str, list[FindingTruth]] = {}
    for item in sorted(truth, key=lambda item: -item.volume_ml):
        by_name.setdefault(item.finding, []).append(item)
    facts: Counter[Fact] = Counter()
    for name, items in by_name.items():
        if name == "Lung nodule":
            facts.update((name, item.side, item.region, round(item.size_mm)) for item in items[:4])
            if len({item.side for item in items[:4]}) == 1 and len({item.side for item in items}) == 2:
                facts[(name, "bilateral", None, None)] += 1  # told by the impression alone
        elif name == "Pleural effusion":
            sides = {item.side for item in items}
            size = round(items[0].size_mm) if len(sides) == 1 else None
            facts.update((name, side, f"{side}_pleural_space", size) for side in sides)
        elif name in IN_LOBES:
            facts.update({(name, item.side, item.region, None) for item in items})
        elif name in SIZED:
            facts[(name, None, None, round(max(item.size_mm for item in items)))] += 1
    return facts


def largest_consolidation(truth: Sequence[FindingTruth]) -> Fact | None:
    """The fact of the consolidation whose size some wordings give."""
    pieces = [item for item in truth if item.finding == "Consolidation"]
    if not pieces:
        return None
    largest = max(pieces, key=lambda item: item.volume_ml)
    return largest.finding, largest.side, largest.region, round(largest.size_mm)


def _without_size(fact: Fact) -> Fact:
    return (*fact[:3], None)


def f1_scores(called_NK: NDArray[np.bool_], truth_NK: NDArray[np.bool_]) -> dict[str, float]:
    """F1 of every finding that is there, or was said to be there, in any report."""
    hits_K = (called_NK & truth_NK).sum(axis=0)
    total_K = 2 * hits_K + (called_NK != truth_NK).sum(axis=0)
    return {
        name: round(float(2 * hits / total), 4)
        for name, hits, total in zip(DISEASE_NAMES, hits_K, total_K, strict=True)
        if total
    }


if __name__ == "__main__":
    main()
