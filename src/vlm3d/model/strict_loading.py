"""Saved tensors go into place all or none, and a wrong one is named."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlm3d.errors import CheckpointError


def copy_strictly(targets: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Copy saved tensors into place, all or none.

    Args:
        targets: Where they go, by name.
        state: What was saved, by name.
        what: What they belong to, for the message.

    Raises:
        CheckpointError: A tensor is missing, foreign or of another shape; the message names it.
    """
    for problem, names in (
        ("lacks", sorted(targets.keys() - state.keys())),
        ("has the foreign", sorted(state.keys() - targets.keys())),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"the checkpoint {problem} tensor {names[0]}{more} of {what}")
    for name, target in targets.items():
        if target.shape != state[name].shape:
            raise CheckpointError(
                f"the checkpoint's {name} has shape {tuple(state[name].shape)}, {what} needs {tuple(target.shape)}"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state[name])
