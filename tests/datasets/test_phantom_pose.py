"""A turned patient stays whole: image, regions, curves, masks and sides agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from vlm3d.anatomy.regions import LEFT_LUNG_IDS, REGION_IDS, RIGHT_LUNG_IDS
from vlm3d.datasets.phantom import FindingSpec, Phantom, generate_phantom, generation
from vlm3d.datasets.phantom.frame import Canvas, Frame
from vlm3d.datasets.phantom.pose import Pose, sample_pose

SPACING_MM = (6.0, 4.0, 4.0)
angle = st.floats(-8, 8).map(lambda value: round(value, 2))
poses = st.builds(Pose, angle, angle, angle)


@contextmanager
def lying(pose: Pose) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "sample_pose", lambda *_: pose)
        yield


def posed(pose: Pose, seed: int = 2, findings: dict[str, FindingSpec] | None = None) -> Phantom:
    with lying(pose):
        return generate_phantom(seed, spacing_mm=SPACING_MM, findings=findings or {})


def middle_of(phantom: Phantom, *keys: str) -> np.ndarray:
    ids = [REGION_IDS[key] for key in keys]
    return np.argwhere(np.isin(phantom.regions.labels_DHW, ids)).mean(axis=0) * SPACING_MM


@given(poses)
def test_turning_is_a_rotation(pose: Pose) -> None:
    points = np.random.default_rng(0).normal(0, 100, (20, 3))
    turned = pose.turn(points)
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(turned[:, None] - turned[None], axis=-1), apart, atol=1e-8)
    assert np.linalg.det(pose.matrix_33) == pytest.approx(1.0), "no mirror image"
    np.testing.assert_allclose(turned @ pose.matrix_33, points, atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(poses, st.tuples(st.floats(-25, 25), st.floats(-30, 30), st.floats(-30, 30)))
def test_image_regions_and_curves_turn_alike(pose: Pose, center: tuple[float, float, float]) -> None:
    frame = Frame.regular((30, 40, 40), (3.0, 2.5, 2.5), (-45.0, -50.0, -50.0))
    upright = pose.upright_frame(frame)
    box = upright.cut((slice(None), slice(None), slice(None)))
    ball = (box.z - center[0]) ** 2 + (box.y - center[1]) ** 2 + (box.x - center[2]) ** 2 < 12.0**2
    body = np.broadcast_to(np.abs(box.y) < 49, ball.shape)
    canvas = Canvas(np.where(ball, 500.0, -800.0).astype(np.float32), body.astype(np.uint8) + ball, upright)
    turned = pose.turn_canvas(canvas, frame)
    where = frame.points_at(np.argwhere(turned.regions_DHW == 2)).mean(axis=0)
    np.testing.assert_allclose(where, pose.turn(np.array([center]))[0], atol=1.2)
    bright = turned.hu_DHW > -150
    assert (bright ^ (turned.regions_DHW == 2)).sum() < 0.35 * bright.sum(), "only at the border"
    assert turned.hu_DHW.shape == turned.regions_DHW.shape == frame.shape_DHW


def test_pitch_leans_the_spine_by_its_angle() -> None:
    def lean(phantom: Phantom) -> float:
        spine = phantom.regions.labels_DHW == REGION_IDS["spine"]
        rows = [np.argwhere(part)[:, 0].mean() if part.any() else np.nan for part in spine]
        inner = np.arange(6, len(rows) - 6)
        return float(np.polyfit(inner * SPACING_MM[0], np.array(rows)[inner] * SPACING_MM[1], 1)[0])

    turned = lean(posed(Pose(pitch_deg=6.0))) - lean(posed(Pose()))
    assert abs(turned) == pytest.approx(np.tan(np.deg2rad(6.0)), abs=0.035)
    assert turned * (lean(posed(Pose(pitch_deg=-6.0))) - lean(posed(Pose()))) < 0


@pytest.mark.parametrize("pose", [Pose(6, 6, -6), Pose(-6, -6, 6), Pose(0, 6, 0)])
def test_right_stays_right(pose: Pose) -> None:
    findings = {
        "Pleural effusion": FindingSpec(0.7, side="right"),
        "Lung nodule": FindingSpec(0.8, side="left"),
    }
    phantom = posed(pose, 4, findings)
    ids = phantom.regions.labels_DHW
    spine = middle_of(phantom, "spine")[2]
    assert middle_of(phantom, "liver")[2] + 40 < middle_of(phantom, "heart")[2]
    right = np.argwhere(np.isin(ids, RIGHT_LUNG_IDS))[:, 2].mean()
    assert right < np.argwhere(np.isin(ids, LEFT_LUNG_IDS))[:, 2].mean()
    sides = {item.finding: item.side for item in phantom.truth}
    assert sides["Pleural effusion"] == "right"
    assert sides["Lung nodule"] == "left"
    assert np.argwhere(phantom.lesion_masks["pleural_effusion"])[:, 2].mean() * SPACING_MM[2] < spine
    assert np.argwhere(phantom.lesion_masks["lung_nodule"])[:, 2].mean() * SPACING_MM[2] > spine


@pytest.mark.parametrize("pose", [Pose(5, -5, 4), Pose(-5, 3, -5), Pose()])
def test_a_bright_lesion_fills_its_mask_and_nothing_else(pose: Pose) -> None:
    nodule = {"Lung nodule": FindingSpec(0.9, size_mm=28, count=1, kind="calcified")}
    ill, well = posed(pose, 4, nodule), posed(pose, 4)
    assert ill.patient["motion"] == [], "this test needs a patient who holds still"
    mask = ill.lesion_masks["lung_nodule"]
    change = ill.volume.voxels_DHW.astype(int) - well.volume.voxels_DHW
    assert mask.sum() > 50
    assert np.mean(change[mask] > 400) > 0.97
    assert not (change > 400)[~binary_dilation(mask)].any()
    item = ill.truth[0]
    z, y, x = item.center_zyx_mm
    index = np.linalg.inv(ill.volume.affine) @ [-x, -y, z, 1.0]
    np.testing.assert_allclose(index[:3], np.argwhere(mask).mean(axis=0), atol=0.1)


def test_poses_are_small_and_often_none() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_pose(rng, 4.0) for _ in range(400)]
    assert 0.15 < np.mean([pose.upright for pose in drawn]) < 0.35
    angles = np.array([[p.pitch_deg, p.roll_deg, p.yaw_deg] for p in drawn])
    assert np.abs(angles).max() <= 4.0
    assert (np.abs(angles).max(axis=0) > 3.0).all()
    assert abs(angles.mean()) < 0.2
