"""Accumulation over batches, tasks and processes; the figures themselves are tested beside their files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlm3d import MultiTaskMetrics
from vlm3d.evaluation.classification import auroc, classification_figures
from vlm3d.evaluation.localization import localization_figures, mask_record
from vlm3d.evaluation.report import report_scores
from vlm3d.labels import DISEASE_NAMES


def test_batches_add_up_and_unknown_labels_are_left_out() -> None:
    torch.manual_seed(0)
    probabilities, labels = torch.rand(12, 18), torch.randint(0, 2, (12, 18)).float()
    labels[0, 3] = math.nan
    whole, parts = MultiTaskMetrics(), MultiTaskMetrics()
    whole.update(probabilities, labels)
    for start in range(0, 12, 5):
        parts.update(probabilities[start : start + 5], labels[start : start + 5])
    assert whole.compute() == parts.compute()
    figures = whole.compute()["classification"]
    assert figures["per_disease"]["Hiatal hernia"]["cases"] == 12
    assert figures["per_disease"]["Pericardial effusion"]["cases"] == 11
    known = labels[1:, 3].numpy() > 0.5
    assert figures["per_disease"]["Pericardial effusion"]["auroc"] == pytest.approx(
        auroc(probabilities[1:, 3].double().numpy(), known)
    )


def test_dice_and_iou() -> None:
    truth, predicted = torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)
    truth[0, 0, :2] = 1
    predicted[0, 0, 1:3] = 0.9
    truth[1] = -1
    metrics = MultiTaskMetrics()
    metrics.update(lesion_probabilities={"lung_nodule": predicted}, lesion_masks={"lung_nodule": truth})
    nodule = metrics.compute()["localization"]["per_lesion"]["lung_nodule"]
    assert nodule == {"dice": pytest.approx(0.5), "iou": pytest.approx(1 / 3), "cases": 2}
    assert math.isnan(metrics.compute()["localization"]["per_lesion"]["consolidation"]["dice"])


def test_wrong_input_is_refused() -> None:
    metrics = MultiTaskMetrics()
    with pytest.raises(ValueError, match="NaN"):
        metrics.update(torch.full((1, 18), math.nan), torch.zeros(1, 18))
    with pytest.raises(ValueError, match="17"):
        metrics.update(torch.zeros(1, 17), torch.zeros(1, 18))
    with pytest.raises(ValueError, match="tumor"):
        metrics.update(lesion_probabilities={}, lesion_masks={"tumor": torch.zeros(1, 2, 2, 2)})
    assert metrics.compute() == {}


def batch(seed: int, cases: int = 3) -> dict[str, object]:
    """All three tasks of a few cases."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.avg_pool3d(torch.rand(cases, 8, 12, 12, generator=generator), 3, 1, 1) > 0.52
    noise = torch.rand(truth.shape, generator=generator)
    return {
        "probabilities_BK": torch.rand(cases, 18, generator=generator),
        "labels_BK": (torch.rand(cases, 18, generator=generator) < 0.4).float(),
        "lesion_probabilities": {"consolidation": 0.5 * truth + 0.5 * noise},
        "lesion_masks": {"consolidation": truth.float()},
        "spacing_mm": (2.0, 1.0, 1.0),
        "reports": [f"nodule of {seed + n} mm in the left lung" for n in range(cases)],
        "reference_reports": [f"a nodule of {n} mm in the left lung" for n in range(cases)],
        "case_ids": [f"case_{seed}_{n}" for n in range(cases)],
    }


