"""Parts that were trained apart are joined, say whose they are, and nothing that two changed is passed over."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from support.small_models import small_model
from vlm3d.model.checkpoint import read_config, read_training, read_weights, write_checkpoint

SCRIPT = Path(__file__).parents[1] / "runs" / "join_weights.py"
MASKS, WORDS = "vision_encoder.norm.weight", "vision_encoder.norm_region.weight"


def _save(
    folder: Path, changes: dict[str, float], untrained: tuple[str, ...], anatomy: tuple[str, ...]
) -> None:
    model = small_model()
    with torch.no_grad():
        for name, value in changes.items():
            model.get_parameter(name).fill_(value)
    model.untrained_tasks, model.learned_anatomy = untrained, anatomy
    model.save_pretrained(folder)


def _join(*folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, folders)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_each_tensor_is_of_the_checkpoint_that_changed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, masks, words = (tmp_path / name for name in ("base", "masks", "words"))
    _save(base, {MASKS: 1.0, WORDS: 1.0}, ("localization", "generation"), ("given",))
    _save(masks, {MASKS: 2.0, WORDS: 1.0}, ("generation",), ("classical",))
    _save(words, {MASKS: 1.0, WORDS: 3.0}, ("localization",), ("given",))
    _join(tmp_path / "whole", base, masks, words, monkeypatch=monkeypatch)
    whole, before = read_weights(tmp_path / "whole"), read_weights(base)
    assert {name for name in whole if not torch.equal(whole[name], before[name])} == {MASKS, WORDS}
    assert whole[MASKS].unique().tolist() == [2.0]
    assert whole[WORDS].unique().tolist() == [3.0]
    training = read_training(tmp_path / "whole")
    assert training["untrained_tasks"] == []
    assert training["anatomy"] == ["classical", "given"]
    assert [part["untrained_tasks"] for part in training["joined_with"]] == [["localization"]]


def test_what_one_added_is_kept_and_what_one_lost_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, masks, words = (tmp_path / name for name in ("base", "masks", "words"))
    for folder in (base, masks, words):
        _save(folder, {}, (), ())
    added = {"report_generator.adapter.lora_A": torch.ones(2, 3)}
    write_checkpoint(words, read_config(words), read_weights(words) | added, read_training(words))
    _join(tmp_path / "whole", base, masks, words, monkeypatch=monkeypatch)
    assert torch.equal(read_weights(tmp_path / "whole")["report_generator.adapter.lora_A"], torch.ones(2, 3))
    less = {name: tensor for name, tensor in read_weights(masks).items() if name != MASKS}
    write_checkpoint(masks, read_config(masks), less, read_training(masks))
    with pytest.raises(SystemExit, match=f"lacks {MASKS}"):
        _join(tmp_path / "other", base, masks, words, monkeypatch=monkeypatch)


def test_a_tensor_that_two_changed_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, masks, words = (tmp_path / name for name in ("base", "masks", "words"))
    _save(base, {MASKS: 1.0}, (), ())
    _save(masks, {MASKS: 2.0}, (), ())
    _save(words, {MASKS: 3.0}, (), ())
    with pytest.raises(SystemExit, match=f"both changed {MASKS}"):
        _join(tmp_path / "whole", base, masks, words, monkeypatch=monkeypatch)
    assert not (tmp_path / "whole").exists()
