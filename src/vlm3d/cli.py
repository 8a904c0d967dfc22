"""The command line. Heavy imports happen inside commands, so that help is instant."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vlm3d import __version__
from vlm3d.errors import INTERRUPTED_EXIT_CODE, TERMINATED_EXIT_CODE, InputError, VLM3DError
from vlm3d.labels import MIN_LESION_ML

app = typer.Typer(
    name="vlm3d",
    help="Read a chest CT: 18 disease probabilities, 5 lesion masks and a report. Research software, not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint folder or Hub name; by default the weights that ship with --config, else random ones."
    ),
]
ConfigName = Annotated[str, typer.Option("--config", help="tiny, small, medium, large or a YAML file.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlm3d {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop."),
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    if not verbose:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels that nothing here calls


@app.command()
def predict(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="NIfTI, DICOM folder or zip, MetaImage, NRRD, case of a store; one or many."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to create; with many scans one folder each inside.")
    ],
    checkpoint: Checkpoint = None,
    config: ConfigName = "tiny",
    mask: Annotated[
        Path | None, typer.Option(help="Anatomy mask on the scan's grid (vlm3d or TotalSegmentator labels).")
    ] = None,
    mask_labels: Annotated[
        str,
        typer.Option(help="Whose ids --mask holds: auto (by the highest one), vlm3d or totalsegmentator."),
    ] = "auto",
    anatomy: Annotated[
        str, typer.Option(help="classical, totalsegmentator or none, when there is no --mask.")
    ] = "classical",
    series: Annotated[
        str | None, typer.Option(help="DICOM series: a number from 'vlm3d series' or a UID.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Probability from which a disease is positive; by default the checkpoint's own, else 0.5."
        ),
    ] = None,
    mask_threshold: Annotated[float, typer.Option(help="Probability from which a voxel is lesion.")] = 0.5,
    min_lesion_ml: Annotated[
        float, typer.Option(help="Smaller pieces are dropped from the masks.")
    ] = MIN_LESION_ML,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write a report with the language model.")
    ] = True,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest report, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 decodes greedily.")] = None,
    beams: Annotated[
        int | None, typer.Option(help="Beams of the search for the likeliest report; 1 is greedy.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling, and of untrained weights.")] = 0,
    on_contradiction: Annotated[
        str,
        typer.Option(
            help="What happens to a report that contradicts the model's findings: flag, regenerate or repair."
        ),
    ] = "repair",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output of vlm3d.")
    ] = False,
) -> None:
    """Predict one or many scans; the model is loaded once."""
    from vlm3d.inference.pipeline import PredictionSettings

    settings = PredictionSettings(
        anatomy=_one_of(anatomy, "--anatomy", ("classical", "totalsegmentator", "none")),
        mask_labels=_one_of(mask_labels, "--mask-labels", ("auto", "vlm3d", "totalsegmentator")),
        classification_threshold=threshold,
        localization_threshold=mask_threshold,
        min_lesion_ml=min_lesion_ml,
        report=report,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        num_beams=beams,
        seed=seed,
        on_contradiction=_one_of(on_contradiction, "--on-contradiction", ("flag", "regenerate", "repair")),
    )
    if mask is not None and len(inputs) > 1:
        raise _usage("--mask goes with a single scan")
    from vlm3d.outputs.batch import predict_scans

    outcome = predict_scans(
        inputs,
        out,
        lambda: _pipeline(checkpoint, config, device, seed, with_report=report),
        settings,
        mask=mask,
        series=series,
        overwrite=overwrite,
        say=lambda line: typer.echo(line, err=True),
    )
    for page in outcome.pages:
        typer.echo(os.fsencode(page))  # the file's own bytes, whatever its name is
    if outcome.failed:
        if len(inputs) > 1:
            typer.echo(f"{len(outcome.failed)} of {len(inputs)} scans failed", err=True)
        raise typer.Exit(outcome.exit_code)


@app.command()
def evaluate(
    predictions: Annotated[
        list[Path] | None,
        typer.Argument(help="A system's results: csv, official JSON, or a folder of predictions or masks."),
    ] = None,
    truth: Annotated[
        list[Path] | None,
        typer.Option("--truth", "-t", help="csv, JSON, masks, phantoms or a store; repeatable."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Instead of PREDICTIONS: run this checkpoint over --data.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Prepared store for --checkpoint.")] = None,
    split: Annotated[str, typer.Option(help="Of --data: train, valid, test or all.")] = "test",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for evaluation.json, tables and page.")
    ] = None,
    page: Annotated[bool, typer.Option("--page", help="Also write the page of errors to --out.")] = False,
    against: Annotated[
        list[Path] | None, typer.Option(help="A second system's results, for a paired test; repeatable.")
    ] = None,
    tune_on: Annotated[
        list[str] | None,
        typer.Option(
            help="Tune thresholds on these predictions of other patients (--checkpoint: on this split)."
        ),
    ] = None,
    tune_against: Annotated[
        list[Path] | None, typer.Option(help="The second system's predictions of the same other patients.")
    ] = None,
    tune_truth: Annotated[
        list[Path] | None, typer.Option(help="Labels for --tune-on, if --truth lacks them.")
    ] = None,
    objective: Annotated[str, typer.Option(help="What tuned thresholds maximize: f1 or crg.")] = "f1",
    threshold: Annotated[
        float | None,
        typer.Option(help="Of every disease, instead of those stored with the checkpoint; else 0.5."),
    ] = None,
    resamples: Annotated[
        int, typer.Option(help="Of the bootstrap over patients; 0 for no intervals.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    common: Annotated[
        bool, typer.Option("--common", help="Leave out cases that only one side knows, instead of refusing.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="With --checkpoint: write and score reports.")
    ] = False,
    report_batch: Annotated[int, typer.Option(min=1, help="Reports that --report writes side by side.")] = 8,
    on_contradiction: Annotated[
        str, typer.Option(help="With --report: flag what contradicts the model's findings, or repair it.")
    ] = "repair",
    bert_score: Annotated[
        bool, typer.Option("--bert-score", help="Compare reports by the meaning of their words too (slow).")
    ] = False,
    radbert: Annotated[
        Path | None,
        typer.Option(
            help="Weights of CT-RATE's text classifier (.pth), to read findings from reports as the challenge does."
        ),
    ] = None,
    radbert_encoder: Annotated[
        str, typer.Option(help="Folder or Hub name of its encoder's config.json and tokenizer.")
    ] = "zzxslp/RadBERT-RoBERTa-4m",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for --checkpoint.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier evaluation.")] = False,
) -> None:
    """Score predictions of any system, or a checkpoint, against the truth, with intervals."""
    if page and out is None:
        raise _usage("--page needs --out, the folder to write it to")
    if (checkpoint is None) != (data is None) or (checkpoint is None) == (not predictions):
        raise _usage("give PREDICTIONS with --truth, or --checkpoint with --data")
    if checkpoint is None and not truth:
        raise _usage("PREDICTIONS need --truth to be compared with")
    if checkpoint is not None and (truth or against or tune_against or tune_truth or len(tune_on or []) > 1):
        raise _usage("--checkpoint takes its truth from --data; --tune-on is one of its splits")
    from vlm3d.evaluation.evaluation_files import check_folder
    from vlm3d.evaluation.evaluator import EvaluationSettings
    from vlm3d.evaluation.figures import Thresholds
    from vlm3d.evaluation.intervals import Intervals
    from vlm3d.evaluation.labeler import ReportLabeler, RuleLabeler
    from vlm3d.evaluation.tables import evaluation_text
    from vlm3d.outputs.evaluation_run import evaluate_checkpoint, evaluate_files, write_results

    if out is not None:
        check_folder(out, overwrite=overwrite)
    labeler: ReportLabeler = RuleLabeler()
    if radbert is not None:
        from vlm3d.evaluation.labeler_radbert import RadBertLabeler

        labeler = RadBertLabeler.load(radbert, radbert_encoder)
    settings = EvaluationSettings(
        threshold=0.5 if threshold is None else threshold,
        objective=_one_of(objective, "--objective", ("f1", "crg")),
        intervals=Intervals(resamples=resamples, seed=seed),
        common_only=common,
        key_slices=3 if page else 0,
        bert_score=bert_score,
        labeler=labeler,
    )

    def say(line: str) -> None:
        typer.echo(line, err=True)

    if checkpoint is not None and data is not None:
        tuned = tune_on[0] if tune_on else None
        found = evaluate_checkpoint(
            checkpoint,
            data,
            settings,
            split=split,
            tune_on=tuned,
            thresholds=None if threshold is None else Thresholds.fixed(threshold),
            reports=report,
            report_batch=report_batch,
            on_contradiction=_one_of(on_contradiction, "--on-contradiction", ("flag", "repair")),
            device=device,
            say=say,
        )
    else:
        found = evaluate_files(
            predictions or [],
            truth or [],
            settings,
            against=against or [],
            tune_on=[Path(name) for name in tune_on or []],
            tune_against=tune_against or [],
            tune_truth=tune_truth or [],
            say=say,
        )
    typer.echo(evaluation_text(found.figures), nl=False)
    if out is not None:
        for path in write_results(found, out, page=page, overwrite=overwrite):
            typer.echo(path)


@app.command()
def tune(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, which keeps the thresholds.")],
    data: Annotated[Path, typer.Option("--data", "-d", help="Prepared store.")],
    split: Annotated[str, typer.Option(help="To tune on: other patients than those of training.")] = "valid",
    objective: Annotated[str, typer.Option(help="What the thresholds maximize: f1 or crg.")] = "f1",
    variations: Annotated[
        int,
        typer.Option(
            help="Times an annotated scan is varied as in training, too, to fit how masks are drawn."
        ),
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Choose where each disease turns positive and how each mask is drawn; predict takes it from the checkpoint."""
    from vlm3d.inference.loading import choose_device
    from vlm3d.inference.thresholds import tune_checkpoint

    stored = tune_checkpoint(
        checkpoint,
        data,
        split=split,
        objective=_one_of(objective, "--objective", ("f1", "crg")),
        variations=variations,
        device=str(choose_device(device)),
    )
    for name, value in stored.values.items():
        typer.echo(f"{value:.3f}  {name}")
    for key, rule in ({} if stored.fusion is None else stored.fusion.masks).items():
        beats = (
            "" if rule.presence is None else f"; a mask is to beat a Dice of {rule.presence.dice_to_beat:.3f}"
        )
        typer.echo(f"{rule.cut:+.2f}  logit from which on a voxel is {key}{beats}")
    typer.echo(stored.source)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to create or replace.")] = Path(
        "demo_output"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the phantom.")] = 7,
) -> None:
    """Make a phantom chest CT, predict it, and print where its page is."""
    from vlm3d.inference.pipeline import PredictionSettings
    from vlm3d.outputs.demo import run_demo

    page = run_demo(
        out,
        lambda: _pipeline(None, "tiny", "auto", 0, with_report=True),
        PredictionSettings(),
        seed=seed,
        say=lambda line: typer.echo(line, err=True),
    )
    typer.echo(f"Open this page: {page.resolve()}")


