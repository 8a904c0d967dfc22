"""What `vlm3d info` prints: labels, regions, formats, this machine, and each size's parameters and memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence

from vlm3d.anatomy.regions import REGIONS
from vlm3d.config import SHIPPED_CONFIGS, load_config
from vlm3d.labels import DISEASE_NAMES, LESIONS, LUNG_SIGNS

FORMATS = (
    "NIfTI (.nii .nii.gz .hdr/.img)",
    "DICOM (a folder, nested folders, one file of a series, a zip; JPEG 2000, JPEG-LS, RLE)",
    "MetaImage (.mha .mhd)",
    "NRRD (.nrrd .nhdr)",
    "MedSAM2-style NPZ (imgs, gts, spacing, window)",
)

PLAN = {
    "3D vision encoder": (88, 350),
    "classifier": (1, 4),
    "localizer: denoising transformer": (25, 100),
    "localizer: attention U-Net": (20, 80),
    "vision projector": (256, 1_000),
    "language model (frozen)": (70_000, 35_000),
    "LoRA adapters": (69, 280),
    "total": (70_500, 40_000),
}
"""What the project's plan gives for the large size, in millions of parameters and MB: plans, not counts."""


def info_text(configs: Sequence[str] | None = None) -> str:
    """The whole text; only the named configurations' tables if there are names."""
    if configs:
        return "\n\n".join(size_table(name) for name in configs)
    blocks = [
        _numbered("Diseases (CT-RATE's names and order)", DISEASE_NAMES),
        _numbered("Lesions with masks", [f"{lesion.name} ({lesion.key})" for lesion in LESIONS]),
        _numbered(
            "Lung signs with masks, where a model has prompts for them",
            [f"{lesion.name} ({lesion.key})" for lesion in LUNG_SIGNS],
        ),
        _numbered("Anatomical regions (0 is background)", [region.name for region in REGIONS]),
        "Formats\n" + "\n".join(f"  {line}" for line in FORMATS),
        "Environment\n" + "\n".join(f"  {name:13} {value}" for name, value in environment().items()),
        *(size_table(name) for name in SHIPPED_CONFIGS),
    ]
    return "\n\n".join(blocks)


def environment() -> dict[str, str]:
    """Versions and the machine, nothing about its user."""
    import torch
    import transformers

    from vlm3d import __version__

    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    facts = {
        "vlm3d": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} torch threads",
        "CUDA GPU": cuda,
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    return facts


def size_table(name: str) -> str:
    """Parameters and memory a part for one configuration, counted on the meta device."""
    from vlm3d.model.llm_architectures import weight_bytes
    from vlm3d.model.multi_task_model import VLM3DMultiTask

    config = load_config(name)
    model = VLM3DMultiTask(config, load_text=False, device="meta")
    planned = PLAN if config.name == "large" else {}
    four_bit = config.model.report.load_in_4bit
    head = f"Size '{config.name}': {config.model.report.llm_name}"
    columns = f"  {'part':36}{'parameters':>14}{'trainable':>14}{'weights':>12}" + (
        f"{'in the plan':>24}" if planned else ""
    )
    lines = [head, columns]
    total, trainable, weights_mb = 0, 0, 0.0
    for part in model.count_parameters():
        part_mb = part.parameters * 2 / 1e6
        if part.name == "language model (frozen)" and model.report_generator.llm is not None:
            part_mb = weight_bytes(model.report_generator.llm.model, load_in_4bit=four_bit) / 1e6
        lines.append(_size_line(part.name, part.parameters, part.trainable, part_mb, planned))
        total, trainable, weights_mb = (
            total + part.parameters,
            trainable + part.trainable,
            weights_mb + part_mb,
        )
    lines.append(_size_line("total", total, trainable, weights_mb, planned))
    note = "linear layers of the language model in NF4, the rest" if four_bit else "weights"
    lines.append(f"  {note} in 16 bit; the frozen text encoder is needed in training only")
    return "\n".join(lines)


def _size_line(
    name: str, parameters: int, trainable: int, weights_mb: float, planned: Mapping[str, tuple[int, int]]
) -> str:
    line = f"  {name:36}{parameters:14,}{trainable:14,}{weights_mb:9,.0f} MB"
    if name in planned:
        millions, megabytes = planned[name]
        line += f"{millions:11,} M{megabytes:8,} MB"
    return line


def _numbered(title: str, names: Sequence[str]) -> str:
    return title + "\n" + "\n".join(f"  {number:2} {name}" for number, name in enumerate(names, start=1))
