"""Requests and reports as tokens, batches of like length, and the loss over a report's tokens.

Shapes: B examples, T tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from real_language.studies import Case, Study
from vlm3d.model.language_model import LanguageModel
from vlm3d.model.report_generator import IGNORED_LABEL, SYSTEM_PROMPT

REQUEST = "Findings of a chest CT: {findings}.\nWrite the report: findings and impression."
NOTHING = "none of the 18 that are looked for"


@dataclass(frozen=True)
class Example:
    """A request and the report that answers it.

    Attributes:
        prompt_ids: Tokens up to where the answer begins.
        report_ids: Tokens of the answer, the end token last unless it was cut.
    """

    prompt_ids: list[int]
    report_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prompt_ids) + len(self.report_ids)


def prompt_ids(llm: LanguageModel, case: Case) -> list[int]:
    """The request for a case's report, in the language model's chat format."""
    request = REQUEST.format(findings=", ".join(case.present) or NOTHING)
    before, after = llm.chat_around_image(SYSTEM_PROMPT, "", request)
    return [*before, *after]


def example_of(llm: LanguageModel, study: Study, max_report_tokens: int) -> Example:
    """A study as the language model learns it.

    Args:
        llm: For its tokenizer.
        study: Its report may not be empty.
        max_report_tokens: A longer report is cut, and then teaches no end.
    """
    report_ids = [*llm.encode(study.text.strip()), llm.end_token_id]
    return Example(prompt_ids(llm, study.case), report_ids[:max_report_tokens])


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every example once, in batches of like length, the batches and equally long examples in another order each epoch.

    Args:
        lengths: Of the examples.
        batch_size: Examples a batch; the last one may be smaller.
        seed: Same seed and epoch, same batches.
        epoch: Number of the pass.
    """
    random = np.random.default_rng([seed, epoch])
    near = np.array(lengths) * random.uniform(0.9, 1.1, len(lengths))  # so that neighbors change
    order = [int(index) for index in np.argsort(near)]
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return [batches[place] for place in random.permutation(len(batches))]


def batches_from(lengths: Sequence[int], batch_size: int, seed: int, first_step: int) -> Iterator[list[int]]:
    """The batches of all epochs from a step on, without end, as indices of examples."""
    per_epoch = -(-len(lengths) // batch_size)
    step = first_step
    while True:
        batches = epoch_batches(lengths, batch_size, seed, step // per_epoch)
        yield from batches[step % per_epoch :]
        step += len(batches) - step % per_epoch


def report_loss(llm: LanguageModel, examples: Sequence[Example]) -> Tensor:
    """Mean cross-entropy of a report token, in nats; the request's tokens are read, not learned."""
    ids_BT, label_BT = _padded(examples)
    first = min(len(example.prompt_ids) for example in examples)
    # padding follows the text, so no token of the text attends to it and no mask is needed
    output = llm(llm.embed(ids_BT), use_cache=False, logits_to_keep=ids_BT.shape[1] - first + 1)
    target_N = label_BT[:, first:].to(output.logits.device).flatten()
    return functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), target_N, ignore_index=IGNORED_LABEL
    )


def _padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and labels (B, T), zeros and ignored labels behind the shorter ones."""
    longest = max(example.length for example in examples)
    ids_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    label_BT = torch.full((len(examples), longest), IGNORED_LABEL)
    for row, example in enumerate(examples):
        start = len(example.prompt_ids)
        ids_BT[row, : example.length] = torch.tensor([*example.prompt_ids, *example.report_ids])
        label_BT[row, start : example.length] = torch.tensor(example.report_ids)
    return ids_BT, label_BT
