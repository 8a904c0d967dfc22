"""Training as a user runs it: phases to a checkpoint, resumed after a kill, refused where it cannot learn."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.training_store import losses, phantom_store, training_config
from support.two_processes import train_in_two_processes
from vlm3d.config import Config, load_config
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.errors import ConfigError, DataError, TrainingError
from vlm3d.labels import TASKS
from vlm3d.model.checkpoint import read_training
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.training.phases import check_start, learnable_phases
from vlm3d.training.timing import measured_seconds_per_step
from vlm3d.training.tracking import read_metrics
from vlm3d.training.trainer import Trainer, TrainingRequest, train
from vlm3d.training.validation import Validation


def test_all_phases_end_in_a_checkpoint_that_predicts(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    final = train(TrainingRequest(training_config(pretrained), store, tmp_path / "run"))
    model = VLM3DMultiTask.from_pretrained(final)
    found = model.predict(torch.zeros(1, 1, 8, 32, 32))
    assert found["reports"]
    note = read_training(final)
    assert note["status"] == model.training_status == "synthetic"
    assert note["training_cases"] == {"phantom": 5}
    assert note["anatomy"] == ["phantom"]
    metrics = read_metrics(tmp_path / "run")
    assert model.untrained_tasks == ()
    after_masks = VLM3DMultiTask.from_pretrained(tmp_path / "run" / "localization")
    assert after_masks.untrained_tasks == ("generation",)
    assert {line["phase"] for line in metrics} == {
        "local",
        "classification",
        "localization",
        "alignment",
        "joint",
    }
    assert any("valid/auroc" in line for line in metrics)
    assert any("valid/report_loss" in line for line in metrics)
    assert len(losses(metrics)) == 30
    assert list((tmp_path / "run" / "samples").glob("*/*.png"))


def test_a_run_may_start_from_weights_with_fewer_mask_prompts_that_were_read_otherwise(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    config = training_config(pretrained)
    start = VLM3DMultiTask(config)
    start.save_pretrained(tmp_path / "start")
    count = config.model.localizer.num_lesion_diseases
    changes = {"num_lesion_diseases": count + 3, "read_mirrored": True}
    localizer = config.model.localizer.model_copy(update=changes)
    more = config.model_copy(update={"model": config.model.model_copy(update={"localizer": localizer})})
    trainer = Trainer(TrainingRequest(more, store, tmp_path / "run", ["1.2"], start_from=tmp_path / "start"))
    embedding_LT = trainer.model.localizer.text_embedder.prompt_embedding
    torch.testing.assert_close(embedding_LT[:count], start.localizer.text_embedder.prompt_embedding)
    assert embedding_LT[count:].abs().sum(dim=1).min() > 0
    for name, weight in start.localizer.unet.named_parameters():
        assert torch.equal(weight, trainer.model.localizer.unet.get_parameter(name))
    vision = config.model.vision.model_copy(update={"depth": config.model.vision.depth + 1})
    other = config.model_copy(update={"model": config.model.model_copy(update={"vision": vision})})
    with pytest.raises(ConfigError, match="another model"):
        Trainer(TrainingRequest(other, store, tmp_path / "other", ["1.2"], start_from=tmp_path / "start"))


def test_what_a_run_started_from_is_kept_over_a_restart(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    config = training_config(pretrained)
    start = VLM3DMultiTask(config)
    start.learned_anatomy = ("classical",)
    start.save_pretrained(tmp_path / "start")
    request = TrainingRequest(
        config, store, tmp_path / "run", ["1.2"], start_from=tmp_path / "start", stop_after=1
    )
    train(request)
    note = read_training(train(replace(request, start_from=None, stop_after=None)))
    assert note["started_from"]["fingerprint"] == start.fingerprint()
    assert note["started_from"]["anatomy"] == ["classical"]
    assert note["anatomy"] == ["classical", "phantom"]


def test_only_the_parts_of_a_phase_change(tmp_path: Path, store: Path, pretrained: dict[str, Any]) -> None:
    config = training_config(pretrained)
    final = train(TrainingRequest(config, store, tmp_path / "run", phases=["1.2"]))
    torch.manual_seed(config.training.seed)
    start = VLM3DMultiTask(config, load_llm=False).checkpoint_state_dict()
    end = VLM3DMultiTask.from_pretrained(final).checkpoint_state_dict()
    changed = {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])}
    assert changed == {"localizer"}


def test_the_loss_falls_on_scans_seen_again_and_again(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    config = training_config(pretrained, ema_decay=0.0)
    phase = config.training.phases.classification.model_copy(update={"steps": 60, "lr": 3e-3})
    phases = config.training.phases.model_copy(update={"classification": phase})
    config = config.model_copy(update={"training": config.training.model_copy(update={"phases": phases})})
    train(TrainingRequest(config, store, tmp_path / "run", phases=["1.1"]))
    told = losses(read_metrics(tmp_path / "run"))
    assert told[-10:].mean() < 0.7 * told[:5].mean()


def test_a_run_killed_in_the_middle_goes_on_as_if_nothing_had_been(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    config = training_config(pretrained)
    train(TrainingRequest(config, store, tmp_path / "whole", phases=["classification", "joint"]))
    whole = losses(read_metrics(tmp_path / "whole"))

    request_file = tmp_path / "request.json"
    request_file.write_text(config.model_dump_json(), encoding="utf-8")
    killed = _train_and_kill(request_file, store, tmp_path / "killed", after_lines=9)
    assert killed  # it was running when it was killed
    train(TrainingRequest(config, store, tmp_path / "killed", phases=["classification", "joint"]))
    again = losses(read_metrics(tmp_path / "killed"))
    np.testing.assert_allclose(again, whole, atol=1e-6, rtol=0)
    a = VLM3DMultiTask.from_pretrained(tmp_path / "whole" / "final").fingerprint()
    b = VLM3DMultiTask.from_pretrained(tmp_path / "killed" / "final").fingerprint()
    assert a == b


def _train_and_kill(request_file: Path, store: Path, run: Path, after_lines: int) -> bool:
    """Start training in a process of its own and kill it (-9) once it has told so many steps."""
    code = textwrap.dedent(
        f"""
        import json, time
        from pathlib import Path
        from vlm3d.config import config_from_dict
        from vlm3d.training import trainer
        log = trainer.Trainer._log
        trainer.Trainer._log = lambda *a: (log(*a), time.sleep(0.2))  # slow enough to be caught in the act
        config = config_from_dict(json.loads(Path({str(request_file)!r}).read_text()), "test")
        trainer.train(trainer.TrainingRequest(
            config, Path({str(store)!r}), Path({str(run)!r}), ["classification", "joint"]))
        """
    )
    threads = str(
        torch.get_num_threads()
    )  # sums depend on it, and the uninterrupted run is made in this process
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": threads})
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(
            b"\n"
        ) >= after_lines:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.02)
    process.kill()
    return False


@pytest.mark.parametrize("workers", [0, 1])
def test_stopping_at_any_step_and_resuming_changes_nothing(
    tmp_path: Path, store: Path, pretrained: dict[str, Any], workers: int
) -> None:
    config = training_config(pretrained, loader_workers=workers)
    phases = ["classification", "localization"]  # the first one with dropout
    train(TrainingRequest(config, store, tmp_path / "whole", phases))
    for _ in range(4):  # each call leaves a point to resume from where it stops
        train(TrainingRequest(config, store, tmp_path / "parts", phases, stop_after=3))
    train(TrainingRequest(config, store, tmp_path / "parts", phases))
    np.testing.assert_allclose(
        losses(read_metrics(tmp_path / "parts")), losses(read_metrics(tmp_path / "whole")), atol=1e-6, rtol=0
    )


def test_two_processes_learn_what_one_does_with_twice_the_accumulation(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    def of(accumulate: int) -> Config:
        config = training_config(pretrained)
        phase = config.training.phases.classification.model_copy(
            update={"batch_size": 1, "accumulate": accumulate}
        )
        phases = config.training.phases.model_copy(update={"classification": phase})
        classifier = config.model.classifier.model_copy(update={"dropout": 0.0})
        return config.model_copy(
            update={
                "training": config.training.model_copy(update={"phases": phases}),
                "model": config.model.model_copy(update={"classifier": classifier}),
            }
        )

    one = train(TrainingRequest(of(2), store, tmp_path / "one", ["1.1"]))
    train_in_two_processes(of(1), store, tmp_path, ["1.1"])
    a = VLM3DMultiTask.from_pretrained(one).checkpoint_state_dict()
    b = VLM3DMultiTask.from_pretrained(tmp_path / "two" / "final").checkpoint_state_dict()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)


def test_learned_task_weights_are_the_same_in_two_processes(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    config = training_config(pretrained)
    config = config.model_copy(update={"loss": config.loss.model_copy(update={"balancing": "gradnorm"})})
    then = """
