"""CT-RATE's own report labeler, where a user has its weights: RadBERT-RoBERTa-4m with a linear layer for 18 labels.

It reads at most 512 tokens of a report in lower case and calls a finding present from a probability of 0.5. The weights
come with CT-RATE (non-commercial) and are no part of this package; `vlm3d.evaluation.labeler` needs none.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm3d.errors import CheckpointError
from vlm3d.labels import DISEASE_NAMES
from vlm3d.pretrained import quiet_transformers, resolve_weights

MAX_TOKENS = 512
THRESHOLD = 0.5
_ENCODER_PREFIX, _HEAD_PREFIX = "model.", "classifier."
_DERIVED = {"embeddings.position_ids", "embeddings.token_type_ids"}
"""Buffers that older versions of transformers saved and newer ones make themselves."""


class RadBertLabeler:
    """The official classifier as a `vlm3d.evaluation.labeler.ReportLabeler`.

    Args:
        encoder: A RoBERTa of transformers with a pooler.
        head: Linear layer from the encoder's width to 18 logits.
        tokenizer: The encoder's tokenizer.
        lower_case: Whether reports are read in lower case.
        batch_size: Reports read at once.
    """

    name = "RadBERT"

    def __init__(
        self, encoder: Any, head: nn.Linear, tokenizer: Any, *, lower_case: bool = True, batch_size: int = 16
    ) -> None:
        if head.out_features != len(DISEASE_NAMES):
            raise CheckpointError(
                f"the classifier gives {head.out_features} labels; CT-RATE's gives {len(DISEASE_NAMES)}"
            )
        self.encoder = encoder.eval().requires_grad_(False)
        self.head = head.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.lower_case = lower_case
        self.batch_size = batch_size

    @classmethod
    def load(
        cls, weights: str | Path, encoder: str | Path, *, device: torch.device | str = "cpu"
    ) -> RadBertLabeler:
        """Load a user's weights; nothing in the file is executed.

        Args:
            weights: The classifier's file (``.pth`` or ``.safetensors``) with keys ``model.*`` and ``classifier.*``.
            encoder: Folder with the encoder's ``config.json`` and tokenizer, or its name on the Hub.
            device: Where to run.

        Raises:
            CheckpointError: The file is no such classifier, or does not fit the encoder.
            WeightsUnavailableError: The encoder is in none of the places looked in.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        folder = Path(encoder) if Path(encoder).is_dir() else resolve_weights(str(encoder))
        state = _read_state(Path(weights))
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(folder, local_files_only=True)
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                model = AutoModel.from_config(config)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder.name} holds no encoder with config.json and a tokenizer ({_first_line(error)})"
            ) from error
        head_weight = state.get(f"{_HEAD_PREFIX}weight")
        if head_weight is None or head_weight.ndim != 2:
            raise CheckpointError(f"{Path(weights).name} has no 'classifier.weight': is it the classifier's?")
        head = nn.Linear(head_weight.shape[1], head_weight.shape[0])
        _fill(model, _part(state, _ENCODER_PREFIX), Path(weights).name)
        _fill(head, _part(state, _HEAD_PREFIX), Path(weights).name)
        return cls(model.to(device), head.to(device), tokenizer)

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probability (N, 18) of every finding in every report."""
        rows = [np.zeros((0, len(DISEASE_NAMES)), np.float32)]
        device = self.head.weight.device
        for start in range(0, len(texts), self.batch_size):
            batch = [
                text.lower() if self.lower_case else text for text in texts[start : start + self.batch_size]
            ]
            tokens = self.tokenizer(
                batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(device)
            output = self.encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            rows.append(torch.sigmoid(self.head(output.pooler_output).float()).cpu().numpy())
        return np.concatenate(rows)

    def label_reports(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """Labels (N, 18) of N reports, in the order of `vlm3d.labels.DISEASE_NAMES`."""
        labels_NK: NDArray[np.bool_] = self.probabilities(list(texts)) >= THRESHOLD
        return labels_NK


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name; pickled code is refused, not run."""
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as weights ({_first_line(error)}); give a .pth of tensors or a .safetensors"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path.name} holds something other than named tensors")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _fill(module: nn.Module, state: dict[str, Tensor], file_name: str) -> None:
    """Load a part's tensors, all of them and no others."""
    try:
        result = module.load_state_dict({k: v for k, v in state.items() if k not in _DERIVED}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{file_name} does not fit the encoder ({_first_line(error)})") from error
    missing = [key for key in result.missing_keys if key not in _DERIVED]
    if missing or result.unexpected_keys:
        what = f"lacks '{missing[0]}'" if missing else f"has '{result.unexpected_keys[0]}' too much"
        raise CheckpointError(f"{file_name} does not fit the encoder: it {what}")


def _first_line(error: BaseException) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[:2])[:160]
