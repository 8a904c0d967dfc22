"""The phantom cohort: procedural chest CTs with exact truth, reproducible from a seed."""

from vlm3d.datasets.phantom.generation import Phantom, generate_phantom
from vlm3d.datasets.phantom.painting import PaintedScan, paint_into_scan
from vlm3d.datasets.phantom.truth import FindingSpec, FindingTruth

__all__ = ["FindingSpec", "FindingTruth", "PaintedScan", "Phantom", "generate_phantom", "paint_into_scan"]