@app.command()
def phantom(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")],
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same phantom.")] = 0,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Write that many, with seeds from --seed on, each to a folder in --out."),
    ] = None,
    spacing: Annotated[tuple[float, float, float], typer.Option(help="Voxel size D H W in mm.")] = (
        3.0,
        1.5,
        1.5,
    ),
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0 for one a core.")] = 0,
    protocol: Annotated[
        str, typer.Option(help="default, or shifted for scanners outside the default's range.")
    ] = "default",
    prevalence_scale: Annotated[
        float, typer.Option(min=0.01, max=100.0, help="How many times as common each finding is, to 60 %.")
    ] = 1.0,
) -> None:
    """Write procedural chest CTs with masks, labels and reports; phantoms that are there already are kept."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share the cores, not threads
    from vlm3d.datasets.phantom.writing import write_phantoms

    if not all(0.3 <= side <= 20 for side in spacing):
        raise _usage("--spacing takes three numbers between 0.3 and 20 mm")
    kept = 0
    for folder, was_there in write_phantoms(
        out,
        range(seed, seed + (count or 1)),
        single=count is None,
        jobs=jobs or os.cpu_count() or 1,
        spacing_mm=spacing,
        protocol=None if _one_of(protocol, "--protocol", ("default", "shifted")) == "default" else protocol,
        prevalence_scale=prevalence_scale,
    ):
        kept += was_there
        typer.echo(folder)
    if kept:
        typer.echo(f"kept {kept} that were complete already", err=True)


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help="Data sets; see docs/data.md.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Store to create, or to go on with.")],
    config: ConfigName = "tiny",
    anatomy: Annotated[
        str,
        typer.Option(
            help="auto (given regions, else our own), given, classical, mixed (half auto, half classical), none."
        ),
    ] = "auto",
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one a core if not given.")] = None,
    backend: Annotated[str, typer.Option(help="local processes, or ray.")] = "local",
) -> None:
    """Prepare data sets for training; goes on where an earlier run stopped. Exit code 3 if a case failed."""
    from vlm3d.config import load_config
    from vlm3d.datasets.prepare import prepare as prepare_cases
    from vlm3d.datasets.sources import find_cases
    from vlm3d.errors import DataError

    _one_of(anatomy, "--anatomy", ("auto", "given", "classical", "mixed", "none"))
    _one_of(backend, "--backend", ("local", "ray"))
    preprocessing = load_config(config).preprocessing
    cases = find_cases(sources)
    with _case_progress(len(cases)) as progress:
        summary = prepare_cases(
            cases,
            out,
            preprocessing,
            anatomy=anatomy,  # type: ignore[arg-type]
            workers=jobs,
            backend=backend,  # type: ignore[arg-type]
            progress=progress,
        )
    typer.echo(f"{out}: {summary.done} prepared, {summary.kept} kept, {len(summary.failed)} failed")
    if summary.failed:
        raise DataError(
            f"{len(summary.failed)} of {len(cases)} cases failed; {out / 'failed.jsonl'} says why"
        )


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="tiny, small, medium, large or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as training.seed=3.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", "-d", help="Store of vlm3d prepare.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run's folder; an unfinished run there goes on.")
    ] = None,
    phase: Annotated[
        list[str] | None,
        typer.Option(help="1.0, 1.1, 1.2, 1.3, 2 or 3, or its name; repeatable; all but 3 if not given."),
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Checkpoint folder or shipped size to start from instead of random weights."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what the run needs; with --data, time some steps here too."),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=0, help="With --dry-run: GPUs to plan for; 0 plans for the CPU; by default what is here."
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="With --dry-run: GiB of each; by default this one's, else 80.")
    ] = None,
) -> None:
    """Train a model on a prepared store; goes on where an earlier run stopped."""
    from vlm3d.config import load_config
    from vlm3d.training.trainer import TrainingRequest
    from vlm3d.training.trainer import train as train_model

    settings = load_config(config, overrides or ())
    if dry_run:
        from vlm3d.training.plan import gpus_here, plan_training
        from vlm3d.training.timing import measured_seconds_per_step

        count, memory_gib = gpus_here()
        planned = count if gpus is None else gpus
        seconds = None
        if data is not None and planned == count and gpu_memory is None:  # what is planned is what is here
            request = TrainingRequest(settings, data, Path("run"), phase, start_from)
            seconds = measured_seconds_per_step(request)
        plan = plan_training(
            settings,
            phase,
            world_size=max(planned, 1),
            device="cuda" if planned else "cpu",
            device_memory_gib=(gpu_memory or memory_gib or 80.0) if planned else None,
            seconds_per_step=seconds,
        )
        typer.echo(plan.table())
        plan.check()
        return
    if data is None or out is None:
        raise _usage("training needs --data, the store of vlm3d prepare, and --out, the run's folder")
    logging.getLogger("vlm3d.training").setLevel(logging.INFO)  # training tells how it goes, line by line
    final = train_model(TrainingRequest(settings, data, out, phase, start_from))
    typer.echo(f"{final}: vlm3d predict SCAN --checkpoint {final}")


@app.command()
def challenge(
    task: Annotated[str, typer.Option(help="classification, reports or boxes.")],
    year: Annotated[int, typer.Option(help="Of the challenge: 2025 or 2026.")] = 2026,
    inputs: Annotated[
        Path,
        typer.Option(
            "--input", "-i", envvar="FORITHMUS_INPUT", help="Folder of the volumes: .mha, .nii.gz or .nii."
        ),
    ] = Path("/input"),
    out: Annotated[
        Path, typer.Option("--out", "-o", envvar="FORITHMUS_OUTPUT", help="Folder of the result file.")
    ] = Path("/output"),
    checkpoint: Annotated[
        str, typer.Option(envvar="FORITHMUS_WEIGHTS", help="Checkpoint folder or shipped size.")
    ] = "/weights",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result file, once the new one is whole.")
    ] = False,
) -> None:
    """Write the VLM3D challenge's result file for a folder of volumes, offline; all of them or nothing."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["PIP_NO_INDEX"] = "1"  # before what reads them is imported
    from vlm3d.challenge import run_challenge

    written = run_challenge(
        inputs,
        out,
        lambda: _pipeline(checkpoint, "tiny", device, 0, with_report=task == "reports"),
        _one_of(task, "--task", ("classification", "reports", "boxes")),
        year=int(_one_of(str(year), "--year", ("2025", "2026"))),  # type: ignore[arg-type]
        overwrite=overwrite,
        say=lambda line: typer.echo(line, err=True),
    )
    typer.echo(written)


