"""Run one function over many items: in this process, in local processes, or on Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from enum import Enum
from functools import partial
from multiprocessing.connection import wait as wait_for_connections
from typing import Any, Generic, Literal, Protocol, TypeVar

from vlm3d.extras import require

Backend = Literal["local", "ray"]
Item = TypeVar("Item")
Result = TypeVar("Result")
_IN_FLIGHT_A_WORKER = 2


class Killed(Enum):
    """Stands for the result of an item whose process was killed from outside."""

    KILLED = 1


KILLED = Killed.KILLED


def each_finished(
    work: Callable[[Item], Result], items: Sequence[Item], *, workers: int, backend: Backend = "local"
) -> Iterator[tuple[Item, Result | Killed]]:
    """Each item with its result, in the order in which they finish.

    At most two items a worker are in flight. If a local process is killed (for want of memory, say), nobody knows which
    item was at fault: those in flight are tried again, each alone, and only one that kills again gets `KILLED`.

    Args:
        work: A module-level function, or a partial of one. What it raises ends the run.
        items: Picklable.
        workers: Processes, or Ray tasks at a time; a single local one works in this process.
        backend: Where.

    Raises:
        MissingExtraError: Ray is wanted and not installed.
    """
    if backend == "ray":
        yield from _pooled(work, items, _RayPool(), workers)
    elif workers == 1:
        for item in items:
            yield item, work(item)
    else:
        yield from _in_processes(work, items, workers)


def require_ray() -> Any:
    """Ray, or one line on how to install it.

    Raises:
        MissingExtraError: It is not installed.
    """
    return require("ray", extra="ray", purpose="prepare on a Ray cluster")


class _WorkerDied(Exception, Generic[Item]):
    """A process was killed, nobody knows on which of the items in flight."""

    def __init__(self, places: list[int]) -> None:
        super().__init__()
        self.places = places


class _Pool(Protocol):
    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]: ...


def _in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result | Killed]]:
    left = dict(enumerate(items))
    while left:
        places = list(left)
        try:
            with _process_pool(work, workers) as pool:
                for place, result in _by_place(work, [left[p] for p in places], pool, workers):
                    yield left.pop(places[place]), result
        except _WorkerDied as died:
            for place in died.places:
                item = left.pop(places[place])
                yield item, _alone(work, item)


def _alone(work: Callable[[Item], Result], item: Item) -> Result | Killed:
    """Work on one item in a process of its own, so that it can take no other with it."""
    try:
        with _process_pool(work, 1) as pool:
            return pool.submit(work, item).result()
    except BrokenProcessPool:
        return KILLED


def _pooled(
    work: Callable[[Item], Result], items: Sequence[Item], pool: _Pool, workers: int
) -> Iterator[tuple[Item, Result | Killed]]:
    for place, result in _by_place(work, items, pool, workers):
        yield items[place], result


def _by_place(
    work: Callable[[Item], Result], items: Sequence[Item], pool: _Pool, workers: int
) -> Iterator[tuple[int, Result]]:
    """Place and result of each item, with two a worker in flight, so that none waits and no queue grows."""
    flying: dict[Future[Result], int] = {}
    waiting = iter(enumerate(items))
    try:
        while True:
            while len(flying) < _IN_FLIGHT_A_WORKER * workers and (entry := next(waiting, None)) is not None:
                flying[pool.submit(work, entry[1])] = entry[0]
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield flying.pop(future), result
    except BrokenProcessPool as error:
        raise _WorkerDied(list(flying.values())) from error
    finally:
        for future in flying:
            future.cancel()


def _process_pool(work: Callable[..., Any], workers: int) -> Executor:
    """Processes that are forked from a server of their own, which imports the work's module once for all.

    Not from here: threads of torch do not survive a fork.
    """
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forkserver else "spawn")
    if forkserver:
        context.set_forkserver_preload([getattr(work, "func", work).__module__])
    return ProcessPoolExecutor(workers, context, initializer=_start_worker)


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
    """As much of an executor as `_by_place` needs, on Ray; a task whose worker was killed gives `KILLED`."""

    def __init__(self) -> None:
        ray = require_ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self._task = ray.remote(_call)
        self._errors = ray.exceptions

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Hand a call to the cluster."""
        result: Future[Any] = Future()
        self._task.remote(fn, *args).future().add_done_callback(partial(self._pass_on, result))
        return result

    def _pass_on(self, result: Future[Any], done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            result.set_result(done.result())
        elif isinstance(error, self._errors.RayError) and not isinstance(error, self._errors.RayTaskError):
            result.set_result(KILLED)  # not an error that the work raised
        else:
            result.set_exception(error)


def _call(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)
