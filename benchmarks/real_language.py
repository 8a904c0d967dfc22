"""Reports written from the 18 labels alone, against real ones: templates, the nearest report, a small language model.

    python benchmarks/real_language.py
    python benchmarks/real_language.py --work FOLDER --seconds 7200     also trains the language model, or goes on

Prints a JSON line a row and then a Markdown table; ``--out`` holds the same as JSON. Without the reports in
``$VLM3D_REAL_DATA/reports`` or ``../shared/data/reports`` it says so and ends.

Each writer is given the labels of a held-out study, made by hand, and nothing else. Studies are put in order of the SHA-256
of their patient; the first three quarters are to learn from, the rest is held out (of the 800 reports: the 600 and 200 of
``benchmarks/labeler.py``, so that no rule of the labeler was written for a report that is scored here).

* ``template``: `vlm3d.datasets.synthetic_reports`, findings and impression.
* ``nearest``: the report of the training study that shares most labels; of several, the first in the order above.
* ``language_model``: SmolLM2-135M-Instruct with low-rank adapters, trained on the training studies' reports after a request
  that lists the findings; only the report's tokens are learned. Words are the likeliest ones. Without ``--steps`` or
  ``--seconds`` there is no such row. Nothing is chosen on the held-out studies.
* ``… checked``: the same text, held against the labels by `vlm3d.inference.consistency.repair_report`: sentences that
  contradict a label go, findings that are left out are added as plain sentences.
* ``radiologist``: the report itself, read by the labeler: where the clinical figures of real language end.

Clinical figures compare the findings that the project's labeler reads from a text with the labels made by hand. The check
uses the same labeler, so a checked row shows that the labeler is satisfied, not that a radiologist would be. Texts are
compared as the VLM3D challenge does, headings left out; in these reports findings and impression run together.

``--work`` keeps adapters, optimizer, random numbers and the texts that were written, and must lie outside the repository:
a run that was killed goes on from the last checkpoint with the same command.
"""

from __future__ import annotations

import sys

from real_language.command import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
