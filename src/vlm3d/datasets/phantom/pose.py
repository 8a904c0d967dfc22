"""How a patient lies on the couch: a few degrees of pitch, roll and yaw, applied to the anatomy before findings.

The organs are drawn upright and resampled once; the lungs' trees and the coronary arteries are turned as curves and drawn
afterwards, and every finding is painted into the turned patient. So fluid lies level, and masks stay exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from vlm3d.datasets.phantom.frame import Canvas, Frame
from vlm3d.datasets.phantom.trees import Tubes

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Pose:
    """Rotation of the patient about the middle of the chest, in degrees.

    Attributes:
        pitch_deg: About the axis from right to left (x), as a tilted gantry or a hollow back does.
        roll_deg: About the long axis (z).
        yaw_deg: About the axis from front to back (y): the patient lies askew.
    """

    pitch_deg: float = 0.0
    roll_deg: float = 0.0
    yaw_deg: float = 0.0

    @property
    def upright(self) -> bool:
        """Whether nothing has to be turned."""
        return self.pitch_deg == self.roll_deg == self.yaw_deg == 0.0

    @property
    def matrix_33(self) -> Points:
        """Rotation of points (z, y, x) in mm: where the upright patient's points come to lie."""
        # points are (z, y, x) here, so that the first of Rotation's axes is the long one
        return Rotation.from_euler(
            "xyz", [self.roll_deg, self.yaw_deg, self.pitch_deg], degrees=True
        ).as_matrix()

    def turn(self, points_N3: Points) -> Points:
        """Points of the upright patient, turned."""
        return np.asarray(points_N3) @ self.matrix_33.T

    def turn_tubes(self, tubes: Tubes) -> Tubes:
        """A tree, turned."""
        return replace(tubes, start_N3=self.turn(tubes.start_N3), end_N3=self.turn(tubes.end_N3))

    def upright_frame(self, frame: Frame) -> Frame:
        """A grid for the upright patient that holds, along z, everything that the turned grid will show."""
        if self.upright:
            return frame
        z, y, x = frame.z_D, frame.y_H, frame.x_W
        corners = np.array([(a, b, c) for a in z[[0, -1]] for b in y[[0, -1]] for c in x[[0, -1]]], float)
        back = corners @ self.matrix_33  # the inverse of a rotation is its transpose
        step = float(frame.step_mm[0])
        below = max(int(np.ceil((float(z[0]) - back[:, 0].min()) / step * 0.75)), 0)
        above = max(int(np.ceil((back[:, 0].max() - float(z[-1])) / step * 0.75)), 0)
        wider = float(z[0]) + step * np.arange(-below, len(z) + above)
        return Frame(wider.astype(np.float32), y, x)

    def turn_canvas(self, upright: Canvas, frame: Frame) -> Canvas:
        """The painted patient turned onto a grid: densities interpolated once, regions by the nearest voxel."""
        if self.upright:
            return replace(upright, frame=frame)
        onto = sitk.ResampleImageFilter()
        onto.SetNumberOfThreads(1)
        onto.UseNearestNeighborExtrapolatorOn()
        rows = self._body_rows(upright, frame)
        part = Frame(frame.z_D, frame.y_H[rows], frame.x_W)
        onto.SetSize(part.shape_DHW[::-1])
        onto.SetOutputOrigin(_first_xyz(part))
        onto.SetOutputSpacing(frame.step_mm[::-1].tolist())
        # SimpleITK asks where a point of the result comes from, with points (x, y, z): the inverse, both axes reversed
        turn = sitk.AffineTransform(3)
        turn.SetMatrix(self.matrix_33.T[::-1, ::-1].ravel().tolist())
        onto.SetTransform(turn)

        def turned(upright_DHW: NDArray[Any], interpolator: int, air: int) -> NDArray[Any]:
            image = sitk.GetImageFromArray(upright_DHW)
            image.SetOrigin(_first_xyz(upright.frame))
            image.SetSpacing(upright.frame.step_mm[::-1].tolist())
            onto.SetInterpolator(interpolator)
            whole = np.full(frame.shape_DHW, air, upright_DHW.dtype)
            whole[:, rows] = sitk.GetArrayFromImage(onto.Execute(image))
            return whole

        return Canvas(
            turned(upright.hu_DHW, sitk.sitkLinear, -1000),
            turned(upright.regions_DHW, sitk.sitkNearestNeighbor, 0),
            frame,
        )

    def _body_rows(self, upright: Canvas, frame: Frame) -> slice:
        """Rows of a turned grid that can show the patient; all others hold air."""
        hit = np.flatnonzero((upright.regions_DHW > 0).any(axis=(0, 2)))
        if len(hit) == 0:
            return slice(None)
        z, y, x = upright.frame.z_D, upright.frame.y_H[hit], upright.frame.x_W
        corners = np.array([(a, b, c) for a in z[[0, -1]] for b in y[[0, -1]] for c in x[[0, -1]]], float)
        across = self.turn(corners)[:, 1]
        reach = 3 * float(frame.step_mm[1])
        start, stop = np.searchsorted(frame.y_H, [across.min() - reach, across.max() + reach])
        return slice(int(start), max(int(stop), int(start) + 1))


def _first_xyz(frame: Frame) -> list[float]:
    return [float(axis[0]) for axis in (frame.x_W, frame.y_H, frame.z_D)]


def sample_pose(rng: np.random.Generator, largest_deg: float = 4.0) -> Pose:
    """Draw how a patient lies: one in four straight, the others turned by some degrees."""
    straight = rng.random() < 0.25
    pitch, roll, yaw = rng.normal(0, [0.5, 0.5, 0.35]) * largest_deg
    if straight:
        return Pose()
    limits = np.clip([pitch, roll, yaw], -largest_deg, largest_deg)
    return Pose(*(round(float(value), 2) for value in limits))
