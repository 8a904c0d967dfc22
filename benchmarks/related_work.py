"""The table 'Comparison with Related Work', measured: every row learns from one store within one budget of wall clock.

    python benchmarks/related_work.py --data STORE --test STORE --out FOLDER --seconds 600

Each row trains in a process of its own on the training split of ``--data``, with the scans of `vlm3d.training.data` in one
order and with one augmentation, AdamW under one schedule, and a moving average of the weights; then `vlm3d.evaluation`
scores it on the split ``test`` of ``--test`` (without it, on ``valid`` of ``--data``; no setting is chosen on either).
A row's result is a file of ``--out``; rows that are there are not run again, a row that was cut starts anew.
Prints a JSON line a row, then the table, in the order below, the best of each column in bold.

What is not equal between the rows, and cannot be:

* Knowledge. The column 'learns from' says what a row is given. Ours gets the anatomy of each scan, in training and at
  prediction; where the store's anatomy is the phantom's own, that is better than any segmentation. The classifier of ours
  is also taught where to look, from masks and stated places. ``ours_labels_only`` gets what the CNNs get.
* Pretraining. All rows begin at random weights, but ours and the contrastive row read texts with a frozen, pretrained
  encoder. Published 2D CNNs begin at ImageNet's weights, MedSAM2 and CT-CLIP at much larger ones; none is used here.
* Rates. Rows take the peak rate of `tiny`'s phase for their task, which was found for ours. ``--lr-factor`` scales
  all of them: whether a baseline would rather have another rate is one more run.
* Sizes. Baselines have their usual widths, not ours. A wide network makes fewer steps within a budget; 'steps' tells.
* The 2D CNN sees three neighboring slices as a picture's channels; what lies further apart only its LSTM joins.
* nnU-Net draws masks only. Its cascade, its planning of spacings, mirroring at prediction, SGD and 1,000 epochs are left
  out, augmentation is that of all rows; boxes lie over lesions as often as ours, more often than it is used to. At
  prediction it reads overlapping windows (``--window-overlap``), which costs it time; ours draws a scan in one pass.
* The contrastive row sees reports and no label; CT-CLIP also trains its text encoder, on far larger batches over far
  more scans. Its frozen text encoder reads a report's first 256 tokens. It is not shown what labels the test asks for.
* No row writes a report within the budget, ours neither: reports are measured by ``vlm3d evaluate``.
* MedSAM2 waits for a person's prompt and RadFM has 14 billion parameters: neither is a row.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import machine, peak_rss_mb
from related_work_table import table
from vlm3d.errors import (
    INTERRUPTED_EXIT_CODE,
    ConfigError,
    DataError,
    MissingExtraError,
    OutputError,
    VLM3DError,
)

if TYPE_CHECKING:
    from related_work_row import Row
    from vlm3d.config import Config
    from vlm3d.datasets.prepared import PreparedDataset

logger = logging.getLogger("related_work")


@dataclass(frozen=True)
class Inputs:
    """What all rows share.

    Attributes:
        config: Of our model; baselines take its grid, window, boxes, rates and augmentation.
        train: The training split.
        held_out: What rows are scored on.
        indices: Of its cases.
    """

    config: Config
    train: PreparedDataset
    held_out: PreparedDataset
    indices: Sequence[int]


@dataclass(frozen=True)
class RowSpec:
    """A line of the table before it is measured.

    Attributes:
        title: As the table shows it.
        learns_from: What it is given.
        needs: Modules that it imports beside the package's own.
        build: Makes the network.
    """

    title: str
    learns_from: str
    needs: tuple[str, ...]
    build: Callable[[Inputs, argparse.Namespace], Row]


def _slice_cnn(inputs: Inputs, arguments: argparse.Namespace) -> Row:
    from related_work_cnn import SliceCNN

    return SliceCNN(inputs.config)


def _volume_cnn(inputs: Inputs, arguments: argparse.Namespace) -> Row:
    from related_work_cnn import VolumeCNN

    return VolumeCNN(inputs.config)


def _nnunet(inputs: Inputs, arguments: argparse.Namespace) -> Row:
    from related_work_nnunet import PlainNNUNet

    return PlainNNUNet(inputs.config, arguments.window_overlap)


def _contrastive(inputs: Inputs, arguments: argparse.Namespace) -> Row:
    from related_work_clip import ContrastiveModel

    return ContrastiveModel(inputs.config, inputs.train)


def _ours(*tasks: str, **less: bool) -> Callable[[Inputs, argparse.Namespace], Row]:
    def build(inputs: Inputs, arguments: argparse.Namespace) -> Row:
        from related_work_ours import Ours

        return Ours(inputs.config, tasks, **less)

    return build


_MONAI = ("monai",)
_BOTH = ("classification", "localization")
ROWS: dict[str, RowSpec] = {
    "cnn2d_lstm": RowSpec("2D CNN + LSTM", "labels", _MONAI, _slice_cnn),
    "cnn3d": RowSpec("3D CNN", "labels", _MONAI, _volume_cnn),
    "nnunet": RowSpec("nnU-Net, plain network", "masks", (*_MONAI, "dynamic_network_architectures"), _nnunet),
    "ct_clip": RowSpec("contrastive, as CT-CLIP", "reports", (*_MONAI, "einops"), _contrastive),
    "ours_labels_only": RowSpec(
        "ours, labels only", "labels", (), _ours("classification", anatomy=False, places=False)
    ),
    "ours_classification": RowSpec(
        "ours, classification only", "labels, places, anatomy", (), _ours("classification")
    ),
    "ours_localization": RowSpec("ours, localization only", "masks, anatomy", (), _ours("localization")),
    "ours_multi_task": RowSpec("ours, multi-task", "labels, places, masks, anatomy", (), _ours(*_BOTH)),
    "ours_without_anatomy": RowSpec(
        "ours, multi-task without anatomy", "labels, places, masks", (), _ours(*_BOTH, anatomy=False)
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows that are asked for and print the table; returns the exit code."""
    arguments = _parsed(argv)
    if arguments.data is None:
        print(json.dumps({"benchmark": "related_work", "skipped": "give --data, a store of vlm3d prepare"}))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        inputs = _inputs(arguments)
        if arguments.child:
            measure(arguments.child, inputs, arguments)
            return 0
        return _run(inputs, arguments, sys.argv[1:] if argv is None else argv)
    except VLM3DError as error:
        print(str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the configuration")
    parser.add_argument("--data", type=Path, help="store with the splits train and valid")
    parser.add_argument("--test", type=Path, help="store with the split test; default: valid of --data")
    parser.add_argument("--out", type=Path, default=Path("related_work"), help="folder of the results")
    parser.add_argument("--config", default="tiny", help="size of ours, and grid and rates of all")
    parser.add_argument("--seconds", type=_positive, default=600.0, help="wall clock of training, a row")
    parser.add_argument("--steps", type=int, help="stop after so many steps at the latest, for trying")
    parser.add_argument("--cases", type=int, help="score only the first so many held-out scans")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--lr-factor", type=_positive, default=1.0, help="on the peak rate of every row")
    parser.add_argument("--window-overlap", type=float, default=0.5, help="of nnU-Net's windows")
    parser.add_argument("--child", choices=list(ROWS), help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    if not 0 <= arguments.window_overlap < 1:
        parser.error(f"--window-overlap is a share below 1, got {arguments.window_overlap}")
    for name in ("steps", "cases"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name} is at least 1, got {value}")
    return arguments


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _inputs(arguments: argparse.Namespace) -> Inputs:
    """Open the stores and refuse, before anything starts, what would not give a fair table.

    Raises:
        ConfigError: The stores were prepared for another model, or it has other diseases or lesions.
        DataError: A split is empty, lacks what a row learns from, or a patient stands on both sides.
        MissingExtraError: A row's library is not installed.
    """
    from vlm3d.config import load_config
    from vlm3d.datasets.prepared import PreparedDataset
    from vlm3d.datasets.splits import check_no_leak
    from vlm3d.labels import DISEASE_NAMES, LESION_KEYS

    lesions = f"model.localizer.num_lesion_diseases={len(LESION_KEYS)}"  # those that every row draws
    config = load_config(arguments.config, [*arguments.overrides, lesions])
    if config.model.classifier.num_diseases != len(DISEASE_NAMES):
        raise ConfigError(
            f"the table compares {len(DISEASE_NAMES)} diseases, "
            f"{arguments.config} has {config.model.classifier.num_diseases}: leave them as they are"
        )
    split = "valid" if arguments.test is None else "test"
    train = PreparedDataset(arguments.data, ("train",))
    held_out = PreparedDataset(arguments.test or arguments.data, (split,))
    for dataset, name in ((train, "train"), (held_out, split)):
        if not len(dataset):
            raise DataError(f"{dataset.store} has no case in the split '{name}'; see `vlm3d prepare --help`")
        dataset.check(config.preprocessing)
    check_no_leak([*train.cases, *held_out.cases])
    for what, is_there in (
        ("disease labels", any(case.labels_K is not None for case in train.cases)),
        ("lesion masks", any(case.known_lesions for case in train.cases)),
        ("reports", any(case.report for case in train.cases)),
    ):
        if not is_there:
            raise DataError(f"no training case of {train.store} has {what}, which a row learns from")
    _check_libraries([arguments.child] if arguments.child else arguments.rows)
    count = len(held_out) if arguments.cases is None else min(arguments.cases, len(held_out))
    return Inputs(config, train, held_out, range(count))


def _check_libraries(rows: Sequence[str]) -> None:
    for key in rows:
        for module in ROWS[key].needs:
            if importlib.util.find_spec(module) is None:
                raise MissingExtraError(
                    f"{module} is needed for the row {key} and is not installed; type: make setup"
                )


# --- one row -----------------------------------------------------------------------------------------------------


def measure(key: str, inputs: Inputs, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score one row in this process, and write its result whole or not at all."""
    import torch

    from related_work_row import Budget, train_row
    from related_work_scoring import score_row
    from vlm3d.io import write_atomically

    _make_folder(arguments.out)
    torch.manual_seed(inputs.config.training.seed)
    row = ROWS[key].build(inputs, arguments)
    row.peak_lr *= arguments.lr_factor
    budget = Budget(arguments.seconds, arguments.steps)
    trained = train_row(row, inputs.train, inputs.config, budget)
    peak_training_mb = peak_rss_mb()
    logger.info("%s: %d steps in %.0f s", key, trained.steps, trained.seconds)
    with trained.average.applied():
        scored = score_row(row, inputs.held_out, inputs.indices, inputs.config.preprocessing.hu_window)
    result = {
        "row": key,
        "title": ROWS[key].title,
        "learns_from": ROWS[key].learns_from,
        "parameters": trained.parameters,
        "seconds": round(trained.seconds, 1),
        "waited_seconds": round(trained.waited_seconds, 1),
        "steps": trained.steps,
        "batch_size": row.phase.batch_size,
        "peak_lr": row.peak_lr,
        "first_losses": [round(loss, 4) for loss in trained.losses[:5]],
        "last_losses": [round(loss, 4) for loss in trained.losses[-5:]],
        "damaged_cases": len(trained.damaged),
        **_headline(scored.figures),
        "seconds_a_scan": round(scored.seconds_a_scan, 3),
        "peak_training_mb": round(peak_training_mb),
        "peak_mb": round(peak_rss_mb()),
        "settings": settings_of(key, inputs, arguments),
        "figures": scored.figures,
    }
    write_atomically(_result_file(arguments.out, key), json.dumps(result, indent=1) + "\n")
    return result


def _headline(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Macro AUROC with its interval, and macro Dice; None where a row does not say it."""
    classification, localization = figures.get("classification"), figures.get("localization")
    auroc = {} if classification is None else classification["macro"]["auroc"]
    return {
        "auroc": auroc.get("value"),
        "auroc_interval": [auroc.get("low"), auroc.get("high")],
        "dice": None if localization is None else localization["macro"]["dice"],
        "cases": figures["cases"],
    }


def settings_of(key: str, inputs: Inputs, arguments: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for a row to stand in the table; windows are nnU-Net's alone."""
    import torch

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def cases(dataset: PreparedDataset, indices: Sequence[int]) -> str:
        return digest("\n".join(dataset.cases[index].to_json() for index in indices))

    return {
        "seconds": arguments.seconds,
        "steps": arguments.steps,
        "lr_factor": arguments.lr_factor,
        **({"window_overlap": arguments.window_overlap} if key == "nnunet" else {}),
        "config": digest(inputs.config.model_dump_json()),
        "training_cases": cases(inputs.train, range(len(inputs.train))),
        "held_out_cases": cases(inputs.held_out, inputs.indices),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


# --- all rows ----------------------------------------------------------------------------------------------------


def _run(inputs: Inputs, arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Rows that are missing, one after the other, each in a process of its own; then the table."""
    chosen = [key for key in ROWS if key in arguments.rows]
    settings = {key: settings_of(key, inputs, arguments) for key in chosen}
    found = {key: read_result(arguments.out, key, settings[key]) for key in chosen}
    _make_folder(arguments.out)
    print(json.dumps(machine()), flush=True)
    failed = []
    for key in chosen:
        if found[key] is None:
            ended = run_child([*argv, "--child", key])
            found[key] = read_result(arguments.out, key, settings[key]) if ended == 0 else None
        result = found[key]
        if result is None:
            failed.append(key)
            continue
        line = {name: value for name, value in result.items() if name not in ("settings", "figures")}
        print(json.dumps(line), flush=True)
    print(table([row for row in found.values() if row is not None]))
    if failed:
        print(f"without a result: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def run_child(argv: Sequence[str]) -> int:
    """This script again, for one row; what it logs goes where this process's goes. Returns its exit code."""
    command = [sys.executable, __file__, *argv]
    return subprocess.run(command, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode


def read_result(folder: Path, key: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row's result of an earlier run, or None.

    Raises:
        ConfigError: It was measured otherwise.
    """
    path = _result_file(folder, key)
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = result["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no result of this benchmark; delete it or choose another --out"
        ) from error
    for name, value in settings.items():
        if known.get(name) != value:
            raise ConfigError(
                f"{path} was measured with another {name} ({known.get(name)}, now {value}): "
                "rows of one table are measured alike; give the same settings or another --out"
            )
    return result


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}; choose another --out") from error


def _result_file(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


if __name__ == "__main__":
    sys.exit(main())