from accelerate.utils import gather
weights = trainer.step_module.loss.gradnorm.weights.data
both = gather(weights[None])
assert (both == both[0]).all(), both
assert not torch.equal(weights, trainer.step_module.loss.start_weights), weights
"""
    train_in_two_processes(config, store, tmp_path, ["2"], then)


def test_a_damaged_case_is_named_counted_and_passed_over(
    tmp_path: Path, store: Path, pretrained: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    hurt = tmp_path / "store"
    shutil.copytree(store, hurt)
    victim = sorted((hurt / "cases").glob("*"))[0]
    for array in victim.glob("*.b2nd"):
        array.write_bytes(array.read_bytes()[:100])
    train(TrainingRequest(training_config(pretrained), hurt, tmp_path / "run", ["1.1"]))
    assert victim.name in caplog.text
    assert read_metrics(tmp_path / "run")[-2]["damaged_cases"] == 1
    state = json.loads((tmp_path / "run" / "last" / "state.json").read_text(encoding="utf-8"))
    assert state["damaged"][victim.name] >= 1


def test_a_loss_that_is_no_number_stops_with_the_cases(
    tmp_path: Path, store: Path, pretrained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(TrainingRequest(training_config(pretrained), store, tmp_path / "run", ["1.1"]))
    with torch.no_grad():
        trainer.model.classifier.bias[3] = float("nan")
    with pytest.raises(TrainingError, match=r"classification loss of step 0 .*phantom_\d+"):
        trainer.run()
    assert not (tmp_path / "run" / "final").exists()


def test_everything_is_checked_before_the_first_step(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    config = training_config(pretrained)
    other = config.model_copy(
        update={"preprocessing": config.preprocessing.model_copy(update={"spacing_mm": (5.0, 4.0, 4.0)})}
    )
    with pytest.raises(ConfigError, match="spacing_mm"):
        Trainer(TrainingRequest(other, store, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"unknown phase '4'; phases are 1\.0"):
        Trainer(TrainingRequest(config, store, tmp_path / "run", phases=["4"]))
    with pytest.raises(DataError, match="no case in the split 'valid'"):
        Trainer(
            TrainingRequest(config, phantom_store(tmp_path / "s", config, train=1, valid=0), tmp_path / "r")
        )
    assert not (tmp_path / "run").exists()


def test_masks_that_are_first_learned_from_single_scans_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = load_config("tiny")
    check_start(config, ["localization", "joint"], TASKS)
    check_start(config, ["joint"], ["generation"])
    assert not caplog.text
    check_start(config, ["alignment", "joint"], TASKS)
    assert "phase joint is the first to learn masks" in caplog.text


def test_where_nothing_tells_how_good_a_phase_is_its_newest_weights_are_kept(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    trainer = Trainer(TrainingRequest(training_config(pretrained), store, tmp_path / "run", ["1.1"]))
    trainer.state.phase = "classification"
    for step, score in ((2, 0.5), (4, 0.9), (6, float("-inf")), (8, 0.9)):
        trainer.state.step = step
        trainer._keep_top("classification", Validation({}, score))
    assert list(trainer.state.best) == ["classification_000004", "classification_000008"]
    trainer._finish("classification")
    assert read_training(tmp_path / "run" / "final")["phase_step"] == 8


def test_other_cases_than_a_run_began_with_are_told(
    tmp_path: Path, store: Path, pretrained: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    request = TrainingRequest(training_config(pretrained), store, tmp_path / "run", ["1.1"], stop_after=1)
    train(request)
    fewer = tmp_path / "store"
    shutil.copytree(store, fewer)
    lines = (fewer / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["case_id"] != trained_case(store)]
    (fewer / "manifest.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    train(request)
    assert "others than those" not in caplog.text
    train(replace(request, store=fewer))
    assert "others than those" in caplog.text


def trained_case(store: Path) -> str:
    """Name of a case in the training split."""
    return PreparedDataset(store, ("train",)).cases[0].case_id


def test_a_run_is_not_resumed_with_other_settings(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    train(TrainingRequest(training_config(pretrained), store, tmp_path / "run", ["1.1"], stop_after=2))
    with pytest.raises(ConfigError, match=r"another training\.weight_decay"):
        train(
            TrainingRequest(training_config(pretrained, weight_decay=0.3), store, tmp_path / "run", ["1.1"])
        )


def test_a_run_goes_on_with_its_language_model_sharded_or_whole(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    request = TrainingRequest(training_config(pretrained), store, tmp_path / "run", ["1.1"], stop_after=1)
    train(request)
    train(replace(request, config=training_config(pretrained, shard_language_model=True), stop_after=None))
    assert (tmp_path / "run" / "final").is_dir()


def test_a_run_from_before_a_setting_came_goes_on_without_it(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    config = training_config(pretrained)
    request = TrainingRequest(config, store, tmp_path / "run", ["1.1"], stop_after=1)
    train(request)
    settings = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    del (
        settings["training"]["shard_language_model"],
        settings["training"]["task_weight_lr"],
        settings["training"]["augmentation"]["motion_probability"],
        settings["model"]["localizer"]["read_mirrored"],
    )
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    train(request)
    moving = config.training.augmentation.model_copy(update={"motion_probability": 0.5})
    training = config.training.model_copy(update={"augmentation": moving})
    with pytest.raises(ConfigError, match=r"another training\.augmentation\.motion_probability"):
        train(replace(request, config=config.model_copy(update={"training": training})))


def _with_facts(store: Path, copy: Path, **facts: Any) -> Path:
    """A store whose cases tell something more."""
    shutil.copytree(store, copy)
    lines = [json.loads(text) for text in (copy / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [json.dumps(line | {"facts": line["facts"] | facts}) for line in lines]
    (copy / "manifest.jsonl").write_text("\n".join(told) + "\n", encoding="utf-8")
    return copy


def _without(store: Path, copy: Path, *, rest: bool = False) -> Path:
    """A store whose cases tell no masks and places, and, with ``rest``, no labels and reports either."""
    shutil.copytree(store, copy)
    lines = []
    for text in (copy / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text) | {"known_lesions": [], "lesion_voxels": {}, "facts": {}}
        if rest:
            line |= {"labels_K": None, "report": ""}
        lines.append(json.dumps(line))
    (copy / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return copy


def test_what_no_case_teaches_is_left_out_and_said(
    tmp_path: Path, store: Path, pretrained: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = training_config(pretrained)
    dataset = PreparedDataset(_without(store, tmp_path / "reports"), ("train",))
    with caplog.at_level("INFO", "vlm3d.training"):
        found, names = learnable_phases(config, None, dataset)
    assert names == ["classification", "alignment", "joint"]
    assert "phase local is left out" in caplog.text
    assert "phase localization is left out: no training case has lesion masks" in caplog.text
    assert "phase joint goes without localization" in caplog.text
    assert set(found.training.phases.joint.tasks) == {"classification", "generation"}
    same, only = learnable_phases(config, ["1.1"], dataset)
    assert (same, only) == (found, ["classification"])  # so a run may be asked for phase by phase
    with pytest.raises(DataError, match="has lesion masks, which phase localization learns from"):
        learnable_phases(config, ["1.2"], dataset)
    final = train(TrainingRequest(config, dataset.store, tmp_path / "run"))
    assert read_training(final)["untrained_tasks"] == ["localization"]
    slices = _with_facts(store, tmp_path / "slices", annotated_slices=[0, 1])
    _, names = learnable_phases(config, None, PreparedDataset(slices, ("train",)))
    assert "local" not in names
    assert "localization" in names
    nothing = PreparedDataset(_without(store, tmp_path / "nothing", rest=True), ("train",))
    with pytest.raises(DataError, match="has labels, masks or reports to learn from"):
        learnable_phases(config, None, nothing)


def test_the_steps_of_every_learnable_phase_are_timed(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    blind = _without(store, tmp_path / "store")
    request = TrainingRequest(training_config(pretrained), blind, tmp_path / "run")
    timed = measured_seconds_per_step(request, steps=2)
    assert set(timed) == {"classification", "alignment", "joint"}
