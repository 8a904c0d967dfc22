"""Are a checkpoint's reports worth more than another's? Rewards of phase 3 on held-out scans, scan by scan.

python benchmarks/rewards.py --before tiny --after run3/final --data test --split test

Both write a report of each scan from their common heads' findings: of the likeliest words, as `vlm3d predict` does before
it repairs anything, and drawn at temperature 1, as phase 3 does. A table for each has both means and the gain with its
paired 95 % bootstrap interval over patients. Take a split that neither was trained on nor chosen by.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from measuring import machine
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.errors import VLM3DError
from vlm3d.inference.thresholds import thresholds_for
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.training.reward_comparison import ScoredReports, compare_rewards, score_held_out


def main() -> None:
    """Print the machine, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", help="checkpoint that phase 3 began with")
    parser.add_argument("--after", help="checkpoint that it ended with; its rewards count")
    parser.add_argument("--data", type=Path, help="prepared store")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="most scans")
    arguments = parser.parse_args()
    if None in (arguments.before, arguments.after, arguments.data):
        print(json.dumps({"benchmark": "rewards", "skipped": "give --before, --after and --data"}))
        return
    print(json.dumps(machine()), flush=True)
    dataset = PreparedDataset(arguments.data, (arguments.split,))
    models = [VLM3DMultiTask.from_pretrained(name) for name in (arguments.before, arguments.after)]
    scored = score_held_out(
        models,
        dataset,
        models[1].config.training.phases.grpo,
        arguments.limit,
        thresholds_for(models[0], arguments.before),
        temperatures=(0.0, 1.0),
    )
    for words, (before, after) in zip(("the likeliest words", "drawn at temperature 1"), scored, strict=True):
        print(f"{len(before.case_ids)} scans of {arguments.data}, split {arguments.split}: {words}")
        show(before, after)


def show(before: ScoredReports, after: ScoredReports) -> None:
    """Print one table."""
    means = before.means(), after.means()
    print(f"{'':18}  before   after   gain (95 % interval)")
    for name, gain in compare_rewards(before, after).items():
        was, now = (found[name] for found in means)
        print(f"{name:18} {was:7.3f} {now:7.3f}  {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})")


if __name__ == "__main__":
    try:
        main()
    except VLM3DError as error:
        print(str(error), file=sys.stderr)
        sys.exit(error.exit_code)
