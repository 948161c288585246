"""Remarks beside an answer: checks and explanations behind it, parentheses, second thoughts that take it back."""

from __future__ import annotations

import re

from alignlab_rewards.answers.markup import plain_notation

_MAX_PARAGRAPHS = 20  # at the end of a text, which are searched for remarks
# "Verification: ...", "Let's check", "This makes sense because ...".
_CHECK = re.compile(
    r"[\s*_#>-]*(?:verification|verify(?:ing)?|(?:quick |double[- ])?check(?:ing)?|sanity check|note|remark"
    r"|this (?:makes sense|is correct|is because|checks out)|(?:we|you) can (?:check|verify)|let's (?:check|verify)"
    r"|to (?:check|verify))\b",
    re.IGNORECASE,
)
_HEADING = re.compile(r"[\s*_#>-]*[A-Za-z -]{4,30}[\s*_:]*")
# A first line of nothing but an answer: "**42**", "$18.", "B. Paris".
_LONE_ANSWER = re.compile(
    r"\s*[*_`$(]{0,4}(?:[-+\u2212]?[$€£¥]?[-+\u2212]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?\s?%?"
    r"(?:\s[A-Za-z]{1,15}){0,2}|[A-J]|[A-J][).:]\s[^\n.:]{1,80}"
    r"|(?!solution|answer|explanation|reasoning|step)[A-Za-z]{2,20})[.!]?[*_`$)]{0,4}[.!]?[ \t]*\n",
    re.IGNORECASE,
)
_EXPLANATION_HEADING = re.compile(
    r"[\s*_#>-]*(?:(?:brief |short |detailed |step[- ]by[- ]step )?(?:explanation|reasoning|justification|rationale)\b"
    r"|here(?:'s| is) (?:why|how|the (?:reasoning|explanation))\b)",
    re.IGNORECASE,
)
# "Wait", "Actually": the explanation changes the answer.
_REVOKES = re.compile(r"\b(?:wait|actually|oops|sorry|correction|hmm|mistake)\b|\bno,", re.IGNORECASE)
# "So 18 - 3 = 15": the paragraph goes on to another result.
_CONTINUES = re.compile(r"\bbut\b|(?:^|[.!:\n]\s*)(?:So|Therefore|Thus|Hence)\b[^\n]*\d")
# "This is the number of eggs", but not "This is 3 * 4 = 12".
_EXPLAINS = re.compile(r"\s*(?:this|that) is\b(?![^\n]*(?:=|\bso\b|\bthus\b|\btherefore\b))", re.IGNORECASE)
# Second thoughts, whatever they lead to.
DOUBT = re.compile(
    r"\bwait\b|(?<!common )\b(?:error\b|mistake)|\bwrong\b|\bincorrect\b|\bactually\b|\bno,|\boops\b|\bsorry\b"
    r"|\bcorrection\b|\bhmm\b|\bnot (?:quite )?(?:correct|right)\b(?!-)",
    re.IGNORECASE,
)
# Words in front of a corrected answer: "it should be 73", "Sorry, it's 73".
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
# Words or a calculation behind a number: "18 (9 eggs at $2)", but not "f (x)" and "3 (mod 5)".
_PARENTHESIS = re.compile(
    r"(?<=[\w%$*}])\s+\((?!\s*(?:or|mod)\b|\\|(?:sqrt|sin|cos|tan|log|ln|exp|pi)\b)"
    r"(?=[^()]*(?:[A-Za-z]{2}|\d\s*(?:[-+*/×·]|x\b|\\times|\\cdot)\s*\d))[^()]{1,200}\)(?=\s*[.!*]*\s*$)"
)

# "10 (ten)".
_SPELLED = re.compile(r"(\d{1,2})\s*\(\s*([a-z]+(?:[- ][a-z]+)?)\s*\)", re.IGNORECASE)
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def without_spelling(text: str) -> str:
    """Return a number below 100 without the same number in words behind it: `10 (ten)`; other texts unchanged."""
    match = _SPELLED.fullmatch(plain_notation(text)) if len(text) <= 100 else None
    if match is None or match[2].casefold().replace(" ", "-") != _spelled(int(match[1])):
        return text
    return match[1]


def _spelled(number: int) -> str:
    if number < len(_SMALL):
        return _SMALL[number]
    tens, ones = _TENS[number // 10 - 2], number % 10
    return f"{tens}-{_SMALL[ones]}" if ones else tens


def without_checks(text: str) -> str:
    """Return a text without the paragraphs behind its answer that check or explain it.

    A paragraph with second thoughts stays, and so does one with no number in front of it. A text that begins with a
    line of nothing but an answer, followed by a heading "Explanation", is cut to that line.
    """
    lone = _LONE_ANSWER.match(text)
    if lone is not None and _EXPLANATION_HEADING.match(text, lone.end()) and not _REVOKES.search(text, lone.end()):
        return lone[0]
    paragraphs = re.split(r"(\n\s*\n|\n(?=[ \t*_#>-]*(?:Verification|Check)\b))", text)
    for _ in range(_MAX_PARAGRAPHS):
        if len(paragraphs) < 3:
            break
        last, before = paragraphs[-1], "".join(paragraphs[:-2])
        is_remark = _is_remark(last, before) and re.search(r"\d", before)
        if last.strip() and not is_remark:
            break
        paragraphs = paragraphs[:-2]
    return "".join(paragraphs)


def _is_remark(paragraph: str, before: str) -> bool:
    if DOUBT.search(paragraph) or _CONTINUES.search(paragraph):
        return False
    line = before.rstrip().rpartition("\n")[2]
    if _CHECK.match(paragraph) or (_HEADING.fullmatch(line) and _CHECK.match(line)):
        return True
    # "The answer is **5**." and below it "This is the number of ..."
    return "**" in line and "**" not in paragraph and bool(_EXPLAINS.match(paragraph))


def without_parenthesis(sentence: str) -> str:
    """Return a sentence without words or a calculation in parentheses behind its number: `18 (9 eggs at $2)`."""
    match = _PARENTHESIS.search(sentence)
    if match is None or not re.search(r"\d|\b[A-J]\**$", sentence[: match.start()]):
        return sentence
    return sentence[: match.start()] + sentence[match.end() :]


def without_comparison(sentence: str) -> str:
    """Return a sentence without a comparison behind its number: `The total is 36, which is 3 times 12`."""
    match = _COMPARES.search(sentence)
    if match is None or not _STATES.search(sentence[: match.start()]):
        return sentence
    return sentence[: match.start()]


def without_purpose(sentence: str) -> str:
    """Return a sentence without the purpose of its number: `She needs $5 more to buy the wallet of $100`."""
    match = _NEEDS.search(sentence)
    return sentence if match is None else sentence[: match.end(1)]


def without_remarks(sentences: list[str]) -> list[str]:
    """Return sentences without those that explain a bold number: `She makes **18** dollars. This uses all 16 eggs.`"""
    end = len(sentences)
    while end > 1 and _REMARKS.match(sentences[end - 1]) and not DOUBT.search(sentences[end - 1]):
        end -= 1
    remarks = sentences[end:]
    explain_number = remarks and _BOLD_NUMBER.search(sentences[end - 1])
    return sentences[:end] if explain_number and not any("**" in remark for remark in remarks) else sentences
