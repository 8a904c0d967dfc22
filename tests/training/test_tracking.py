"""What training tells survives kills, resumes and missing boards."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm3d.errors import MissingExtraError, OutputError
from vlm3d.training.tracking import METRICS_FILE, MetricsLog, Tracker, read_metrics

RGB_HWC = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def written(folder: Path, last: int) -> None:
    log = MetricsLog(folder)
    for step in range(1, last + 1):
        log.append(step, {"loss": 1 / step})
    log.close()


class TestMetricsLog:
    def test_a_line_is_readable_while_the_log_is_open(self, tmp_path: Path) -> None:
        log = MetricsLog(tmp_path / "new" / "run")
        log.append(
            3, {"train/loss": torch.tensor(0.25), "per_disease": np.array([0.5, np.nan]), "phase": "joint"}
        )
        (line,) = read_metrics(tmp_path / "new" / "run")
        assert line.pop("time") > 1e9
        assert line == {"step": 3, "train/loss": 0.25, "per_disease": [0.5, None], "phase": "joint"}
        log.close()
        with pytest.raises(ValueError, match="closed"):
            log.append(4, {})

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_json_cannot_hold_becomes_null(self, tmp_path: Path, value: float) -> None:
        log = MetricsLog(tmp_path)
        log.append(1, {"loss": value, "nested": {"worst": [value]}})
        log.close()
        raw = (tmp_path / METRICS_FILE).read_text()
        parsed = json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert parsed["loss"] is None
        assert parsed["nested"] == {"worst": [None]}

    def test_objects_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="Path"):
            MetricsLog(tmp_path).append(1, {"where": tmp_path})

    @settings(max_examples=40, deadline=None)
    @given(cut=st.integers(0, 400), resumed=st.integers(0, 12))
    def test_wherever_a_crash_cut_the_file_a_resumed_run_goes_on_from_whole_lines(
        self, tmp_path_factory: pytest.TempPathFactory, cut: int, resumed: int
    ) -> None:
        folder = tmp_path_factory.mktemp("run")
        written(folder, 10)
        path = folder / METRICS_FILE
        content = path.read_bytes()[:cut]
        path.write_bytes(content)
        whole = content.count(b"\n")
        log = MetricsLog(folder, resumed_step=resumed)
        log.append(99, {"loss": 0.0})
        log.close()
        assert steps(folder) == [step for step in range(1, whole + 1) if step <= resumed] + [99]
        assert path.read_bytes().count(b"\n") == len(steps(folder))

    def test_damaged_lines_are_left_out(self, tmp_path: Path) -> None:
        written(tmp_path, 3)
        path = tmp_path / METRICS_FILE
        lines = path.read_bytes().split(b"\n")
        lines[1] = b'\xff{"step": '
        path.write_bytes(b"\n".join([*lines[:-1], b"[1]", b'{"no": "step"}', b""]))
        assert steps(tmp_path) == [1, 3]
        MetricsLog(tmp_path, resumed_step=10).close()
        assert path.read_bytes().count(b"\n") == 2

    def test_a_new_run_never_writes_into_another_ones_log(self, tmp_path: Path) -> None:
        written(tmp_path, 2)
        with pytest.raises(OutputError, match="another run"):
            MetricsLog(tmp_path)
        assert steps(tmp_path) == [1, 2]

    def test_lines_that_stay_are_not_written_again(self, tmp_path: Path) -> None:
        written(tmp_path, 4)
        before = (tmp_path / METRICS_FILE).stat().st_ino
        MetricsLog(tmp_path, resumed_step=4).close()
        assert (tmp_path / METRICS_FILE).stat().st_ino == before

    def test_a_folder_that_cannot_be_made_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be written"):
            MetricsLog(tmp_path / "file" / "run")
        with pytest.raises(OutputError, match="cannot be read"):
            read_metrics(tmp_path / "nowhere")

    def test_kill_9_loses_no_line_that_was_appended(self, tmp_path: Path) -> None:
        code = (
            "import sys\n"
            "from vlm3d.training.tracking import MetricsLog\n"
            "log = MetricsLog(sys.argv[1])\n"
            "for step in range(1, 10**9):\n"
            "    log.append(step, {'loss': 0.5})\n"
            "    print(step, flush=True)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(50)]
        os.kill(process.pid, signal.SIGKILL)
        process.stdout.read()
        process.stdout.close()
        process.wait()
        kept = steps(tmp_path)
        assert kept[:50] == told
        assert kept == list(range(1, len(kept) + 1))


class FakeWandB(types.ModuleType):
    """Records what is told, as W&B's module takes it."""

    Image = staticmethod(lambda array: ("image", array.shape))
    Html = staticmethod(lambda text: ("html", text))

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def init(self, **given: Any) -> FakeWandB:
        self.inits.append(given)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if "explode" in values:
            raise RuntimeError("no connection")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


