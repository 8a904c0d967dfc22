"""A language model sharded over two processes teaches, validates and writes what a whole one in each does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.training_store import losses, training_config
from support.two_processes import train_in_two_processes
from vlm3d.config import Config
from vlm3d.errors import ConfigError
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.training.phases import check_sharding, check_torch_shards_bytes
from vlm3d.training.tracking import read_metrics

HALF = """
from vlm3d.model.sharded_language_model import ShardedLanguageModel, layer_parameters
llm = trainer.model.report_generator.llm
assert isinstance(llm, ShardedLanguageModel)
for parameter in layer_parameters(llm):
    held = parameter.to_local().untyped_storage().nbytes()
    assert held <= (parameter.numel() + 1) // 2 * parameter.element_size(), parameter.shape
    assert QUANTIZED == (parameter.dtype == torch.uint8) or parameter.ndim == 1
for parameter in (*llm.adapter_parameters().values(), llm.model.get_input_embeddings().weight):
    assert type(parameter) is torch.nn.Parameter
"""


def _config(pretrained: dict[str, Any], *, sharded: bool, load_in_4bit: bool, checkpointing: bool) -> Config:
    config = training_config(pretrained, shard_language_model=sharded, validate_every=2)
    vision = config.model.vision.model_copy(update={"gradient_checkpointing": checkpointing})
    report = config.model.report.model_copy(update={"load_in_4bit": load_in_4bit})
    loss = config.loss.model_copy(update={"balancing": "gradnorm"})
    model = config.model.model_copy(update={"report": report, "vision": vision})
    return config.model_copy(update={"model": model, "loss": loss})


@pytest.mark.parametrize(("load_in_4bit", "checkpointing"), [(False, False), (True, True)])
def test_shards_teach_what_the_whole_does(
    tmp_path: Path, store: Path, pretrained: dict[str, Any], load_in_4bit: bool, checkpointing: bool
) -> None:
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    for folder in (whole, shards):
        folder.mkdir()
        sharded = folder == shards
        config = _config(pretrained, sharded=sharded, load_in_4bit=load_in_4bit, checkpointing=checkpointing)
        then = HALF.replace("QUANTIZED", str(load_in_4bit)) if sharded else ""
        if sharded and load_in_4bit:  # stopped in the middle, and gone on with
            train_in_two_processes(config, store, folder, ["1.3", "2"], stop_after=8)
        train_in_two_processes(config, store, folder, ["1.3", "2"], then)
    a, b = (read_metrics(folder / "two") for folder in (whole, shards))
    np.testing.assert_allclose(losses(b), losses(a), atol=1e-6, rtol=0)
    judged = [[line["valid/report_loss"] for line in run if "valid/report_loss" in line] for run in (a, b)]
    assert len(judged[0]) == 6
    assert judged[1] == pytest.approx(judged[0], abs=1e-6)
    written = [
        {
            path.relative_to(folder): path.read_text(encoding="utf-8")
            for path in folder.rglob("samples/**/*.txt")
        }
        for folder in (whole, shards)
    ]
    assert written[0] == written[1] != {}
    a, b = (
        VLM3DMultiTask.from_pretrained(folder / "two" / "final").checkpoint_state_dict()
        for folder in (whole, shards)
    )
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=0)


def test_a_process_whose_scans_have_no_report_runs_the_layers_as_often(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    few = tmp_path / "store"
    shutil.copytree(store, few)
    lines = [json.loads(text) for text in (few / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    told = next(line["case_id"] for line in lines if line["split"] == "train")
    silent = [line if line["case_id"] == told else line | {"report": ""} for line in lines]
    (few / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in silent), encoding="utf-8")
    config = _config(pretrained, sharded=True, load_in_4bit=False, checkpointing=False)
    train_in_two_processes(config, few, tmp_path, ["2"])
    assert (tmp_path / "two" / "final").is_dir()


def test_what_shards_cannot_do_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sharding(["alignment", "joint"])
    with pytest.raises(ConfigError, match=r"set training\.shard_language_model=false"):
        check_sharding(["grpo"])
    check_torch_shards_bytes()
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1+cpu"))
    with pytest.raises(ConfigError, match=r"needs torch 2\.13, this is 2\.12\.1"):
        check_torch_shards_bytes()
