"""The mean of two checkpoints of one training, which draws masks a little better than either: FIRST SECOND OUT.

What both have in common stays; everything but the weights is the second one's. `OUT` is a new folder.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def main() -> None:
    """Write the mean."""
    first, second, out = (Path(argument) for argument in sys.argv[1:])
    other, mean = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            mean[name] = ((tensor.float() + other[name].float()) / 2).to(tensor.dtype)
    with safe_open(second / WEIGHTS, "pt") as opened:
        metadata = opened.metadata()
    fresh = out.with_name(f".{out.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(second, fresh, ignore=shutil.ignore_patterns("thresholds.json"))
    save_file(mean, fresh / WEIGHTS, metadata=metadata)
    fresh.rename(out)


if __name__ == "__main__":
    main()
