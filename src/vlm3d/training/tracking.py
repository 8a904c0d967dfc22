"""What training tells: a line of numbers a step in ``metrics.jsonl``, pictures and texts of samples beside it.

```
RUN/
├── metrics.jsonl                 one JSON object a line: {"step": 120, "time": ..., "train/loss": 0.71, ...}
├── samples/00000120/case_7.png   what the model saw and drew at that step
├── samples/00000120/case_7.txt
├── tensorboard/                  where asked for
└── wandb/                        where asked for; offline unless $WANDB_MODE says otherwise
```

Steps count on through all phases of a run, so that a resumed run knows which lines it is about to write again.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm3d.errors import OutputError
from vlm3d.extras import require
from vlm3d.io.wording import shown
from vlm3d.io.writing import write_atomically

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SAMPLES_FOLDER = "samples"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a run's ``metrics.jsonl``, in order; a line that a crash cut short is left out.

    Raises:
        OutputError: There is no such file, or it cannot be read.
    """
    path = Path(folder) / METRICS_FILE
    try:
        return list(_whole_lines(path.read_bytes()))
    except OSError as error:
        words = (error.strerror or type(error).__name__).lower()
        raise OutputError(f"{shown(path)} cannot be read: {words}") from error


class MetricsLog:
    """Appends to a run's ``metrics.jsonl``; every line is with the operating system once `append` returns.

    Args:
        folder: The run's folder; made if it is not there.
        resumed_step: The last step of the checkpoint that training goes on from. Later lines are dropped, since they will
            be written again. None starts a run.

    Raises:
        OutputError: A run is started where a log stands already, or the file cannot be written.
    """

    def __init__(self, folder: str | Path, *, resumed_step: int | None = None) -> None:
        self.path = Path(folder) / METRICS_FILE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.read_bytes() if self.path.exists() else b""
            if before and resumed_step is None:
                raise OutputError(
                    f"{shown(self.path)} holds another run's figures. Resume that run or choose another folder."
                )
            self._keep_until(before, resumed_step if resumed_step is not None else -1)
            self._file: int | None = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._refused(error) from error

    def _keep_until(self, before: bytes, last_step: int) -> None:
        lines = list(_whole_lines(before))
        kept = [line for line in lines if line["step"] <= last_step]
        after = b"".join(_line(line) for line in kept)
        if after != before:
            logger.info(
                "%s: %d lines kept, %d later ones dropped", METRICS_FILE, len(kept), len(lines) - len(kept)
            )
            write_atomically(self.path, after)

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line.

        Args:
            step: Optimizer steps since the run began.
            values: Anything JSON can hold; NaN and infinity become null, tensors and arrays numbers and lists.

        Raises:
            OutputError: The file cannot be written.
        """
        if self._file is None:
            raise ValueError("the log is closed")
        line = _line({"step": int(step), "time": round(time.time(), 3)} | _as_json(values))
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise self._refused(error) from error

    def sync(self) -> None:
        """Have the lines on disk, so that they outlast a loss of power; done with every checkpoint."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """End the log."""
        if self._file is not None:
            self.sync()
            os.close(self._file)
            self._file = None

    def _refused(self, error: OSError) -> OutputError:
        words = (error.strerror or type(error).__name__).lower()
        return OutputError(
            f"{shown(self.path)} cannot be written: {words}. Make room or choose another folder."
        )


class _Board(Protocol):
    """A further place where figures are shown."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def image(self, step: int, name: str, rgb_HWC: NDArray[np.uint8]) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """Tells how training goes: always to ``metrics.jsonl`` and ``samples/``, to TensorBoard and W&B where asked for.

    A board that fails in the middle of a run is switched off with a warning; training goes on.

    Args:
        folder: The run's folder.
        resumed_step: As in `MetricsLog`.
        tensorboard: Also write for TensorBoard.
        wandb: Also write for Weights & Biases; offline unless ``$WANDB_MODE`` says otherwise.
        run_name: What W&B calls the run; the folder's name by default.
        settings: The run's configuration, shown there.
        is_main: False on all but one process of a group: nothing is written.

    Raises:
        MissingExtraError: TensorBoard or W&B is asked for and not installed.
        OutputError: See `MetricsLog`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resumed_step: int | None = None,
        tensorboard: bool = False,
        wandb: bool = False,
        run_name: str | None = None,
        settings: Mapping[str, Any] | None = None,
        is_main: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self._log: MetricsLog | None = None
        self._boards: dict[str, _Board] = {}
        if not is_main:
            return
        # What is not installed is said before anything is written.
        board_module = (
            require("torch.utils.tensorboard", extra="train", purpose="write for TensorBoard")
            if tensorboard
            else None
        )
        wandb_module = (
            require("wandb", extra="tracking", purpose="write for Weights & Biases") if wandb else None
        )
        self._log = MetricsLog(self.folder, resumed_step=resumed_step)
        if board_module is not None:
            self._boards["TensorBoard"] = _TensorBoard(
                board_module, self.folder / "tensorboard", resumed_step
            )
        if wandb_module is not None:
            name = run_name or self.folder.resolve().name
            self._boards["W&B"] = _WandB(wandb_module, self.folder, name, dict(settings or {}))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Tell numbers, such as ``{"train/loss": 0.7, "train/learning_rate": 1e-4}``, and words, for the log only."""
        if self._log is None:
            return
        self._log.append(step, values)
        numbers = {
            name: number for name, value in values.items() if (number := _as_number(value)) is not None
        }
        if numbers:
            self._tell(lambda board: board.scalars(step, numbers))

    def image(self, step: int, name: str, rgb_HWC: NDArray[np.uint8]) -> None:
        """Keep a picture (H, W, 3) as ``samples/STEP/NAME.png`` and show it."""
        if self._log is None:
            return
        buffer = io.BytesIO()
        Image.fromarray(rgb_HWC).save(buffer, format="PNG")
        write_atomically(self._sample_path(step, name, ".png"), buffer.getvalue())
        self._tell(lambda board: board.image(step, name, rgb_HWC))

    def text(self, step: int, name: str, text: str) -> None:
        """Keep a text as ``samples/STEP/NAME.txt`` and show it."""
        if self._log is None:
            return
        write_atomically(self._sample_path(step, name, ".txt"), text)
        self._tell(lambda board: board.text(step, name, text))

    def sync(self) -> None:
        """As `MetricsLog.sync`."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """End the log and all boards."""
        self._tell(lambda board: board.close())
        self._boards.clear()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sample_path(self, step: int, name: str, suffix: str) -> Path:
        if not _NAME.fullmatch(name) or ".." in name.split("/"):
            raise ValueError(f"a sample's name holds letters, digits, _ . - and /, got {name!r}")
        path = self.folder / SAMPLES_FOLDER / f"{step:08d}" / f"{name}{suffix}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            words = (error.strerror or type(error).__name__).lower()
            raise OutputError(f"{shown(path.parent)} cannot be made: {words}") from error
        return path

    def _tell(self, say: Callable[[_Board], None]) -> None:
        for name, board in list(self._boards.items()):
            try:
                say(board)
            except (
                Exception
            ) as error:  # whatever a board raises, figures are in metrics.jsonl and training goes on
                del self._boards[name]
                logger.warning("%s is switched off, it failed: %s: %s", name, type(error).__name__, error)


class _TensorBoard:
    def __init__(self, module: Any, folder: Path, resumed_step: int | None) -> None:
        purge = None if resumed_step is None else resumed_step + 1
        self._writer = module.SummaryWriter(str(folder), purge_step=purge)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, rgb_HWC: NDArray[np.uint8]) -> None:
        self._writer.add_image(name, rgb_HWC, step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown that keeps the lines
        self._writer.add_text(name, indented, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, module: Any, folder: Path, name: str, settings: dict[str, Any]) -> None:
        self._module = module
        id_file = folder / "wandb_run_id"
        if not id_file.exists():  # a resumed run goes on under its first name
            write_atomically(id_file, secrets.token_hex(4))
        self._run = module.init(
            project="vlm3d",
            id=id_file.read_text(encoding="utf-8"),
            name=name,
            dir=str(folder),
            config=settings,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, rgb_HWC: NDArray[np.uint8]) -> None:
        self._run.log({name: self._module.Image(rgb_HWC)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({f"{name}/text": self._module.Html(f"<pre>{_escaped(text)}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _whole_lines(content: bytes) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects with a step; what follows the last line end was cut short."""
    *lines, _ = content.split(b"\n")
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:  # also UnicodeDecodeError
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield values


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return _as_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"metrics are numbers, words and lists of them, got {type(value).__name__}")


def _as_number(value: Any) -> float | None:
    """The value as a number for a curve; None for words, lists and what is not finite."""
    plain = _as_json(value)
    return float(plain) if isinstance(plain, (int, float)) else None
