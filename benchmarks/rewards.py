"""Are a checkpoint's reports worth more than another's? Rewards of phase 3 on held-out scans, scan by scan.

python benchmarks/rewards.py --before tiny --after run3/final --data test --split test

Both write a report of each scan from their own findings, as `vlm3d predict` does before it repairs anything; the table has
both means and the gain with its paired 95 % bootstrap interval over patients. Take a split that neither was trained on nor
chosen by.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measuring import machine
from vlm3d.config import GrpoPhase
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.inference.thresholds import thresholds_for
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.training.reward_comparison import ScoredReports, compare_rewards, score_held_out


def main() -> None:
    """Print the machine, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="Checkpoint that phase 3 began with.")
    parser.add_argument("--after", required=True, help="Checkpoint that it ended with.")
    parser.add_argument("--data", type=Path, required=True, help="Prepared store.")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="Most scans.")
    arguments = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    dataset = PreparedDataset(arguments.data, (arguments.split,))
    phase = VLM3DMultiTask.from_pretrained(arguments.after).config.training.phases.grpo
    before, after = (
        scored(checkpoint, dataset, phase, arguments.limit)
        for checkpoint in (arguments.before, arguments.after)
    )
    gains = compare_rewards(before, after)
    means = before.means(), after.means()
    print(f"{len(before.case_ids)} scans of {arguments.data}, split {arguments.split}")
    print(f"{'':18}  before   after   gain (95 % interval)")
    for name, gain in gains.items():
        was, now = (found[name] for found in means)
        print(f"{name:18} {was:7.3f} {now:7.3f}  {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})")


def scored(checkpoint: str, dataset: PreparedDataset, phase: GrpoPhase, limit: int | None) -> ScoredReports:
    """A checkpoint's reports of a split, under the rewards of a phase."""
    model = VLM3DMultiTask.from_pretrained(checkpoint, load_llm=True)
    return score_held_out(model, dataset, phase, limit, thresholds_for(model, checkpoint))


if __name__ == "__main__":
    main()
