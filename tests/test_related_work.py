"""The related-work benchmark: every row learns and answers, rows are comparable, cut runs go on, the best is marked."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from support.training_store import phantom_store, training_config, write_small_pretrained
from vlm3d.config import Config
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.errors import ConfigError
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.training.data import ScanStream, collate

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
related_work: Any = importlib.import_module("related_work")
row_module: Any = importlib.import_module("related_work_row")
table_module: Any = importlib.import_module("related_work_table")

CLASSIFY = {"cnn2d_lstm", "cnn3d", "ct_clip", "ours_labels_only", "ours_classification"}
DRAW = {"nnunet", "ours_localization"}
BOTH = {"ours_multi_task", "ours_without_anatomy"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return training_config(write_small_pretrained(tmp_path_factory.mktemp("pretrained")))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    return phantom_store(tmp_path_factory.mktemp("data") / "store", config, train=3, valid=2)


@pytest.fixture(scope="module")
def inputs(config: Config, store: Path) -> Any:
    train, valid = PreparedDataset(store, ("train",)), PreparedDataset(store, ("valid",))
    return related_work.Inputs(config, train, valid, range(len(valid)))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines a few channels wide."""
    pytest.importorskip("monai")
    monkeypatch.setattr(importlib.import_module("related_work_cnn"), "WIDTHS", [8, 8, 8, 16])
    if importlib.util.find_spec("dynamic_network_architectures") is not None:
        monkeypatch.setattr(importlib.import_module("related_work_nnunet"), "BASE_WIDTH", 4)


def _arguments(out: Path, *more: str) -> argparse.Namespace:
    return related_work._parsed(["--out", str(out), "--steps", "1", *more])


def _built(key: str, inputs: Any, tmp_path: Path) -> Any:
    for module in related_work.ROWS[key].needs:
        pytest.importorskip(module)
    torch.manual_seed(0)
    return related_work.ROWS[key].build(inputs, _arguments(tmp_path))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("key", list(related_work.ROWS))
def test_every_row_learns_in_a_step_and_answers_what_it_can(key: str, inputs: Any, tmp_path: Path) -> None:
    row = _built(key, inputs, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in row.trained().items()}
    trained = row_module.train_row(row, inputs.train, inputs.config, row_module.Budget(1e6, 1))
    changed = {name for name, old in before.items() if not torch.equal(old, row.trained()[name])}
    assert trained.steps == 1
    assert trained.parameters == sum(old.numel() for old in before.values())
    assert len(changed) > 0.7 * len(before)
    row.eval()
    with torch.inference_mode():
        found = row.predict(torch.zeros(1, 1, 12, 48, 32), torch.ones(1, 12, 48, 32, dtype=torch.uint8))
    assert (found.probability_K is not None) == (key in CLASSIFY | BOTH)
    assert (found.mask_probability_LDHW is not None) == (key in DRAW | BOTH)
    if found.probability_K is not None:
        assert found.probability_K.shape == (len(DISEASE_NAMES),)
        assert ((found.probability_K > 0) & (found.probability_K < 1)).all()
    if found.mask_probability_LDHW is not None:
        assert found.mask_probability_LDHW.shape == (len(LESION_KEYS), 12, 48, 32)


@pytest.mark.parametrize("key", ["ours_labels_only", "ours_without_anatomy"])
def test_a_row_without_anatomy_never_sees_it(key: str, inputs: Any, tmp_path: Path) -> None:
    row = _built(key, inputs, tmp_path)
    stream = ScanStream(inputs.train, inputs.config, row.phase, 0)
    assert collate([stream[position] for position in range(6)]).regions_BDHW is None
    row.eval()
    intensity = torch.zeros(1, 1, 8, 32, 32)
    with torch.inference_mode():
        with_regions = row.predict(intensity, torch.ones(1, 8, 32, 32, dtype=torch.uint8))
        without = row.predict(intensity, None)
    assert torch.equal(with_regions.probability_K, without.probability_K)


