"""Many scans, one model: predict each, write each whole, and go on when one cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vlm3d.errors import ConfigError, OutputError, UnreadableFileError, VLM3DError
from vlm3d.inference.pipeline import Pipeline, PredictionSettings
from vlm3d.inference.prediction import TRAINING_NOTES
from vlm3d.io.wording import printable, reason, shown
from vlm3d.outputs.output_folder import check_out_dir
from vlm3d.outputs.writer import write_prediction

logger = logging.getLogger(__name__)

_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".npz", ".zip", ".dcm", ".hdr", ".img")


@dataclass
class Outcome:
    """What became of a batch.

    Attributes:
        pages: The page of each scan that was predicted.
        failed: Input -> its error.
    """

    pages: list[Path] = field(default_factory=list)
    failed: dict[Path, VLM3DError] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, or that of the first failure."""
        return next((error.exit_code for error in self.failed.values()), 0)


def scan_name(path: Path) -> str:
    """What a scan's output folder is called: its file name without the ending; a link's own, not its target's."""
    name = path.name if path.name not in ("", "..") else path.resolve().name
    for ending in _ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)] or name
    return name


def output_folders(inputs: Sequence[Path], out: Path) -> list[Path]:
    """One folder a scan: ``out`` itself for a single scan, ``out/<name>`` for several.

    Raises:
        ConfigError: Two scans would be written to the same folder.
    """
    if len(inputs) == 1:
        return [out]
    folders = [out / scan_name(path) for path in inputs]
    taken: dict[Path, Path] = {}
    for path, folder in zip(inputs, folders, strict=True):
        if folder in taken:
            raise ConfigError(
                f"{taken[folder]} and {path} would both be written to {folder}; predict them one by one"
            )
        taken[folder] = path
    return folders


def predict_scans(
    inputs: Sequence[Path],
    out: Path,
    load: Callable[[], Pipeline],
    settings: PredictionSettings,
    *,
    mask: Path | None = None,
    series: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> Outcome:
    """Predict scans one after the other.

    A scan that cannot be used is told in one line and the next one is taken. An output that cannot be written ends the
    batch, since the others would fare no better.

    Args:
        inputs: Scans.
        out: See `output_folders`.
        load: Gives the pipeline; called once, after everything cheap has been checked.
        settings: For all scans.
        mask: Anatomy of the only scan.
        series: DICOM series, see `Pipeline.__call__`.
        overwrite: Replace earlier outputs.
        say: Receives lines of progress and errors.

    Raises:
        VLM3DError: Nothing could be predicted at all: the model, the settings or the output folders are at fault.
    """
    folders = output_folders(inputs, out)
    for folder in folders:
        check_out_dir(folder, overwrite=overwrite)
    outcome = Outcome()
    pipeline: Pipeline | None = None
    for number, (path, folder) in enumerate(zip(inputs, folders, strict=True), start=1):
        label = f"[{number}/{len(inputs)}] {printable(str(path))}"
        try:
            _check_exists(path)
            if pipeline is None:
                say("loading the model")
                pipeline = load()
                if note := TRAINING_NOTES[pipeline.model_info.training]:
                    say(note)
            result = pipeline(
                path, settings, mask=mask, series=series, on_stage=partial(_say_stage, say, label)
            )
            say(f"{label}: write")
            files = write_prediction(
                result.prediction, result.volume, result.masks, result.regions, folder, overwrite=overwrite
            )
            outcome.pages.append(files["page"])
        except VLM3DError as error:
            if len(inputs) == 1 or isinstance(error, OutputError) or (pipeline is None and path.exists()):
                raise
            _note_failure(outcome, path, error, say)
        except Exception as error:  # what no reader foresaw of one scan must not cost the others
            if len(inputs) == 1:
                raise
            logger.debug("%s failed", shown(path), exc_info=error)
            words = f"{shown(path)}: {type(error).__name__}: {reason(error)}"
            _note_failure(outcome, path, VLM3DError(words), say)
    return outcome


def _note_failure(outcome: Outcome, path: Path, error: VLM3DError, say: Callable[[str], None]) -> None:
    outcome.failed[path] = error
    say(f"vlm3d: error: {printable(' '.join(str(error).split()))}")


def _say_stage(say: Callable[[str], None], label: str, stage: str) -> None:
    say(f"{label}: {stage}")


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise UnreadableFileError(f"{path} does not exist; give a scan's file, DICOM folder or zip")
