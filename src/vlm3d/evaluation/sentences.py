"""Reports cut into sentences whose places in the report stay known."""

from __future__ import annotations

import re
from typing import NamedTuple

_EDGES = " \t\r\n\"'“”•·*>|"

# A sentence ends at a full stop, a semicolon or an exclamation mark, at a question mark outside brackets, at a bullet,
# at a quotation mark that opens one, and at a line's end unless the next line goes on in lower case. A stop inside
# "1.5", "e.g." or "Dr." ends nothing. The first class is what makes the search fast: the rest is looked at only there.
_BREAK = re.compile(
    r"""
    [.;!?\n\r•·"] (?:
      (?<= \. ) (?! \d | [a-z]\. )
        (?<! \be\.g\. ) (?<! \bi\.e\. ) (?<! \bvs\. ) (?<! \bca\. ) (?<! \bapprox\. ) (?<! \bdr\. ) (?<! \bDr\. )
        (?<! \bfig\. ) (?<! \bseg\. ) (?<! \bmax\. ) (?<! \bresp\. ) (?<! \bincl\. ) (?<! \bcf\. )
    | (?<= [;!•·] )
    | (?<= \? ) (?= ["\s]* (?: $ | [A-Z•] ) )
    | (?<= [\r\n] ) (?! [ \t]* [a-z(\r\n] )
    | (?<= " ) (?= \s* [A-Z] )
    )
    """,
    re.VERBOSE,
)
MAX_SENTENCE_CHARACTERS = 1200
"""Longer ones are cut at a space: no writer ends none, but a model that repeats itself does."""

_NUMBER = re.compile(r"[\s\"]*\d{1,2}[.)]\s*")


class Sentence(NamedTuple):
    """One sentence of a report.

    Attributes:
        text: As written, without the spaces, quotes and bullets around it.
        start: Index of its first character in the report.
        end: Index past its last character.
    """

    text: str
    start: int
    end: int


def split_sentences(text: str) -> list[Sentence]:
    """Cut a report into sentences.

    Semicolons end a sentence, as in the lists of findings that radiologists dictate; a question mark inside brackets
    does not. Decimals ("1.5 mm"), abbreviations and numbers of a list are left whole.

    >>> [sentence.text for sentence in split_sentences("A cyst of 1.5 cm. No effusion; clear lungs")]
    ['A cyst of 1.5 cm.', 'No effusion;', 'clear lungs']
    """
    sentences: list[Sentence] = []
    start = 0
    # lists whose line breaks were lost keep two spaces between their items
    for match in _BREAK.finditer(text.replace("  ", " \n")):
        if match.end() - start < 8 and _NUMBER.fullmatch(text, start, match.end()):
            continue  # "2." of a list belongs to what follows
        _append(sentences, text, start, match.end())
        start = match.end()
    _append(sentences, text, start, len(text))
    return sentences


def _append(sentences: list[Sentence], text: str, start: int, end: int) -> None:
    while end - start > MAX_SENTENCE_CHARACTERS:
        cut = text.rfind(" ", start + 1, start + MAX_SENTENCE_CHARACTERS)
        cut = cut if cut > start else start + MAX_SENTENCE_CHARACTERS
        _append(sentences, text, start, cut)
        start = cut
    piece = text[start:end]
    inner = piece.strip(_EDGES)
    if inner:
        begin = start + len(piece) - len(piece.lstrip(_EDGES))
        sentences.append(Sentence(inner, begin, begin + len(inner)))


_SPELLED_AS = (
    ("-", " "),
    ("/", " "),
    ("_", " "),
    ("–", " "),
    ("—", " "),
    ("\n", " "),
    ("’", "'"),
    ("İ", "I"),
)


def plain(text: str) -> str:
    """Lower case with hyphens and slashes as spaces; every character keeps its index.

    >>> plain("Effusion-thickening")
    'effusion thickening'
    """
    for letter, spelled in _SPELLED_AS:
        text = text.replace(letter, spelled)
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)
