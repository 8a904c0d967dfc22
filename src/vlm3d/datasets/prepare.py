"""Prepare a data set: bring every scan to the model's grid and keep it in a store that training reads in crops.

Cases are independent, so each is one call of `prepare_case` in a worker process (or on Ray). A worker holds one scan at
a time; this process holds only descriptions. It can be stopped at any point, by kill -9 too: a case's folder is there whole
or not at all, and the next run goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.config import PreprocessingConfig
from vlm3d.datasets.case import Case
from vlm3d.datasets.fingerprint import AnatomyMode, Fingerprint, open_store
from vlm3d.datasets.store import (
    ANNOTATED_SLICES,
    CASE,
    CASES,
    MANIFEST,
    PreparedCase,
    check_case_id,
    read_case,
    read_failed,
    write_case,
    write_failed,
    write_manifest,
)
from vlm3d.datasets.synthetic_reports import with_synthetic_report
from vlm3d.datasets.workers import KILLED, Backend, each_finished, require_ray
from vlm3d.errors import DataError, MissingExtraError, OutputError, VLM3DError
from vlm3d.io import write_atomically
from vlm3d.io.wording import reason
from vlm3d.labels import STORED_LESION_KEYS
from vlm3d.preprocessing.orientation import to_canonical
from vlm3d.preprocessing.preprocessor import Preprocessor
from vlm3d.preprocessing.resampling import thread_count
from vlm3d.volume import RegionMap, Volume

logger = logging.getLogger(__name__)

_STOPS_ALL = (OutputError, MissingExtraError)
"""Errors that the next case would meet as well."""
_KILLED_WORDS = "the process that prepared it was killed, most likely for want of memory; use fewer jobs"


@dataclass(frozen=True)
class Progress:
    """Told after each case.

    Attributes:
        case_id: The case.
        failure: Why it could not be prepared, or None.
        finished: Cases finished so far, those found ready included.
        total: Cases in all.
    """

    case_id: str
    failure: str | None
    finished: int
    total: int


@dataclass
class PrepareSummary:
    """What became of the cases.

    Attributes:
        done: Prepared now.
        kept: Found ready from an earlier run.
        failed: Case -> its one-line reason.
    """

    done: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """What a worker needs besides the case; small and picklable."""

    store: Path
    config: PreprocessingConfig
    anatomy: AnatomyMode
    threads: int


def prepare(
    cases: Iterable[Case],
    out: str | Path,
    config: PreprocessingConfig,
    *,
    anatomy: AnatomyMode = "auto",
    workers: int | None = None,
    backend: Backend = "local",
    progress: Callable[[Progress], None] | None = None,
) -> PrepareSummary:
    """Prepare cases into a store; what is in it already is kept.

    Args:
        cases: Descriptions; their order does not matter.
        out: The store: new, or made with the same settings.
        config: Grid, crop and window.
        anatomy: Regions that come with the case (``"given"``), our own search (``"classical"``), the first where there
            are some and else the second (``"auto"``), the same with the second for about half of the cases, by their
            identifiers (``"mixed"``), or none.
        workers: Processes, or Ray tasks at a time; None takes one a core. A single one works in this process.
        backend: ``"ray"`` spreads the same work over a Ray cluster that shares the store's folder.
        progress: Called after each case, in this process.

    Raises:
        DataError: Two cases share an identifier, or the store holds another case under it.
        ConfigError: The store was prepared otherwise; the message names both fingerprints.
        OutputError: The store cannot be written, or another process is writing it.
        MissingExtraError: Ray is wanted and not installed.
    """
    out = Path(out)
    listed = _checked(cases)
    if backend == "ray":
        require_ray()
    open_store(out, Fingerprint(config, anatomy))
    with _locked(out):
        return _prepare_all(listed, out, config, anatomy, workers, backend, progress)


def prepare_case(case: Case, job: _Job) -> PreparedCase | str:
    """Prepare one case and write its folder.

    Returns:
        Its line of the manifest, or why it cannot be prepared.

    Raises:
        OutputError: The store cannot be written.
        MissingExtraError: Reading needs a package that is not installed.
    """
    try:
        prepared, arrays = _prepared(case, job)
        return write_case(job.store, prepared, arrays)
    except _STOPS_ALL:
        raise
    except VLM3DError as error:
        return " ".join(str(error).split())
    except Exception as error:
        logger.info("case %s", case.case_id, exc_info=True)
        return f"{type(error).__name__}: {reason(error)}"


def _prepared(case: Case, job: _Job) -> tuple[PreparedCase, dict[str, NDArray[Any]]]:
    data = case.load()
    preprocessor = Preprocessor(job.config, threads=job.threads)
    regions = _regions(case.case_id, data.volume, data.regions, job.anatomy)
    scan = preprocessor.apply_hu(data.volume, regions)
    unknown = sorted(set(data.lesion_masks) - set(STORED_LESION_KEYS))
    if unknown:
        raise DataError(
            f"there is a mask of '{unknown[0]}', which is none of the lesions {', '.join(STORED_LESION_KEYS)}"
        )
    bits_DHW = np.zeros(scan.hu_DHW.shape, np.uint8)
    voxels: dict[str, int] = {}
    for key, mask_DHW in data.lesion_masks.items():
        found_DHW = preprocessor.apply_masks({key: mask_DHW}, scan.geometry)[key]
        voxels[key] = int(np.count_nonzero(found_DHW))
        if voxels[key]:
            bits_DHW |= found_DHW.view(np.uint8) << STORED_LESION_KEYS.index(key)
    described = with_synthetic_report(case, data, regions)
    facts = dict(described.facts)
    if data.annotated_DHW is not None:
        seen_DHW = preprocessor.apply_masks({"annotated": data.annotated_DHW}, scan.geometry)["annotated"]
        slices = np.flatnonzero(seen_DHW.any(axis=(1, 2)))
        facts[ANNOTATED_SLICES] = [int(slices[0]), int(slices[-1]) + 1] if len(slices) else [0, 0]
    affine = scan.geometry.model_affine
    prepared = PreparedCase(
        case_id=case.case_id,
        patient_id=case.patient_id,
        source=case.source,
        split=case.split,
        labels_K=described.labels_K,
        known_lesions=tuple(key for key in STORED_LESION_KEYS if key in voxels),
        lesion_voxels={key: voxels[key] for key in STORED_LESION_KEYS if key in voxels},
        report=described.report,
        report_is_synthetic=described.report_is_synthetic,
        facts=facts,
        shape_DHW=scan.geometry.model_shape_DHW,
        spacing_mm=scan.geometry.model_spacing_mm,
        affine=tuple(tuple(float(x) for x in row) for row in affine),
        geometry=scan.geometry.to_dict(),
        regions_method=None if regions is None else regions.method,
        notes=(*data.volume.notes, *scan.geometry.notes),
        files={},
    )
    regions_DHW = np.zeros_like(bits_DHW) if scan.regions_DHW is None else scan.regions_DHW
    return prepared, {"image": scan.hu_DHW, "regions": regions_DHW, "lesions": bits_DHW}


def _regions(case_id: str, volume: Volume, given: RegionMap | None, anatomy: AnatomyMode) -> RegionMap | None:
    if anatomy == "none":
        return None
    prefers_given = anatomy == "auto" or (
        anatomy == "mixed" and hashlib.sha256(case_id.encode()).digest()[0] % 2 == 0
    )
    if anatomy == "given" or (prefers_given and given is not None):
        return given
    return segment_anatomy(to_canonical(volume))


def _checked(cases: Iterable[Case]) -> list[Case]:
    """The cases as a list, once each is known to name a folder of its own."""
    listed, seen = list(cases), set()
    for case in listed:
        check_case_id(case.case_id)
        folded = case.case_id.casefold()  # some file systems do not tell a from A
        if folded in seen:
            raise DataError(f"two cases are called {case.case_id}; give each source cases of other names")
        seen.add(folded)
    return listed


def _prepare_all(
    cases: list[Case],
    out: Path,
    config: PreprocessingConfig,
    anatomy: AnatomyMode,
    workers: int | None,
    backend: Backend,
    progress: Callable[[Progress], None] | None,
) -> PrepareSummary:
    ready = _recover(out)
    _take_over_words(out, cases, ready)
    write_manifest(out, ready.values())
    summary = PrepareSummary(kept=sum(case.case_id in ready for case in cases))
    missing = [case for case in cases if case.case_id not in ready]
    known_failures = read_failed(out)
    workers = max(1, min(workers or thread_count(), len(missing) or 1))
    job = _Job(out.absolute(), config, anatomy, thread_count() if workers == 1 and backend == "local" else 1)
    try:
        with (out / MANIFEST).open("a", encoding="utf-8") as manifest:
            work = partial(prepare_case, job=job)
            for case, result in each_finished(work, missing, workers=workers, backend=backend):
                outcome = _KILLED_WORDS if result is KILLED else result
                if isinstance(outcome, PreparedCase):
                    _append(manifest, outcome)
                    ready[case.case_id] = outcome
                    summary.done += 1
                else:
                    logger.info("case %s failed: %s", case.case_id, outcome)
                    summary.failed[case.case_id] = outcome
                if progress is not None:
                    finished = summary.done + summary.kept + len(summary.failed)
                    progress(Progress(case.case_id, summary.failed.get(case.case_id), finished, len(cases)))
    finally:
        still = {name: why for name, why in {**known_failures, **summary.failed}.items() if name not in ready}
        write_failed(out, still)
    write_manifest(out, ready.values())
    return summary


def _append(manifest: IO[str], case: PreparedCase) -> None:
    manifest.write(case.to_json() + "\n")
    manifest.flush()


def _recover(out: Path) -> dict[str, PreparedCase]:
    """The cases that are whole, after sweeping up what a killed run left half done."""
    folders = list((out / CASES).iterdir()) if (out / CASES).is_dir() else []
    ready: dict[str, PreparedCase] = {}
    for folder in folders:
        if folder.name.startswith("."):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        found = read_case(folder)
        if found is None:
            logger.info("case %s is incomplete and prepared again", folder.name)
            continue
        ready[found.case_id] = found
    return ready


def _take_over_words(out: Path, cases: Iterable[Case], ready: dict[str, PreparedCase]) -> None:
    """Bring ready cases up to what their source now says of split, labels and report.

    Where no voxel hangs on it, only the words are rewritten. A case whose labels changed leaves ``ready`` and is prepared
    anew if it has masks, which may come from the same words, or a report that is written from labels. What the source does
    not tell any more stays.
    """
    for case in cases:
        found = ready.get(case.case_id)
        if found is None:
            continue
        if (found.source, found.patient_id) != (case.source, case.patient_id):
            raise DataError(
                f"{out} holds another case called {case.case_id}, from source {found.source}; use another store"
            )
        now = replace(found, split=case.split)
        if case.report is not None:
            now = replace(now, report=case.report, report_is_synthetic=case.report_is_synthetic)
        if case.labels_K is not None and not _same_labels(found.labels_K, case.labels_K):
            now = replace(now, labels_K=case.labels_K, facts={**found.facts, **case.facts})
            written = now.report is None or (now.report_is_synthetic and case.report is None)
            if found.known_lesions or written:
                del ready[case.case_id]
                continue
        if now != found:
            ready[case.case_id] = now
            write_atomically(out / CASES / case.case_id / CASE, now.to_json() + "\n")


def _same_labels(stored_K: Sequence[float] | None, told_K: Sequence[float]) -> bool:
    return stored_K is not None and np.array_equal(stored_K, told_K, equal_nan=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Let no second process write the same store; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another process is preparing into {out}; wait for it") from error
        yield