class TestTracker:
    def test_samples_are_kept_beside_the_figures(self, tmp_path: Path) -> None:
        with Tracker(tmp_path) as tracker:
            tracker.scalars(7, {"loss": 0.5})
            tracker.image(7, "valid/case_1", RGB_HWC)
            tracker.text(7, "valid/case_1", "Größe <5 mm\nsecond line")
            tracker.text(7, "valid/ct..1", "two dots")
            tracker.sync()
        folder = tmp_path / "samples" / "00000007" / "valid"
        assert np.array_equal(np.asarray(Image.open(folder / "case_1.png")), RGB_HWC)
        assert (folder / "case_1.txt").read_text(encoding="utf-8") == "Größe <5 mm\nsecond line"
        assert steps(tmp_path) == [7]
        assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS_FILE, "samples"]

    @pytest.mark.parametrize("name", ["../up", "/root", "a b", "", "a/../../b"])
    def test_names_cannot_leave_the_folder(self, tmp_path: Path, name: str) -> None:
        with Tracker(tmp_path) as tracker, pytest.raises(ValueError, match="name"):
            tracker.text(1, name, "x")

    def test_other_processes_write_nothing(self, tmp_path: Path) -> None:
        with Tracker(tmp_path / "run", is_main=False, tensorboard=True) as tracker:
            tracker.scalars(1, {"loss": 1.0})
            tracker.image(1, "case", RGB_HWC)
            tracker.text(1, "case", "x")
            tracker.sync()
        assert not (tmp_path / "run").exists()

    def test_what_is_not_installed_is_said_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(MissingExtraError, match=r"vlm3d\[tracking\]"):
            Tracker(tmp_path / "run", wandb=True)
        assert not (tmp_path / "run").exists()

    def test_wandb_is_offline_and_goes_on_under_its_name(
        self, tmp_path: Path, fake_wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Tracker(tmp_path, wandb=True, settings={"name": "tiny"}) as tracker:
            tracker.scalars(1, {"loss": torch.tensor(0.5), "phase": "joint", "bad": float("nan")})
            tracker.image(1, "case", RGB_HWC)
            tracker.text(1, "case", "a < b")
        monkeypatch.setenv("WANDB_MODE", "online")
        Tracker(tmp_path, wandb=True, resumed_step=1).close()
        first, second = fake_wandb.inits
        assert first["mode"] == "offline"
        assert first["config"] == {"name": "tiny"}
        assert second["mode"] == "online"
        assert second["id"] == first["id"]
        assert fake_wandb.logged == [
            (1, {"loss": 0.5}),
            (1, {"case": ("image", (4, 6, 3))}),
            (1, {"case/text": ("html", "<pre>a &lt; b</pre>")}),
        ]
        assert fake_wandb.finished

    def test_a_board_that_fails_is_switched_off_and_training_goes_on(
        self, tmp_path: Path, fake_wandb: FakeWandB, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Tracker(tmp_path, wandb=True) as tracker, caplog.at_level(logging.WARNING):
            tracker.scalars(1, {"explode": 1.0})
            tracker.scalars(2, {"loss": 1.0})
        assert steps(tmp_path) == [1, 2]
        assert fake_wandb.logged == []
        assert caplog.text.count("W&B is switched off") == 1

    def test_tensorboard_shows_scalars_pictures_and_texts_and_forgets_what_is_done_again(
        self, tmp_path: Path
    ) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with Tracker(tmp_path, tensorboard=True) as tracker:
            for step in (1, 2, 3):
                tracker.scalars(step, {"loss": step / 2, "phase": "joint"})
            tracker.image(1, "case", RGB_HWC)
            tracker.text(1, "case", "line one\nline two")
        with Tracker(tmp_path, tensorboard=True, resumed_step=1) as tracker:
            tracker.scalars(2, {"loss": 20.0})
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 20.0)]
        assert events.Images("case")[0].width == 6
        assert "case/text_summary" in events.Tags()["tensors"]
        assert steps(tmp_path) == [1, 2]
