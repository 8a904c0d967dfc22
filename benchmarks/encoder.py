"""The full-size vision encoder beside MONAI's ViT with flash attention, as JSON lines.

    python benchmarks/encoder.py            forward and forward + backward at 512 and 4,096 tokens, ratios
    python benchmarks/encoder.py --largest  also one forward pass at 64 x 512 x 512, 16,384 tokens

Both are 12 x 768 over (4, 16, 16) patches, float32, batch 1. Ours carries the slice bias and the regions; MONAI's does not.
Each measurement runs in a process of its own and takes turns with its peer; the best round counts, peak memory is the
process's. The share of the machine's GEMM peak counts useful products only, not the padding that the exact bias needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from measuring import best_seconds, gemm_gflops, in_child, machine, peak_rss_mb

SHAPES = {512: (32, 128, 128), 4096: (64, 256, 256), 16384: (64, 512, 512)}


def build(network: str, shape: tuple[int, int, int]) -> Any:
    """A network as a function of a volume, and of a region mask for ours."""
    import torch

    torch.manual_seed(0)
    if network == "vlm3d":
        from vlm3d.config import load_config
        from vlm3d.model.vision_encoder import ThreeDVisionEncoder

        encoder = ThreeDVisionEncoder(load_config("large").model.vision)
        mask = torch.randint(0, 21, (1, *shape), dtype=torch.uint8)

        def run(volume: torch.Tensor) -> torch.Tensor:
            found = encoder(volume, mask)
            return found.patch_BNC.sum() + found.global_BC.sum() + found.region_BRC.sum()

        return encoder, run
    from monai.networks.nets import ViT

    vit = ViT(
        1,
        shape,
        (4, 16, 16),
        hidden_size=768,
        mlp_dim=3072,
        num_layers=12,
        num_heads=12,
        proj_type="perceptron",
    )
    for block in vit.blocks:
        block.attn.use_flash_attention = True
    return vit, lambda volume: vit(volume)[0].sum()


def useful_gflop(tokens: int) -> float:
    """Products of a 12 x 768 transformer's forward pass: 24 N C^2 in linear layers and 4 N^2 C in attention, a block."""
    return 12 * (24 * tokens * 768**2 + 4 * tokens**2 * 768) / 1e9


def child(network: str, mode: str, tokens: int, repeats: int) -> None:
    """Measure one network in one mode, and print it."""
    import torch

    shape = SHAPES[tokens]
    module, run = build(network, shape)
    volume = torch.randn(1, 1, *shape)
    if mode == "forward":
        module.eval()
        with torch.inference_mode():
            seconds = best_seconds(lambda: run(volume), repeats)
    else:
        module.train()

        def step() -> None:
            module.zero_grad(set_to_none=True)
            run(volume).backward()

        seconds = best_seconds(step, repeats)
    print(json.dumps({"seconds": seconds, "peak_rss_mb": peak_rss_mb()}))


def compare(mode: str, tokens: int, rounds: int, repeats: int) -> None:
    """Both networks, taking turns; print each and the ratio."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for network in ("vlm3d", "monai_vit_flash"):
            row = in_child(__file__, network, mode, str(tokens), str(repeats))
            kept = best.setdefault(network, row)
            kept["seconds"] = min(kept["seconds"], row["seconds"])
            kept["peak_rss_mb"] = min(kept["peak_rss_mb"], row["peak_rss_mb"])
    for network, row in best.items():
        print(json.dumps({"network": network, "mode": mode, "tokens": tokens, **_rounded(row)}))
    ours, peer = best["vlm3d"], best["monai_vit_flash"]
    ratio = {key: round(ours[key] / peer[key], 3) for key in ("seconds", "peak_rss_mb")}
    print(json.dumps({"mode": mode, "tokens": tokens, "ratio_to_monai": ratio}), flush=True)


def largest() -> None:
    """One forward pass over 64 x 512 x 512."""
    peak = gemm_gflops()
    row = in_child(__file__, "vlm3d", "forward", "16384", "1")
    share = useful_gflop(16384) / row["seconds"] / peak
    print(
        json.dumps(
            {
                "network": "vlm3d",
                "mode": "forward",
                "tokens": 16384,
                **_rounded(row),
                "share_of_gemm_peak": round(share, 3),
            }
        )
    )


def _rounded(row: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3 if key == "seconds" else 0) for key, value in row.items()}


def main() -> None:
    """Parse and run."""
    if sys.argv[1:2] == ["--child"]:
        network, mode, tokens, repeats = sys.argv[2:]
        child(network, mode, int(tokens), int(repeats))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", action="store_true", help="also 64 x 512 x 512")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each network")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    for mode, tokens, repeats in (
        ("forward", 512, 5),
        ("forward + backward", 512, 3),
        ("forward", 4096, 1),
        ("forward + backward", 4096, 1),
    ):
        compare(mode, tokens, options.rounds, repeats)
    if options.largest:
        largest()


if __name__ == "__main__":
    main()
