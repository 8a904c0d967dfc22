"""One training step of the tiny size on one phantom: what a batch looks like, from scan to loss."""

from __future__ import annotations

import torch

from vlm3d import MultiTaskLoss, VLM3DMultiTask, load_config
from vlm3d.datasets.phantom import generate_phantom
from vlm3d.preprocessing.preprocessor import Preprocessor
from vlm3d.volume import RegionMap

if __name__ == "__main__":
    config = load_config("tiny", ["preprocessing.spacing_mm=[6.0, 3.0, 3.0]", "preprocessing.crop=center"])
    phantom = generate_phantom(7)
    preprocessor = Preprocessor(config.preprocessing)
    scan = preprocessor.apply(phantom.volume, phantom.regions)
    masks = {}
    for key, mask_DHW in phantom.lesion_masks.items():
        as_regions = RegionMap(mask_DHW.astype("uint8"), phantom.volume.affine)
        prepared = preprocessor.apply(phantom.volume, as_regions).regions_DHW
        masks[key] = torch.from_numpy(prepared)[None]

    model = VLM3DMultiTask(config).train()
    tokens, token_mask = model.report_generator.tokenize_reports([phantom.report.text])
    batch = {"disease_labels": torch.from_numpy(phantom.disease_labels)[None], "lesion_masks": masks}
    outputs = model(
        torch.from_numpy(scan.intensity_DHW)[None, None],
        torch.from_numpy(scan.regions_DHW)[None],
        batch["disease_labels"],
        masks,
        tokens,
        report_attention_mask=token_mask,
    )
    losses = MultiTaskLoss.from_config(config.loss)(outputs, batch)
    losses["total"].backward()
    for name, value in losses.items():
        print(f"{name:15} {value.item():.3f}")
