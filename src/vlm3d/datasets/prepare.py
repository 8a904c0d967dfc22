"""Prepare a data set: bring every scan to the model's grid and keep it in a store that training reads in crops.

Cases are independent, so each is one call of `prepare_case` in a worker process (or on Ray). A worker holds one scan at
a time; this process holds only descriptions. It can be stopped at any point, by kill -9 too: a case's folder is there whole
or not at all, and the next run goes on with what is missing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for_connections
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.config import PreprocessingConfig
from vlm3d.datasets.case import Case
from vlm3d.datasets.store import (
    CASES,
    MANIFEST,
    AnatomyMode,
    Fingerprint,
    PreparedCase,
    check_case_id,
    open_store,
    read_case,
    read_failed,
    read_manifest,
    write_case,
    write_failed,
    write_manifest,
)
from vlm3d.errors import DataError, MissingExtraError, OutputError, VLM3DError
from vlm3d.extras import require
from vlm3d.io import write_atomically
from vlm3d.io.wording import reason
from vlm3d.labels import LESION_KEYS
from vlm3d.preprocessing.orientation import to_canonical
from vlm3d.preprocessing.preprocessor import Preprocessor
from vlm3d.preprocessing.resampling import thread_count
from vlm3d.volume import RegionMap, Volume

logger = logging.getLogger(__name__)

Backend = Literal["local", "ray"]
_IN_FLIGHT_A_WORKER = 2
_STOPS_ALL = (OutputError, MissingExtraError)
"""Errors that the next case would meet as well."""


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
            are some and else the second (``"auto"``), or none.
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
        _ray()
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
        return write_case(job.store, prepared, arrays, job.threads)
    except _STOPS_ALL:
        raise
    except VLM3DError as error:
        return " ".join(str(error).split())
    except Exception as error:
        logger.exception("case %s", case.case_id)
        return f"{type(error).__name__}: {reason(error)}"


def _prepared(case: Case, job: _Job) -> tuple[PreparedCase, dict[str, NDArray[Any]]]:
    data = case.load()
    described = case.described_by(data)
    preprocessor = Preprocessor(job.config, threads=job.threads)
    regions = _regions(data.volume, data.regions, job.anatomy)
    scan = preprocessor.apply_hu(data.volume, regions)
    unknown = sorted(set(data.lesion_masks) - set(LESION_KEYS))
    if unknown:
        raise DataError(
            f"there is a mask of '{unknown[0]}', which is none of the lesions {', '.join(LESION_KEYS)}"
        )
    bits_DHW = np.zeros(scan.hu_DHW.shape, np.uint8)
    voxels: dict[str, int] = {}
    for key, mask_DHW in data.lesion_masks.items():
        found_DHW = preprocessor.apply_masks({key: mask_DHW}, scan.geometry)[key]
        voxels[key] = int(np.count_nonzero(found_DHW))
        if voxels[key]:
            bits_DHW |= found_DHW.view(np.uint8) << LESION_KEYS.index(key)
    affine = scan.geometry.model_affine
    prepared = PreparedCase(
        case_id=case.case_id,
        patient_id=case.patient_id,
        source=case.source,
        split=case.split,
        labels_K=described.labels_K,
        known_lesions=tuple(key for key in LESION_KEYS if key in voxels),
        lesion_voxels={key: voxels[key] for key in LESION_KEYS if key in voxels},
        report=described.report,
        report_is_synthetic=described.report_is_synthetic,
        facts=dict(described.facts),
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


def _regions(volume: Volume, given: RegionMap | None, anatomy: AnatomyMode) -> RegionMap | None:
    if anatomy == "none":
        return None
    if anatomy == "given" or (anatomy == "auto" and given is not None):
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
    ready.update(_with_current_splits(out, cases, ready))
    write_manifest(out, ready.values())
    summary = PrepareSummary(kept=sum(case.case_id in ready for case in cases))
    missing = [case for case in cases if case.case_id not in ready]
    known_failures = read_failed(out)
    workers = max(1, min(workers or thread_count(), len(missing) or 1))
    job = _Job(out.absolute(), config, anatomy, thread_count() if workers == 1 and backend == "local" else 1)
    try:
        with (out / MANIFEST).open("a", encoding="utf-8") as manifest:
            for case, outcome in _outcomes(missing, job, workers, backend):
                if isinstance(outcome, PreparedCase):
                    _append(manifest, outcome)
                    ready[case.case_id] = outcome
                    summary.done += 1
                else:
                    logger.warning("case %s failed: %s", case.case_id, outcome)
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
    listed = read_manifest(out)
    ready: dict[str, PreparedCase] = {}
    for folder in folders:
        if folder.name.startswith("."):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        found = read_case(folder)
        if found is None:
            logger.warning("case %s is incomplete and prepared again", folder.name)
            continue
        line = listed.get(found.case_id)
        ready[found.case_id] = line if line is not None and line.files == found.files else found
    return ready


def _with_current_splits(
    out: Path, cases: list[Case], ready: Mapping[str, PreparedCase]
) -> dict[str, PreparedCase]:
    """Ready cases whose source now says another split; voxels do not depend on it, so only the words are rewritten."""
    changed: dict[str, PreparedCase] = {}
    for case in cases:
        found = ready.get(case.case_id)
        if found is None:
            continue
        if (found.source, found.patient_id) != (case.source, case.patient_id):
            raise DataError(
                f"{out} holds another case called {case.case_id}, from source {found.source}; use another store"
            )
        if found.split != case.split:
            changed[case.case_id] = found.in_split(case.split)
            write_atomically(out / CASES / case.case_id / "case.json", changed[case.case_id].to_json() + "\n")
    return changed


Outcome = tuple[Case, PreparedCase | str]


def _outcomes(cases: list[Case], job: _Job, workers: int, backend: Backend) -> Iterator[Outcome]:
    """Each case with what became of it, as they finish."""
    if backend == "ray":
        yield from _pooled(iter(cases), job, _RayPool(), workers)
    elif workers == 1:
        for case in cases:
            yield case, prepare_case(case, job)
    else:
        yield from _in_processes(cases, job, workers)


def _in_processes(cases: list[Case], job: _Job, workers: int) -> Iterator[Outcome]:
    """Work in local processes; if one is killed, the cases in flight are tried again, each alone."""
    left = {case.case_id: case for case in cases}
    while left:
        try:
            with _process_pool(workers) as pool:
                for case, outcome in _pooled(iter(list(left.values())), job, pool, workers):
                    del left[case.case_id]
                    yield case, outcome
        except _WorkerDied as died:
            for case in died.in_flight:
                del left[case.case_id]
                yield case, _alone(case, job)


def _alone(case: Case, job: _Job) -> PreparedCase | str:
    """Prepare one case in a process of its own, so that it can take nobody with it."""
    try:
        with _process_pool(1) as pool:
            return pool.submit(prepare_case, case, job).result()
    except BrokenProcessPool:
        return "the process that prepared it was killed, most likely for want of memory; use fewer jobs"


class _WorkerDied(Exception):
    """A process was killed from outside; nobody knows on which of the cases in flight."""

    def __init__(self, in_flight: list[Case]) -> None:
        super().__init__()
        self.in_flight = in_flight


def _pooled(cases: Iterator[Case], job: _Job, pool: Executor | _RayPool, workers: int) -> Iterator[Outcome]:
    """Keep two cases a worker in flight, so that none waits and no queue grows."""
    flying: dict[Future[PreparedCase | str], Case] = {}
    try:
        while True:
            while len(flying) < _IN_FLIGHT_A_WORKER * workers and (case := next(cases, None)) is not None:
                flying[pool.submit(prepare_case, case, job)] = case
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                yield flying.pop(future), outcome
    except BrokenProcessPool as error:
        raise _WorkerDied(list(flying.values())) from error
    finally:
        for future in flying:
            future.cancel()


def _process_pool(workers: int) -> ProcessPoolExecutor:
    # not forked from here: threads of torch and blosc2 do not survive a fork
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    return ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=_start_worker)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for_connections([sentinel])
    os._exit(1)


class _RayPool:
    """As much of an executor as `_pooled` needs, on Ray."""

    def __init__(self) -> None:
        ray = _ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self._task = ray.remote(prepare_case)

    def submit(self, _: Callable[..., Any], case: Case, job: _Job) -> Future[PreparedCase | str]:
        """Hand a case to the cluster."""
        future: Future[PreparedCase | str] = self._task.remote(case, job).future()
        return future


def _ray() -> Any:
    return require("ray", extra="ray", purpose="prepare on a Ray cluster")


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