def test_labels_only_is_deaf_to_places(inputs: Any, tmp_path: Path) -> None:
    batch = collate(
        [ScanStream(inputs.train, inputs.config, inputs.config.training.phases.classification, 0)[0]]
    )
    batch.labels_BK[:] = 1.0
    loss = {}
    for key in ("ours_labels_only", "ours_classification"):
        row = _built(key, inputs, tmp_path).eval()
        for shown in (False, True):
            batch.guidance_BKZYX[:] = False
            batch.guidance_BKZYX[..., 0] = shown
            loss[key, shown] = float(row.loss(batch).detach())
    assert loss["ours_labels_only", True] == loss["ours_labels_only", False]
    assert loss["ours_classification", True] > loss["ours_classification", False]


def test_the_contrastive_row_pairs_scans_with_their_own_reports(inputs: Any, tmp_path: Path) -> None:
    row = _built("ct_clip", inputs, tmp_path).eval()
    stream = ScanStream(inputs.train, inputs.config, row.phase, 0)
    batch = collate([stream[position] for position in range(3)])
    optimizer = torch.optim.Adam(row.trained().values(), lr=3e-3)
    first = float(row.loss(batch).detach())
    for _ in range(12):
        optimizer.zero_grad()
        row.loss(batch).backward()
        optimizer.step()
    assert float(row.loss(batch).detach()) < 0.8 * first
    batch.labels_BK[:] = float("nan")
    batch.masks_BLDHW[:] = -1
    assert torch.isfinite(row.loss(batch))  # it needs no label
    batch.reports = ["", " ", ""]
    assert float(row.loss(batch).detach()) == 0.0


def test_nnunet_learns_from_boxes_of_the_size_that_ours_learns_from(config: Config) -> None:
    pytest.importorskip("dynamic_network_architectures")
    nnunet: Any = importlib.import_module("related_work_nnunet")
    phases = config.training.phases
    for box, expected in (((16, 32, 32), (16, 32, 32)), (None, config.preprocessing.max_shape)):
        phase = phases.localization.model_copy(update={"scan_crop": box, "localization_crop": None})
        changed = phases.model_copy(update={"localization": phase})
        training = config.training.model_copy(update={"phases": changed})
        assert nnunet.PlainNNUNet(config.model_copy(update={"training": training})).window_DHW == expected


def test_windows_are_a_setting_of_nnunet_alone(inputs: Any, tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, "--window-overlap", "0.25")
    assert related_work.settings_of("nnunet", inputs, arguments)["window_overlap"] == 0.25
    assert "window_overlap" not in related_work.settings_of("cnn3d", inputs, arguments)


def test_nnunet_is_planned_by_its_rule() -> None:
    pytest.importorskip("dynamic_network_architectures")
    nnunet: Any = importlib.import_module("related_work_nnunet")
    assert nnunet.planned_strides((48, 96, 96), (3, 2, 2)) == [
        (1, 1, 1),
        (2, 2, 2),
        (2, 2, 2),
        (2, 2, 2),
        (1, 2, 2),
    ]
    assert nnunet.planned_strides((64, 256, 256), (5, 0.7, 0.7))[1:4] == [(1, 2, 2), (1, 2, 2), (2, 2, 2)]
    assert nnunet.planned_strides((4, 6, 6), (1, 1, 1)) == [(1, 1, 1)]


def test_the_clock_ends_training_and_bounds_the_rate(inputs: Any, tmp_path: Path) -> None:
    now = [0.0]

    class Slow(row_module.Row):  # type: ignore[misc,name-defined]
        """Ten seconds a step."""

        def __init__(self) -> None:
            super().__init__()
            self.phase, self.peak_lr = inputs.config.training.phases.classification, 0.1
            self.weight = torch.nn.Parameter(torch.ones(1))

        def loss(self, batch: Any) -> torch.Tensor:
            now[0] += 10.0
            return self.weight.square().sum()

    def steps(seconds: float) -> Any:
        now[0] = 0.0
        budget = row_module.Budget(seconds)
        return row_module.train_row(Slow(), inputs.train, inputs.config, budget, clock=lambda: now[0])

    assert steps(1.0).steps == 1  # one step at least
    assert steps(44.0).steps == 4
    found = steps(46.0)  # a fifth step would end more within than beyond
    assert (found.steps, found.seconds) == (5, 50.0)
    assert found.losses[-1] < found.losses[0]


