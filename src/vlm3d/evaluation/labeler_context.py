"""What a sentence says about a finding that it names: there, not there, perhaps, or only in the past."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Literal

Status = Literal["positive", "negative", "uncertain", "historical"]

# Parts of the one pattern below, in re.VERBOSE's spelling, where a space is "[ ]".
_SEEN = r"""(?:observed|detected|seen|found|noted|present|identified|encountered|demonstrated|visuali[sz]ed|evident|
    available|monitored|watched|selected|distinguished|noticed|appreciated|revealed|remarkable|visible|shown|determined|
    described|followed|reported|considered|suspected|recogni[sz]ed|discernible|apparent|there)"""
_BE = "(?:is|are|was|were|has[ ]been|have[ ]been|had[ ]been|can[ ]be|could[ ]be|be)"
_ADVERB = r"(?:\w+ly[ ]|also[ ]|still[ ]|now[ ]|further[ ]|yet[ ])?"
_EARLIER = r"""(?:also[ ])?(?:\w+[ ])?(?:in|on|at)[ ](?:the[ ])?(?:patient's[ ])?
    (?:previous|prior|old|earlier|former)"""

# "no change in the nodules" denies a change, never the nodules; "seen in the previous examination" is no sighting of today
_DENIES_NOTHING = rf"""
    (?:no|not|without|nor)
      (?:[ ](?:any|a|an|the|obvious|marked|meaningful|major))?
      (?:[ ](?:statistically[ ])?(?:significant(?:ly)?|notabl[ey]|apparent|newly|new|recent|sensible|serious|evident|
        clear|definite))?
      [ ](?:interval[ ]|size[ ]|dimensional[ ]|radiological[ ]|numerical[ ])?
      (?:chang\w*|differ\w*|increas\w*|decreas\w*|progress\w*|regress\w*|alter\w*|grow\w*|enlargement[ ]in|
        interval|develop\w*|newly|only|contrast|completely|optimal\w*|possible|exclude\w*|ruled[ ]out|
        be[ ](?:excluded|ruled[ ]out|clearly[ ]evaluated|evaluated|differentiated|distinguished)|evaluated|fully|
        entirely|known|given|measured|reach\w*|exceed\w*|meet|included|enter|enhance\w*|cause|obstruct\w*|need\w*|
        require\w*|shift\w*|communicat\w*|
        show(?:ing)?[ ](?:\w+[ ])?(?:contrast|enhancement|change|difference))
  | (?:(?:which|that|it)[ ])?(?:(?:was|were|is|are|had[ ]been)[ ])?(?:also[ ]|not[ ])?
      (?:observed|seen|detected|described|defined|present|reported|found|noted|known|monitored|identified)[ ]{_EARLIER}
  | non[ ]?specific | lack[ ]of[ ](?:\w+[ ])?contrast | no[ ]longer[ ](?:as|so) | no[ ]doubt
  | without[ ]pathological | whether[ ]or[ ]not"""
_EXCEPT = r"""(?:other[ ]than|with[ ]the[ ]exception[ ]of|apart[ ]from|except(?:[ ]for)?|aside[ ]from|outside(?:[ ]of)?|
    in[ ]addition[ ]to|beyond|besides)(?![ ](?:this|that|these|it|them|those|the[ ]described)\b)"""
_DENIED_BEFORE_IT = rf"""
    (?:{_BE}[ ])?(?:not|n't)[ ]{_ADVERB}(?:been[ ])?{_SEEN} | (?:wasn't|isn't|weren't|aren't)[ ]{_SEEN}
  | (?:is|are|was|were)[ ](?:absent|excluded|ruled[ ]out) | absent | (?:is|are|was|were)[ ]not(?=[.;]?$) | not[ ]exist\w*
  | (?:could[ ]not|cannot|can[ ]not)[ ]be[ ](?:\w+ly[ ])?(?:evaluated|assessed|made|examined)
  | un(?:detected|observed) | :[ ](?:none|absent|negative|no(?=[.;]?$))
  | (?:is|are|was|were|do|does|did)[ ]not[ ](?:appear[ ]|seem[ ]|look[ ]|to[ ]be[ ])*
    (?:enlarged|dilated|thickened|widened|calcified|remarkable)"""
_OVER = r"""
    (?:has|have|had|was|were|is|are)?[ ]?(?:completely|totally|almost[ ]completely|entirely)[ ]
      (?:regressed|resolved|disappeared|resorbed|resorpt\w*|lost|resected|excised|drained|recovered)
  | (?:has|have|had)[ ](?:resolved|disappeared|been[ ](?:removed|resected|excised|drained))
  | (?:was|were)[ ](?:removed|resected|excised) | disappeared | no[ ]longer"""
_DENIED_AFTER_IT = """no|not|without|free[ ](?:of|from)|absence[ ]of|negative[ ]for|neither|nor|never|lack[ ]of|
    rather[ ]than|devoid[ ]of|instead[ ]of|ruled?[ ]out|exclude[ds]?"""
_AFFIRMED = f"""{_BE}[ ]{_ADVERB}(?:{_SEEN}|made|measured|accompanied|located|stable|thought|evaluated|increased)
  | there[ ](?:is|are|was|were) | consists?[ ]of | attracts?[ ]attention"""
_NEW_CLAUSE = """but|however|although|whereas|while|though|nevertheless|yet|only
  | ,[ ](?:and[ ])?(?:a|an|minimal|mild|slight|small|moderate|marked|few|several|some|there)(?=[ ])"""

_CUE = re.compile(
    rf"""\b(?=[a-z,:])(?: (?P<skip>{_DENIES_NOTHING}) | (?P<except>{_EXCEPT}) | (?P<after>{_DENIED_BEFORE_IT})
    | (?P<normal>(?:is|are|was|were|are[ ]all)[ ](?:of[ ])?(?:within[ ])?(?:the[ ])?(?:normal|unremarkable|natural))
    | (?P<past>{_OVER}) | (?P<before>{_DENIED_AFTER_IT}) | (?P<seen>{_AFFIRMED})
    | (?P<bare>observed|detected|seen|found) | (?P<stop>{_NEW_CLAUSE}) )\b""",
    re.VERBOSE,
)
"""Named by what stands where: ``before`` denies what follows it, ``after`` what precedes it."""

_CUT = re.compile(r"[,:]| and ")
_PAIRED = re.compile(r" ?[-/–—] ?")
_DOUBT = re.compile(
    r"\?|\b(?:suspicious|suspect\w*|may|might|could be|can be|possib\w*|probab\w*|likely|question\w*|"
    r"cannot be (?:excluded|ruled out)|differential|in terms of|in favou?r of|suggest\w*|susp|considered|compatible)\b"
)
_HISTORY = re.compile(
    r"\b(?:history of|operated for|previously (?:known|treated|diagnosed)|known (?:case|to have had)|"
    r"treated for|followed up for|clinical diagnosis)\b"
)


class Context:
    """The cues of one sentence, found once and asked for every finding in it.

    Args:
        sentence: In the form of `vlm3d.evaluation.sentences.plain`.
        written: As it stands in the report, letter by letter.
    """

    __slots__ = ("_cues", "_cuts", "_sentence", "_written")

    def __init__(self, sentence: str, written: str) -> None:
        self._sentence, self._written = sentence, written
        self._cues = [
            (match.lastgroup or "", match.start(), match.end()) for match in _CUE.finditer(sentence)
        ]
        self._cuts: list[int] | None = None

    def status(self, start: int, end: int) -> Status:
        """What is said about the finding named from `start` to `end`."""
        if self._cues:
            denied = self._denied(start, end)
            if denied is not None:
                return denied
        sentence = self._sentence
        if _HISTORY.search(sentence, 0, start):
            return "historical"
        if _DOUBT.search(sentence):
            return "uncertain"
        return "positive"

    def _denied(self, start: int, end: int) -> Status | None:
        """Negative or historical, where a cue before, within or after the finding's words says so."""
        open_denial = excepted = seen = False
        for kind, begin, finish in self._cues:
            if finish > start:
                if kind in ("before", "after") and start < begin < end:  # "heart is not enlarged"
                    return "negative"
                if begin >= end:
                    break
                continue
            if kind == "before":
                open_denial, excepted = True, False
            elif kind == "except":
                open_denial, excepted = False, open_denial
            elif kind == "stop":
                open_denial = excepted = seen = False
            elif kind in ("seen", "bare", "after"):
                # "no mass is seen in the lung": what follows the verb is where the mass is not
                open_denial = False
                seen = True
        if open_denial:
            return "negative"
        return self._denied_after(end, excepted=excepted, seen=seen)

    def _denied_after(self, end: int, *, excepted: bool, seen: bool) -> Status | None:
        for kind, begin, _ in self._cues:
            if begin < end:
                continue
            if kind == "after":
                return None if excepted else "negative"
            if kind == "past":
                return "historical"
            if kind == "normal":
                return None if self._cut_between(end, begin) else "negative"
            if kind in ("seen", "stop", "except"):
                # "a nodule is seen on the right and effusion was not": the denial belongs to what follows
                return None
            if kind == "before":
                if not seen and _PAIRED.fullmatch(self._written, end, begin):
                    return "negative"  # "effusion - no thickening was detected" denies both
                if self._cut_between(end, begin):
                    return None
        return None

    def _cut_between(self, start: int, end: int) -> bool:
        if self._cuts is None:
            self._cuts = [match.start() for match in _CUT.finditer(self._sentence)]
        place = bisect_right(self._cuts, start - 1)
        return place < len(self._cuts) and self._cuts[place] < end
