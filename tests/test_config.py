"""Settings: shipped sizes, overrides, and faults named by their key."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm3d.config import SHIPPED_CONFIGS, load_config
from vlm3d.errors import ConfigError


@pytest.mark.parametrize("name", SHIPPED_CONFIGS)
def test_shipped_sizes_load(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.model.vision.embed_dim % config.model.localizer.denoiser_heads == 0


@pytest.mark.parametrize("name", SHIPPED_CONFIGS)
def test_masks_are_learned_from_boxes_of_several_scans(name: str) -> None:
    phase = load_config(name).training.phases.localization
    assert phase.scan_crop is not None
    assert phase.batch_size > phase.boxes_per_scan


def test_overrides_reach_any_depth() -> None:
    config = load_config(
        "tiny", ["model.vision.depth=3", "loss.balancing=gradnorm", "preprocessing.max_shape=[8, 32, 32]"]
    )
    assert config.model.vision.depth == 3
    assert config.loss.balancing == "gradnorm"
    assert config.preprocessing.max_shape == (8, 32, 32)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.vision.wings=2", "model.vision.wings"),
        ("model.vision.depth=many", "model.vision.depth"),
        ("model.vision.embed_dim=100", "num_heads"),
        ("model.vision.patch_size=[8, 16, 32]", "patch_size"),
        ("model.vision.depth", "key=value"),
        ("name.first=x", "single value"),
        ("model.vision.depth=[", "YAML"),
    ],
)
def test_faults_are_named(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        load_config("tiny", [override])
    assert "\n" not in str(raised.value)


def test_a_file_may_start_from_a_size_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: tiny\nname: mine\nmodel: {vision: {depth: 2}}\n")
    (tmp_path / "yours.yaml").write_text("base: mine.yaml\nmodel: {vision: {num_heads: 3}}\n")
    config = load_config(tmp_path / "yours.yaml")
    assert (config.name, config.model.vision.depth, config.model.vision.num_heads) == ("mine", 2, 3)
    assert config.model.vision.embed_dim == load_config("tiny").model.vision.embed_dim


@pytest.mark.parametrize(
    "override",
    [
        "training.phases.joint.tasks={}",
        "training.phases.joint.parts=[]",
        "training.phases.joint.lr_scale={visoin: 3}",
        "model.classifier.class_weights=[1, 2]",
    ],
)
def test_what_would_be_taken_in_vain_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config("tiny", [override])


def test_tasks_of_a_file_replace_those_of_its_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: tiny\ntraining: {phases: {joint: {tasks: {localization: 1.0}}}}\n")
    assert load_config(path).training.phases.joint.tasks == {"localization": 1.0}


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    for text, words in (("- a\n- b\n", "by name"), ("a: [", "YAML"), ("base: loop.yaml\n", "its own base")):
        (tmp_path / "loop.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_config(tmp_path / "loop.yaml")
    with pytest.raises(ConfigError, match="tiny, small, medium, large"):
        load_config("gigantic")