def test_all_tasks_equal_their_own_functions() -> None:
    metrics = MultiTaskMetrics(mask_threshold=0.65, report_reading="words")
    first, second = batch(0), batch(1)
    metrics.update(**first)  # type: ignore[arg-type]
    metrics.update(**second)  # type: ignore[arg-type]
    found = metrics.compute()
    probability, label = (
        torch.cat([first[key], second[key]]).double().numpy()  # type: ignore[list-item]
        for key in ("probabilities_BK", "labels_BK")
    )
    expected = classification_figures(probability, label, DISEASE_NAMES)
    assert found["classification"]["crg"] == expected["crg"]
    assert found["classification"]["micro"] == expected["micro"]
    row = found["classification"]["per_disease"]["Emphysema"]
    assert row["brier"] == pytest.approx(((probability - label)[:, 7] ** 2).mean())
    assert 0 <= found["classification"]["macro"]["ece"] <= 1
    records = [
        mask_record((p >= 0.65).numpy(), (t > 0).numpy(), (2.0, 1.0, 1.0), p.numpy())
        for one in (first, second)
        for p, t in zip(
            one["lesion_probabilities"]["consolidation"],  # type: ignore[index]
            one["lesion_masks"]["consolidation"],  # type: ignore[index]
            strict=True,
        )
    ]
    own = localization_figures({"consolidation": records})["per_lesion"]["consolidation"]
    assert json.dumps(found["localization"]["per_lesion"]["consolidation"]) == json.dumps(own)
    assert 0 < own["dice"] < 1
    assert own["lesions"]["truth"] > 0
    texts = [[*first[key], *second[key]] for key in ("reports", "reference_reports")]  # type: ignore[misc]
    assert found["reports"] == report_scores(*texts, "words").figures | {"cases": 6, "reading": "words"}


def test_spacing_of_each_case_and_absent_references() -> None:
    one = batch(2, cases=2)
    apart, together = MultiTaskMetrics(), MultiTaskMetrics()
    together.update(
        **one | {"spacing_mm": torch.tensor([[2.0, 1, 1], [5.0, 1, 1]]), "reference_reports": ["text", None]}  # type: ignore[arg-type]
    )
    for b, spacing in enumerate([(2.0, 1, 1), (5.0, 1, 1)]):
        apart.update(
            lesion_probabilities={"consolidation": one["lesion_probabilities"]["consolidation"][b : b + 1]},  # type: ignore[index]
            lesion_masks={"consolidation": one["lesion_masks"]["consolidation"][b : b + 1]},  # type: ignore[index]
            spacing_mm=spacing,
        )
    assert together.compute()["reports"]["cases"] == 1
    figures = [one.compute()["localization"]["per_lesion"]["consolidation"] for one in (together, apart)]
    assert json.dumps(figures[0]) == json.dumps(figures[1])


def test_a_case_counts_once() -> None:
    metrics = MultiTaskMetrics()
    metrics.update(**batch(0))  # type: ignore[arg-type]
    before = metrics.compute()
    with pytest.raises(ValueError, match="twice: case_0_0, case_0_1"):
        metrics.update(**batch(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 case ids for a batch of 3"):
        metrics.update(**batch(3) | {"case_ids": ["a", "b"]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 generated reports against 1"):
        metrics.update(reports=["a", "b", "c"], reference_reports=["a"])
    assert metrics.compute()["reports"] == before["reports"]
    assert metrics.gather().compute()["reports"] == before["reports"]
    metrics.reset()
    assert metrics.compute() == {}


PROCESS = """
import json, sys
import torch.distributed as distributed
from vlm3d import MultiTaskMetrics
sys.path.insert(0, sys.argv[3])
from test_metrics import batch
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
metrics = MultiTaskMetrics()
metrics.update(**batch(rank))
if rank == 1:
    metrics.update(**batch(0))  # the sampler's filling: process 0 saw these cases too
print(json.dumps(metrics.gather().compute()))
distributed.destroy_process_group()
"""


def test_processes_gather_each_case_once(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "store"), str(Path(__file__).parent)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    alone = MultiTaskMetrics()
    alone.update(**batch(0))  # type: ignore[arg-type]
    alone.update(**batch(1))  # type: ignore[arg-type]
    expected = json.loads(json.dumps(alone.compute()))
    for output, _ in results:
        found = json.loads(output)
        assert found["reports"] == pytest.approx(expected["reports"], abs=1e-12)
        assert found["classification"]["micro"] == pytest.approx(
            expected["classification"]["micro"], abs=1e-12
        )
        found, whole = (one["localization"]["per_lesion"]["consolidation"] for one in (found, expected))
        assert found["cases"] == whole["cases"] == 6
        assert found["lesions"]["truth"] == whole["lesions"]["truth"]
        assert found["hd95_mm"] == pytest.approx(whole["hd95_mm"])
