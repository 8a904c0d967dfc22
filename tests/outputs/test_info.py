"""The info page counts; it does not quote."""

from __future__ import annotations

from vlm3d.anatomy.regions import REGIONS
from vlm3d.config import load_config
from vlm3d.labels import DISEASE_NAMES, STORED_LESIONS
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.outputs.info import info_text, size_table


def test_everything_is_named() -> None:
    text = info_text()
    for name in (
        *DISEASE_NAMES,
        *(lesion.key for lesion in STORED_LESIONS),
        *(region.name for region in REGIONS),
        "NRRD",
    ):
        assert name in text
    for size in ("tiny", "small", "medium", "large"):
        assert f"Size '{size}'" in text


def test_counts_come_from_the_model() -> None:
    model = VLM3DMultiTask(load_config("tiny"), load_text=False, device="meta")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{total:,}" in size_table("tiny")
    assert "in the plan" in size_table("large")
    assert "in the plan" not in size_table("tiny")
