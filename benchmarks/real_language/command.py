"""The command of ``benchmarks/real_language.py``: what it is told, the rows one after the other, the table."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import machine
from real_language.scoring import RESAMPLES, score, table
from real_language.studies import Split, Study, read_studies, split
from real_language.writers import NearestWriter, TemplateWriter, Writer, check_against_labels
from vlm3d.errors import INTERRUPTED_EXIT_CODE, ConfigError, OutputError, VLM3DError
from vlm3d.io.writing import write_atomically

if TYPE_CHECKING:
    from real_language.training import Settings
    from vlm3d.model.language_model import LanguageModel

LLM_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TABLE = Path("reports") / "ct_clip_reports_with_manual_labels.csv"
REPOSITORY = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None, description: str = __doc__) -> int:
    """Measure the rows and print the table; returns the exit code."""
    arguments = _parsed(argv, description)
    data = Path(os.environ.get("VLM3D_REAL_DATA", "../shared/data")) / TABLE
    if not data.is_file():
        print(json.dumps({"benchmark": "real_language", "skipped": "no reports: set VLM3D_REAL_DATA"}))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        _run(arguments, split(read_studies(data)))
    except VLM3DError as error:
        print(str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    return 0


def _parsed(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/real_language.json"), help="figures, no text")
    parser.add_argument("--work", type=Path, help="folder of checkpoints, outside the repository")
    parser.add_argument("--steps", type=_above_0(int), help="train the language model for so many steps")
    parser.add_argument("--seconds", type=_above_0(float), help="... or for so long, what comes first")
    parser.add_argument("--studies", type=_above_0(int), help="score the first so many held-out studies only")
    parser.add_argument("--batch-size", type=_above_0(int), default=4, help="reports a step")
    parser.add_argument("--lr", type=_above_0(float), default=5e-4, help="peak rate")
    parser.add_argument("--lora-rank", type=_above_0(int), default=32)
    parser.add_argument(
        "--max-tokens", type=_above_0(int), default=640, help="of a report, learned or written"
    )
    parser.add_argument("--checkpoint-seconds", type=_above_0(float), default=180.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the language model runs"
    )
    return parser.parse_args(argv)


def _above_0(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return read


def _run(arguments: argparse.Namespace, parts: Split) -> None:
    """Every row as it is ready, then the table and the file.

    Raises:
        VLM3DError: What the user can put right; the message says how.
    """
    trains = arguments.steps is not None or arguments.seconds is not None
    work = checked_work(arguments.work) if trains else None
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{arguments.out} cannot be written ({error.strerror}); choose another --out"
        ) from error
    held_out = parts.held_out[: arguments.studies]
    result: dict[str, Any] = {"machine": machine(), "data": describe(parts, held_out), "rows": []}
    print(json.dumps({"machine": result["machine"], "data": result["data"]}), flush=True)
    rows = cheap_rows(parts, held_out)
    if work is not None:
        rows = _chain(rows, lambda: language_rows(arguments, work, parts, held_out))
    for row in rows:
        result["rows"].append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "f1_per_disease"}), flush=True)
    write_atomically(arguments.out, json.dumps(result, indent=1) + "\n")
    print(table(result["rows"]))


def _chain(first: Iterator[Row], then: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    yield from first
    yield from then()


def checked_work(work: Path | None) -> Path:
    """The folder of checkpoints, made if need be.

    Raises:
        ConfigError: There is none, or it lies inside the repository, where no weights and no report belong.
        OutputError: It cannot be made.
    """
    if work is None:
        raise ConfigError("training needs --work, a folder outside the repository for checkpoints and texts")
    work = work.resolve()
    if REPOSITORY in (work, *work.parents):
        raise ConfigError(f"--work {work} lies inside the repository; weights and reports belong outside")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{work} cannot be made ({error.strerror}); choose another --work") from error
    return work


def describe(parts: Split, held_out: Sequence[Study]) -> dict[str, Any]:
    """The split in numbers."""
    known = {study.text for study in parts.training}
    return {
        "studies_to_learn_from": len(parts.training),
        "studies_held_out": len(parts.held_out),
        "studies_scored": len(held_out),
        "order": "SHA-256 of the patient; the first three quarters are to learn from",
        "held_out_texts_that_a_training_study_has_too": sum(study.text in known for study in held_out),
        "resamples": RESAMPLES,
    }


# --- rows --------------------------------------------------------------------------------------------------------


def cheap_rows(parts: Split, held_out: Sequence[Study]) -> Iterator[Row]:
    """The real reports, and the writers that learn nothing, as they are and checked."""
    truth = score([study.text for study in held_out], held_out, is_truth=True)
    yield {"row": "radiologist", "title": "the radiologist's own report", **truth}
    cases = [study.case for study in held_out]
    nearest = NearestWriter(parts.training)
    differing = [nearest.differing(case) for case in cases]
    known = {
        "share_with_a_training_study_of_the_same_labels": round(_mean([not n for n in differing]), 4),
        "labels_that_the_nearest_does_not_share": round(_mean(differing), 4),
    }
    yield from _written("template", "template", TemplateWriter(), held_out)
    for row in _written("nearest", "nearest neighbor", nearest, held_out):
        yield row | known


def _written(key: str, title: str, writer: Writer, held_out: Sequence[Study]) -> Iterator[Row]:
    began = time.perf_counter()
    texts = writer.write([study.case for study in held_out])
    yield from _both(key, title, texts, time.perf_counter() - began, held_out)


def language_rows(
    arguments: argparse.Namespace, work: Path, parts: Split, held_out: Sequence[Study]
) -> Iterator[Row]:
    """The language model, trained to the end of its budget first, as it is and checked."""
    from real_language.examples import example_of
    from real_language.language_writer import LanguageModelWriter
    from real_language.training import AdapterTraining

    settings = settings_of(arguments, parts.training)
    llm = load(settings, arguments.device)
    examples = [example_of(llm, study, settings.max_report_tokens) for study in parts.training]
    training = AdapterTraining(llm, examples, settings, work)
    progress = training.run(arguments.checkpoint_seconds)
    epochs = progress.steps * settings.batch_size / len(examples)
    writer = LanguageModelWriter(
        llm, settings.max_report_tokens, work, fingerprint([repr(settings), str(progress.steps)])
    )
    texts = writer.write([study.case for study in held_out])
    trained = {
        "seconds_trained": round(progress.seconds, 1),
        "steps": progress.steps,
        "epochs": epochs,
        "resumed": progress.resumed,
        "trained_parameters": sum(p.numel() for p in llm.adapter_parameters().values()),
        "first_loss": _mean(progress.losses[:20]),
        "last_loss": _mean(progress.losses[-20:]),
        "settings": {name: value for name, value in vars(settings).items() if name != "studies"},
    }
    title = f"SmolLM2-135M + LoRA, {epochs:.1f} epochs"
    for row in _both("language_model", title, texts, writer.seconds, held_out):
        yield row | trained


def _both(
    key: str, title: str, texts: Sequence[str], seconds: float, held_out: Sequence[Study]
) -> Iterator[Row]:
    """A writer's row, and the row of its texts after the check."""
    yield {"row": key, "title": title, "seconds_written": round(seconds, 2), **score(texts, held_out)}
    began = time.perf_counter()
    checked = [check_against_labels(text, study.case) for text, study in zip(texts, held_out, strict=True)]
    seconds += time.perf_counter() - began
    yield {
        "row": f"{key}_checked",
        "title": f"{title}, checked",
        "seconds_written": round(seconds, 2),
        "sentences_removed_a_report": _mean([item.removed for item in checked]),
        "sentences_added_a_report": _mean([item.added for item in checked]),
        **score([item.text for item in checked], held_out),
    }


def settings_of(arguments: argparse.Namespace, training: Sequence[Study]) -> Settings:
    """How the adapters are trained, as the command line says."""
    from real_language.training import Settings

    return Settings(
        llm_name=LLM_NAME,
        studies=fingerprint([f"{study.case}\n{study.text}" for study in training]),
        lora_rank=arguments.lora_rank,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        max_report_tokens=arguments.max_tokens,
        steps=arguments.steps,
        seconds=arguments.seconds,
        seed=arguments.seed,
    )


def load(settings: Settings, device: str) -> LanguageModel:
    """The language model with new adapters.

    Raises:
        ConfigError: There is no such device.
        WeightsUnavailableError: The weights are nowhere.
    """
    import torch

    from vlm3d.model.language_model import load_language_model

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked for, and torch finds no CUDA device; leave it out")
    torch.manual_seed(settings.seed)
    return load_language_model(
        settings.llm_name,
        lora_rank=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        device=device,
    )


def fingerprint(texts: Sequence[str]) -> str:
    """Sixteen digits that change with any of the texts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()[:16]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