@app.command()
def series(path: Annotated[Path, typer.Argument(help="DICOM folder or zip.")]) -> None:
    """List the series of a DICOM folder, numbered as --series takes them."""
    from vlm3d.io import list_series

    for info in list_series(path):
        typer.echo(str(info))


@app.command()
def label(
    inputs: Annotated[
        list[Path], typer.Argument(help="Reports: text files, or CSV tables of one report a row.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="CSV to write.")],
    text_column: Annotated[
        list[str] | None,
        typer.Option(help="Column of a table that holds the words; may be given more than once."),
    ] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence/--no-evidence", help="Add the sentence that decided each label.")
    ] = True,
) -> None:
    """Read the 18 findings from radiology reports, with rules; no weights are needed."""
    from vlm3d.evaluation.labeler import label_report
    from vlm3d.evaluation.labeler_files import labels_table, read_reports
    from vlm3d.io.writing import write_atomically

    reports = read_reports(inputs, text_column or ())
    labels = [label_report(report.text) for report in reports]
    write_atomically(out, labels_table([report.name for report in reports], labels, evidence=evidence))
    typer.echo(f"{len(reports)} reports: {out}")


@app.command()
def info(
    config: Annotated[str | None, typer.Option("--config", help="Only this configuration.")] = None,
) -> None:
    """Print labels, regions, formats, environment, and every configuration's parameters and memory."""
    from vlm3d.outputs.info import info_text

    typer.echo(info_text(None if config is None else [config]))


def main() -> None:
    """Run the command line; an error of the user's becomes one line and its documented exit code."""
    try:
        with _termination_raised():
            app(standalone_mode=True)
    except VLM3DError as error:
        _fail(" ".join(str(error).split()), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED_EXIT_CODE)
    except _Terminated:
        _fail("terminated", TERMINATED_EXIT_CODE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if not error.filename:
            raise
        # a path that cannot even be asked for: no permission on the way, a name too long
        from vlm3d.io.wording import printable, reason

        _fail(f"{printable(str(error.filename))}: {reason(error)}", InputError.exit_code)


class _Terminated(BaseException):
    """SIGTERM as an exception: unpacked archives and half-written folders are removed on its way."""


@contextmanager
def _termination_raised() -> Iterator[None]:
    """Let the first SIGTERM raise `_Terminated`; a second one ends at once."""

    def terminate(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> None:
    typer.echo(f"vlm3d: error: {message.encode(errors='replace').decode()}", err=True)
    sys.exit(code)


def _pipeline(checkpoint: str | None, config: str, device: str, seed: int, *, with_report: bool):  # type: ignore[no-untyped-def]
    from vlm3d.inference.loading import load_pipeline

    return load_pipeline(checkpoint, config=config, device=device, seed=seed, with_report=with_report)


@contextmanager
def _case_progress(total: int) -> Iterator[Callable[..., None]]:
    """A bar on the terminal, and a line for each case that fails."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def show(event) -> None:  # type: ignore[no-untyped-def]
            if event.failure is not None:
                console.print(
                    f"{event.case_id}: {event.failure}", markup=False, highlight=False, soft_wrap=True
                )
            bar.update(task, completed=event.finished)

        yield show


def _one_of(value: str, option: str, allowed: tuple[str, ...]):  # type: ignore[no-untyped-def]
    if value not in allowed:
        raise _usage(f"{option} is one of {', '.join(allowed)}, got '{value}'")
    return value


def _usage(message: str) -> VLM3DError:
    from vlm3d.errors import ConfigError

    return ConfigError(message)
