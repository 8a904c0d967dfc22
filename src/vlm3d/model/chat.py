"""How a request is worded for a language model: each family's own chat template, with a gap for the image."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError

GAP = "[[image]]"
_TEMPLATE_DATE = "26 Jul 2024"  # Llama's template prints a date; a fixed one keeps reports reproducible


def chat_around_image(tokenizer: Any, system: str, before: str, after: str) -> tuple[list[int], list[int]]:
    """Token ids of a request, up to and from the place where the image tokens go.

    Args:
        tokenizer: A transformers tokenizer; one without a chat template gets plain paragraphs.
        system: The standing instruction. Families without a system role (Gemma-2) get it from the user.
        before: What the user says before the image.
        after: What the user says after it.

    Returns:
        Ids that precede the image, and ids from the image to where the model's answer begins.
    """
    text = _render(tokenizer, system, f"{before}{GAP}{after}")
    head, _, tail = text.partition(GAP)
    return encode(tokenizer, head), encode(tokenizer, tail)


def end_of_turn_id(tokenizer: Any) -> int:
    """The token that ends the model's answer: the chat template's own, else the tokenizer's end of text."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": GAP}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, date_string=_TEMPLATE_DATE)
        after = encode(tokenizer, text.rpartition(GAP)[2])
        if after and after[0] in special_ids(tokenizer):
            return after[0]
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no end-of-text token")
    return int(tokenizer.eos_token_id)


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of control tokens, which never belong into a report's text."""
    added = {int(key) for key, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {int(key) for key in tokenizer.all_special_ids}


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(tokenizer: Any, system: str, user: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return f"{tokenizer.bos_token or ''}{system}\n\n{user}\n\n"
    options = {"tokenize": False, "add_generation_prompt": True, "date_string": _TEMPLATE_DATE}
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        text = str(tokenizer.apply_chat_template(turns, **options))
        if system in text:
            return text
    except TemplateError:
        pass
    merged = [{"role": "user", "content": f"{system}\n\n{user}"}]
    return str(tokenizer.apply_chat_template(merged, **options))
