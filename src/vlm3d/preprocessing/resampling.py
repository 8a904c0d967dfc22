"""Put a scan on another grid: linear for HU and probabilities, nearest for labels.

A grid here differs from the scan's only by a step and an offset along each axis, so resampling is one sparse
matrix an axis. The work streams through the slices: a few of them are in memory at a time, whatever the scan.

Along an axis, output index ``i`` lies at input index ``step * i + offset``; integers are voxel centers. Its
value is the mean of the inputs around that place under a triangle. The triangle reaches one input voxel to
each side (linear interpolation), or ``step`` voxels where antialiasing is on and the grid coarsens, so that
detail finer than the new grid is averaged away instead of folding into it. At the border the triangle is cut
and renormalized, which repeats the outermost voxel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

_SLICES_AT_ONCE = 8

Finish = Callable[[NDArray[np.float32]], NDArray[Any]]


@dataclass(frozen=True)
class AxisWeights:
    """How the values along one axis of the output are mixed from those of the input.

    Attributes:
        matrix_OI: float32, one row an output index, one column an input index from ``first`` on.
        first: First input index that any output needs.
    """

    matrix_OI: csr_array
    first: int

    @property
    def needed(self) -> slice:
        """Input indices that are read."""
        return slice(self.first, self.first + int(self.matrix_OI.shape[1]))


def linear_weights(positions_O: NDArray[np.float64], size: int, support: float = 1.0) -> AxisWeights:
    """Weights of linear interpolation along one axis.

    Args:
        positions_O: Where each output lies, as input index; at most half a voxel outside ``0 .. size - 1``.
        size: Number of inputs.
        support: Half-width of the triangle in input voxels: 1 interpolates, more than 1 averages.
    """
    support = max(support, 1.0)
    taps_T = np.arange(int(2 * support) + 2)
    inputs_OT = np.ceil(positions_O - support).astype(np.int64)[:, None] + taps_T
    weights_OT = np.maximum(0.0, 1.0 - np.abs(inputs_OT - positions_O[:, None]) / support)
    weights_OT[(inputs_OT < 0) | (inputs_OT >= size) | (weights_OT < 1e-6)] = 0.0
    weights_OT /= weights_OT.sum(axis=1, keepdims=True)
    rows, columns = np.nonzero(weights_OT)
    inputs = inputs_OT[rows, columns]
    first = int(inputs.min())
    shape = (positions_O.size, int(inputs.max()) + 1 - first)
    values = weights_OT[rows, columns].astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=positions_O.size))])
    matrix = csr_array((values, (inputs - first).astype(np.int32), starts.astype(np.int32)), shape=shape)
    return AxisWeights(matrix, first)


def resample_linear(
    input_DHW: NDArray[Any],
    weights: tuple[AxisWeights, AxisWeights, AxisWeights],
    out_DHW: NDArray[Any],
    finish: Finish | None = None,
    threads: int | None = None,
) -> None:
    """Resample along all three axes into an array that exists.

    Args:
        input_DHW: Any number type, any strides.
        weights: From `linear_weights`, for D, H and W.
        out_DHW: Receives the result; its shape is the weights' number of rows.
        finish: Turns a few finished slices (float32, may be changed in place) into what is stored.
        threads: Slices worked on side by side; None takes what `thread_count` says.
    """
    size = out_DHW.shape[0]
    workers = min(thread_count() if threads is None else threads, max(1, size // _SLICES_AT_ONCE))
    bounds = [size * worker // workers for worker in range(workers + 1)]
    if workers == 1:
        _resample_slices(input_DHW, weights, out_DHW, finish, 0, size)
        return
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(_resample_slices, input_DHW, weights, out_DHW, finish, start, stop)
            for start, stop in pairwise(bounds)
        ]
        for job in jobs:
            job.result()


def resample_nearest(
    labels_DHW: NDArray[Any], positions: tuple[NDArray[np.float64], ...], out_DHW: NDArray[Any]
) -> None:
    """Fill an array with the nearest label of each output voxel.

    Args:
        labels_DHW: Labels on the input grid.
        positions: For D, H and W: where each output lies, as input index; clamped to the input.
        out_DHW: Receives the result.
    """
    d, h, w = (
        np.clip(np.floor(x + 0.5).astype(np.int64), 0, size - 1)
        for x, size in zip(positions, labels_DHW.shape, strict=True)
    )
    for i in range(d.size):
        if i and d[i] == d[i - 1]:
            out_DHW[i] = out_DHW[i - 1]
        else:
            out_DHW[i] = labels_DHW[d[i]].take(h, axis=0).take(w, axis=1)


def thread_count() -> int:
    """Threads for array work: ``OMP_NUM_THREADS`` where it is set, else the cores this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resample_slices(
    input_DHW: NDArray[Any],
    weights: tuple[AxisWeights, AxisWeights, AxisWeights],
    out_DHW: NDArray[Any],
    finish: Finish | None,
    start: int,
    stop: int,
) -> None:
    """Resample output slices ``start .. stop - 1``; each input slice is resampled in its plane once."""
    along_d, along_h, along_w = weights
    matrix = along_d.matrix_OI
    _, height, width = out_DHW.shape
    planes = np.empty((0, height * width), np.float32)
    held = range(0)
    for begin in range(start, stop, _SLICES_AT_ONCE):
        end = min(begin + _SLICES_AT_ONCE, stop)
        rows = matrix[begin:end]
        needed = range(int(rows.indices.min()), int(rows.indices.max()) + 1)
        fresh = np.empty((len(needed), height * width), np.float32)
        for i, d in enumerate(needed):
            if d in held:
                fresh[i] = planes[held.index(d)]
            else:
                slice_HW = input_DHW[along_d.first + d, along_h.needed, along_w.needed]
                half_done = along_h.matrix_OI @ np.ascontiguousarray(slice_HW, np.float32)
                fresh[i].reshape(height, width)[:] = (along_w.matrix_OI @ np.ascontiguousarray(half_done.T)).T
        planes, held = fresh, needed
        done = (rows[:, needed.start : needed.stop] @ planes).reshape(end - begin, height, width)
        out_DHW[begin:end] = done if finish is None else finish(done)
