"""The full-size lesion localizer beside nnU-Net's plain network, as JSON lines.

    python benchmarks/localizer.py

Five lesions at the full resolution of 64 x 256 x 256 against nnU-Net's 6-class plain U-Net (32 to 320 channels), and 18
prompts against 5; float32, batch 1, forward. Ours includes text, the denoising transformer over 4,096 patch features
and the U-Net; the encoder that all heads of the system share is measured in encoder.py. Processes and rounds as there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from measuring import best_seconds, in_child, machine, peak_rss_mb

SHAPE, GRID = (64, 256, 256), (16, 16, 16)
ROUNDS = 3


def build(network: str) -> Any:
    """A network as a function of nothing."""
    import torch

    torch.manual_seed(0)
    volume = torch.randn(1, 1, *SHAPE)
    if network.startswith("vlm3d"):
        from vlm3d.config import load_config
        from vlm3d.model.localization_module import LesionLocalizationModule

        config = load_config("large", [f"model.localizer.num_lesion_diseases={network.split()[1]}"]).model
        module = LesionLocalizationModule(config.localizer, config.vision.embed_dim, 768).eval()
        patches = torch.randn(1, GRID[0] * GRID[1] * GRID[2], config.vision.embed_dim)
        return lambda: module(volume, patches, GRID)
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    unet = PlainConvUNet(
        input_channels=1,
        n_stages=6,
        features_per_stage=(32, 64, 128, 256, 320, 320),
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=[(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)],
        n_conv_per_stage=2,
        num_classes=6,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    ).eval()
    return lambda: unet(volume)


def child(network: str) -> None:
    """Measure one network, and print it."""
    import torch

    run = build(network)
    with torch.inference_mode():
        seconds = best_seconds(run, 2)
    print(json.dumps({"seconds": seconds, "peak_rss_mb": peak_rss_mb()}))


def main() -> None:
    """Measure all, taking turns, and print the ratios."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
        return
    print(json.dumps(machine()), flush=True)
    best: dict[str, dict[str, float]] = {}
    for _ in range(ROUNDS):
        for network in ("vlm3d 5 prompts", "nnU-Net plain", "vlm3d 18 prompts"):
            row = in_child(__file__, network)
            kept = best.setdefault(network, row)
            for key in kept:
                kept[key] = min(kept[key], row[key])
    for network, row in best.items():
        print(
            json.dumps(
                {
                    "network": network,
                    "seconds": round(row["seconds"], 2),
                    "peak_rss_mb": round(row["peak_rss_mb"]),
                }
            )
        )
    for name, first, second in (
        ("5 prompts to nnU-Net", "vlm3d 5 prompts", "nnU-Net plain"),
        ("18 prompts to 5", "vlm3d 18 prompts", "vlm3d 5 prompts"),
    ):
        ratio = {key: round(best[first][key] / best[second][key], 3) for key in ("seconds", "peak_rss_mb")}
        print(json.dumps({"ratio": name, **ratio}))


if __name__ == "__main__":
    main()