def test_a_result_is_kept_and_another_kind_of_run_refused(
    inputs: Any,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = tmp_path / "small.yaml"
    settings.write_text(yaml.safe_dump(inputs.config.model_dump(mode="json")), encoding="utf-8")
    out = tmp_path / "out"
    common = ["--data", str(store), "--out", str(out), "--config", str(settings), "--steps", "1"]
    command = [*common, "--rows", "ours_multi_task"]
    assert related_work.main([*command, "--child", "ours_multi_task"]) == 0
    made = (out / "ours_multi_task.json").read_bytes()
    result = json.loads(made)
    assert result["cases"] == 2
    assert result["steps"] == 1
    assert 0 <= result["auroc_interval"][0] <= result["auroc"] <= result["auroc_interval"][1] <= 1
    assert 0 <= result["dice"] <= 1

    def never(argv: list[str]) -> int:
        raise AssertionError("nothing is run again")

    monkeypatch.setattr(related_work, "machine", dict)  # measuring it takes longer than the rows
    monkeypatch.setattr(related_work, "run_child", never)
    assert related_work.main(command) == 0
    printed = capsys.readouterr().out
    assert (out / "ours_multi_task.json").read_bytes() == made
    assert "| ours, multi-task |" in printed
    assert json.loads(printed.splitlines()[1])["row"] == "ours_multi_task"

    assert related_work.main([*command, "--lr-factor", "2"]) == ConfigError.exit_code
    assert "another lr_factor (1.0, now 2.0)" in capsys.readouterr().err
    (out / "ours_multi_task.json").write_text("{", encoding="utf-8")
    assert related_work.main(command) == ConfigError.exit_code
    assert "is no result of this benchmark" in capsys.readouterr().err


def test_a_row_that_fails_is_told_and_the_others_go_on(
    inputs: Any,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = tmp_path / "small.yaml"
    settings.write_text(yaml.safe_dump(inputs.config.model_dump(mode="json")), encoding="utf-8")
    out = tmp_path / "out"

    def in_this_process(argv: list[str]) -> int:
        return 9 if argv[-1] == "ours_classification" else int(related_work.main(argv))

    monkeypatch.setattr(related_work, "machine", dict)  # measuring it takes longer than the rows
    monkeypatch.setattr(related_work, "run_child", in_this_process)
    common = ["--data", str(store), "--out", str(out), "--config", str(settings)]
    command = [*common, "--steps", "1", "--cases", "1"]
    assert related_work.main([*command, "--rows", "ours_classification", "ours_labels_only"]) == 1
    told = capsys.readouterr()
    assert "without a result: ours_classification" in told.err
    assert "| ours, labels only |" in told.out
    assert [path.name for path in out.iterdir()] == ["ours_labels_only.json"]


def test_what_cannot_be_compared_is_refused_before_anything_runs(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert related_work.main([]) == 0
    assert "skipped" in capsys.readouterr().out
    assert related_work.main(["--data", str(store), "--out", str(out)]) == ConfigError.exit_code
    assert "spacing_mm" in capsys.readouterr().err
    other = ["--data", str(store), "--out", str(out), "model.classifier.num_diseases=3"]
    assert related_work.main(other) == ConfigError.exit_code
    assert "tiny has 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        related_work.main(["--data", str(store), "--seconds", "0"])
    assert not out.exists()


def test_the_best_of_a_column_is_bold_whoever_it_is() -> None:
    common = {"learns_from": "labels", "seconds": 60.0, "steps": 7, "batch_size": 2}
    a = {"parameters": 2_000_000, "auroc": 0.9, "dice": None, "seconds_a_scan": 1.0, "peak_mb": 900}
    b = {"parameters": 1_000_000, "auroc": 0.8, "dice": 0.4, "seconds_a_scan": 1.0, "peak_mb": 800}
    c = {"parameters": 3_000_000, "auroc": None, "dice": 0.4, "seconds_a_scan": 3.0, "peak_mb": 950}
    rows = [
        {**common, **row, "title": title, "auroc_interval": [0.5, 0.9]}
        for title, row in zip("abc", (a, b, c), strict=True)
    ]
    first, second, third = table_module.table(rows).splitlines()[2:]
    assert "**0.900 [0.500, 0.900]**" in first
    assert "| - |" in first
    assert "**1.00**" in second
    assert "**0.400**" in second
    assert "**800**" in second
    assert "**0.400**" in third
    assert "**1.00**" in first  # equal as shown
    assert "**2.00**" not in first
    assert third.count("**") == 2
