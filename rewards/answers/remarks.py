"""Remarks beside an answer: checks behind it, parentheses, and second thoughts that take it back."""

from __future__ import annotations

import re

_MAX_PARAGRAPHS = 20  # that are looked at from the end
_CHECK = re.compile(
    r"[\s*_#>-]*(?:verification|verify(?:ing)?|(?:quick |double[- ])?check(?:ing)?|sanity check|note|remark"
    r"|this (?:makes sense|is correct|is because|checks out)|(?:we|you) can (?:check|verify)|let's (?:check|verify)"
    r"|to (?:check|verify))\b",
    re.IGNORECASE,
)
_HEADING = re.compile(r"[\s*_#>-]*[A-Za-z -]{4,30}[\s*_:]*")
_LONE_ANSWER = re.compile(
    r"\s*[*_`$(]{0,4}(?:[-+\u2212]?[$€£¥]?[-+\u2212]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?\s?%?"
    r"(?:\s[A-Za-z]{1,15}){0,2}|[A-J]|[A-J][).:]\s[^\n.:]{1,80}"
    r"|(?!solution|answer|explanation|reasoning|step)[A-Za-z]{2,20})[.!]?[*_`$)]{0,4}[.!]?[ \t]*\n",
    re.IGNORECASE,
)
_EXPLANATION = re.compile(
    r"[\s*_#>-]*(?:(?:brief |short |detailed |step[- ]by[- ]step )?(?:explanation|reasoning|justification|rationale)\b"
    r"|here(?:'s| is) (?:why|how|the (?:reasoning|explanation))\b)",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(r"\b(?:wait|actually|oops|sorry|correction|hmm|mistake)\b|\bno,", re.IGNORECASE)
_GOES_ON = re.compile(r"\bbut\b|(?:^|[.!:\n]\s*)(?:So|Therefore|Thus|Hence)\b[^\n]*\d")
_EXPLAINS = re.compile(r"\s*(?:this|that) is\b(?![^\n]*(?:=|\bso\b|\bthus\b|\btherefore\b))", re.IGNORECASE)
DOUBT = re.compile(
    r"\bwait\b|(?<!common )\b(?:error\b|mistake)|\bwrong\b|\bincorrect\b|\bactually\b|\bno,|\boops\b|\bsorry\b"
    r"|\bcorrection\b|\bhmm\b|\bnot (?:quite )?(?:correct|right)\b(?!-)",
    re.IGNORECASE,
)
CORRECTION = re.compile(
    r"\b(?:should (?:actually |really )?be|correct (?:value|number|total|amount|one) is|I mean|make that"
    r"|(?:no|actually|sorry|oops|correction|wait)[,:.!]?\s+(?:no,\s+)?(?:actually,?\s+)?(?:it's|it is|that's|that is))"
    r"\s*[:=]?\s*(?=[*_$\\(]{0,4}[-\u2212]?[$€£]?[\d\\])",
    re.IGNORECASE,
)
_COMPARES = re.compile(r",\s+which\s+(?:is|was|are)\b[^=,]{0,80}\b(?:times|twice|half|than|of)\b[^=,]{0,80}$")
_STATES = re.compile(r"(?:\b(?:is|are|was|were)|=)\s+[*$]{0,3}[$€£]?[-\u2212]?\d[\d.,/]*[*$]{0,3}(?:\s[a-z]+){0,2}$")
_NEEDS = re.compile(
    r"(\b(?:needs?|needed|takes?|took|requires?|required)\s+(?:(?:about|only|just|another|exactly)\s+)?"
    r"[*]{0,2}[$€£]?\d[\d,]*(?:\.\d+)?[*]{0,2}(?:\s[a-z]+){0,3})\s+to\s+[a-z]+\s[^=]*$"
)
_REMARKS = re.compile(
    r"[\s*_>-]*(?:note that\b|(?:this|that|these)\s+(?:is because|uses?|includes?|accounts? for|assumes?|covers?"
    r"|takes into|comes from|follows from|agrees with|matches)\b)"
    r"(?!.*(?:=|\b(?:so|thus|therefore|hence|leaves|leaving|total)\b))",
    re.IGNORECASE,
)
_BOLD_NUMBER = re.compile(r"\*\*[^*\n]{0,40}\d[^*\n]{0,40}\*\*")
_PARENTHESIS = re.compile(
    r"(?<=[\w%$*}])\s+\((?!\s*(?:or|mod)\b|\\|(?:sqrt|sin|cos|tan|log|ln|exp|pi)\b)"
    r"(?=[^()]*(?:[A-Za-z]{2}|\d\s*(?:[-+*/×·]|x\b|\\times|\\cdot)\s*\d))[^()]{1,200}\)(?=\s*[.!*]*\s*$)"
)


def without_checks(text: str) -> str:
    """Return a text without the paragraphs behind its answer that check or explain it.

    A paragraph that has second thoughts is kept, and so is all where nothing in front has a number. Of a text that
    begins with a line of nothing but an answer, and then is headed "Explanation", that line remains.
    """
    lone = _LONE_ANSWER.match(text)
    if lone is not None and _EXPLANATION.match(text, lone.end()) and not _TAKEN_BACK.search(text, lone.end()):
        return lone[0]
    paragraphs = re.split(r"(\n\s*\n|\n(?=[ \t*_#>-]*(?:Verification|Check)\b))", text)
    for _ in range(_MAX_PARAGRAPHS):
        if len(paragraphs) < 3:
            break
        last, before = paragraphs[-1], "".join(paragraphs[:-2])
        if last.strip() and not (_is_remark(last, before) and re.search(r"\d", before)):
            break
        paragraphs = paragraphs[:-2]
    return "".join(paragraphs)


def _is_remark(paragraph: str, before: str) -> bool:
    if DOUBT.search(paragraph) or _GOES_ON.search(paragraph):
        return False
    heading = before.rstrip().rpartition("\n")[2]
    if _HEADING.fullmatch(heading) and _CHECK.match(heading):
        return True
    if _CHECK.match(paragraph):
        return True
    return "**" in before.rstrip().rpartition("\n")[2] and "**" not in paragraph and bool(_EXPLAINS.match(paragraph))


def without_parenthesis(sentence: str) -> str:
    """Return a sentence without words or a calculation in parentheses behind its number: `18 (9 eggs at $2)`."""
    match = _PARENTHESIS.search(sentence)
    if match is None or not re.search(r"\d|\b[A-J]\**$", sentence[: match.start()]):
        return sentence
    return sentence[: match.start()] + sentence[match.end() :]


def without_comparison(sentence: str) -> str:
    """Return a sentence that states a number without what it then compares it with: `is 36, which is 3 times 12`."""
    match = _COMPARES.search(sentence)
    return sentence if match is None or not _STATES.search(sentence[: match.start()]) else sentence[: match.start()]


def without_purpose(sentence: str) -> str:
    """Return a sentence without what a number is needed for: `needs $5 more to buy the wallet of $100`."""
    match = _NEEDS.search(sentence)
    return sentence if match is None else sentence[: match.end(1)]


def without_remarks(sentences: list[str]) -> list[str]:
    """Return sentences without those at the end that explain an emphasised number in front of them.

    `She makes **18** dollars. This accounts for all 16 eggs.`
    """
    end = len(sentences)
    while end > 1 and _REMARKS.match(sentences[end - 1]) and not DOUBT.search(sentences[end - 1]):
        end -= 1
    is_behind = end < len(sentences) and _BOLD_NUMBER.search(sentences[end - 1])
    has_bold = any("**" in sentence for sentence in sentences[end:])
    return sentences[:end] if is_behind and not has_bold else sentences
