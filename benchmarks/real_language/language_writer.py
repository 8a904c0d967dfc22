"""The trained language model as a writer: greedy, several reports in step, those already written read from a file."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from real_language.examples import prompt_ids
from real_language.studies import Case
from vlm3d.errors import CheckpointError
from vlm3d.io.writing import write_atomically
from vlm3d.model.decoding_engine import Step
from vlm3d.model.language_model import LanguageModel
from vlm3d.model.report_decoding import open_engine, run_in_step
from vlm3d.model.report_writing import Writing, whole_sentences
from vlm3d.model.token_choice import DecodingSettings, TokenChooser, repeating_tokens

logger = logging.getLogger("real_language")

FILE = "written.json"


class LanguageModelWriter:
    """Writes after the request that training gave.

    Args:
        llm: Trained, in evaluation mode.
        max_tokens: Most tokens of a report; one that is longer ends with its last whole sentence.
        work: Folder that keeps what was written, so that a run that was killed goes on; None keeps nothing.
        state: Of the weights; texts that another state wrote are not read.
        batch_size: Reports in step.

    Attributes:
        seconds: Spent on writing, over all parts of a run that was cut.
    """

    def __init__(
        self,
        llm: LanguageModel,
        max_tokens: int,
        work: Path | None = None,
        state: str = "",
        batch_size: int = 16,
    ) -> None:
        self._llm = llm
        self._settings = DecodingSettings(max_new_tokens=max_tokens)
        self._file = None if work is None else work / FILE
        self._state = f"{state}, {max_tokens} tokens"
        self._batch_size = batch_size
        self.seconds = 0.0

    def write(self, cases: Sequence[Case]) -> list[str]:
        """One text a case.

        Raises:
            CheckpointError: The file of texts is damaged.
            OutputError: It cannot be written.
        """
        texts = self._read()
        missing = [case for case in cases if case.case_id not in texts]
        for first in range(0, len(missing), self._batch_size):
            batch = missing[first : first + self._batch_size]
            began = time.monotonic()
            texts |= zip([case.case_id for case in batch], self._write_in_step(batch), strict=True)
            self.seconds += time.monotonic() - began
            if self._file is not None:
                kept = {"state": self._state, "seconds": self.seconds, "texts": texts}
                write_atomically(self._file, json.dumps(kept))
                logger.info("%d of %d reports written", len(texts), len(cases))
        return [texts[case.case_id] for case in cases]

    def _read(self) -> dict[str, str]:
        if self._file is None or not self._file.exists():
            return {}
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            if kept["state"] != self._state:
                return {}
            self.seconds = float(kept["seconds"])
            return dict(kept["texts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._file} is damaged; delete it to have the reports written anew"
            ) from error

    @torch.inference_mode()
    def _write_in_step(self, cases: Sequence[Case]) -> list[str]:
        engine = open_engine(self._llm)
        prompts = [self._llm.embed_ids(prompt_ids(self._llm, case)) for case in cases]
        logits_BV = engine.start(prompts, 1, self._settings.max_new_tokens)
        written = run_in_step(engine, [self._writing() for _ in cases], logits_BV)
        return [self._text(tokens) for tokens in written]

    def _writing(self) -> Writing[list[int]]:
        """One report's tokens, until the model ends it or the budget does."""
        llm, settings = self._llm, self._settings
        chooser, tokens = TokenChooser(settings), list[int]()
        log_p_V = yield Step(0, [])
        while True:
            banned = (llm.control_token_ids - llm.stop_token_ids) | set(
                repeating_tokens(tokens, settings.no_repeat_ngram)
            )
            token = chooser.choose(
                log_p_V, banned, lambda token: bool(tokens) or token not in llm.stop_token_ids
            )
            if token in llm.stop_token_ids:
                return tokens
            tokens.append(token)
            if len(tokens) == settings.max_new_tokens:
                return tokens
            log_p_V = yield Step(len(tokens) - 1, [token])

    def _text(self, tokens: list[int]) -> str:
        text = self._llm.decode(tokens).strip()
        return whole_sentences(text) if len(tokens) == self._settings.max_new_tokens else text
