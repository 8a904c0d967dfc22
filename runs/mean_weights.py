"""The mean of checkpoints of one training, which draws masks a little better than each: OUT CHECKPOINT CHECKPOINT ...

`OUT` is a new folder; everything but the weights is the last checkpoint's, and `training.json` names all of them. It has no
figures of a validation: the mean was not judged yet.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vlm3d.model.checkpoint import fingerprint, read_config, read_training, read_weights, write_checkpoint


def main() -> None:
    """Write the mean."""
    out, *folders = (Path(argument) for argument in sys.argv[1:])
    states = [read_weights(folder) for folder in folders]
    if len(states) < 2 or any(state.keys() != states[-1].keys() for state in states):
        sys.exit("two checkpoints or more with the same tensors are needed")
    mean = {
        name: torch.stack([state[name].float() for state in states]).mean(dim=0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[-1].items()
    }
    training = read_training(folders[-1])
    training.pop("validation", None)
    training |= {"mean_of": [fingerprint(state) for state in states]}
    write_checkpoint(out, read_config(folders[-1]), mean, training)


if __name__ == "__main__":
    main()
