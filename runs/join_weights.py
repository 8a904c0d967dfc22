"""Join what trainings of different parts made of one checkpoint: OUT BASE CHECKPOINT CHECKPOINT ...

Every tensor is taken from the checkpoint that changed or added it. `OUT` is a new folder; the configuration is the first
checkpoint's, and `training.json` has the others' under `joined_with`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vlm3d.model.checkpoint import fingerprint, read_config, read_training, read_weights, write_checkpoint


def main() -> None:
    """Write the whole."""
    out, base, *folders = (Path(argument) for argument in sys.argv[1:])
    before = read_weights(base)
    states = [read_weights(folder) for folder in folders]
    joined, changed_by = dict(before), dict[str, Path]()
    for folder, state in zip(folders, states, strict=True):
        if missing := sorted(before.keys() - state.keys()):
            sys.exit(f"{folder} lacks {missing[0]}, which {base} has")
        changed = {
            name: tensor
            for name, tensor in state.items()
            if name not in before or not torch.equal(tensor, before[name])
        }
        if twice := sorted(changed.keys() & changed_by.keys()):
            sys.exit(f"{folder} and {changed_by[twice[0]]} both changed {twice[0]}")
        changed_by |= dict.fromkeys(changed, folder)
        joined |= changed
    first, *others = (read_training(folder) for folder in folders)
    untrained = set(first["untrained_tasks"]).intersection(*(other["untrained_tasks"] for other in others))
    told = {
        "untrained_tasks": sorted(untrained),
        "anatomy": sorted({word for training in (first, *others) for word in training["anatomy"]}),
        "joined_with": [
            {"fingerprint": fingerprint(state), **other}
            for state, other in zip(states[1:], others, strict=True)
        ],
    }
    write_checkpoint(out, read_config(folders[0]), joined, first | told)


if __name__ == "__main__":
    main()
