r"""The final answer in what a model wrote: texts that may be it, best first, without knowing what is expected.

In this order, the last of each kind: a `\boxed{}`, an `<answer>` tag, a line `#### 72`, a sentence that says so
("The answer is ..."), and else the last sentence that says something: its end, what it emphasises, its last number.
Second thoughts behind one of them count instead of it. A number that is only denied or bounded is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from alignlab_rewards.answers.blocks import block_answer, list_below
from alignlab_rewards.answers.boxes import boxed, end_of_boxes, hedged_box
from alignlab_rewards.answers.markup import plain_notation, without_markdown
from alignlab_rewards.answers.remarks import (
    CORRECTION,
    DOUBT,
    without_checks,
    without_comparison,
    without_parenthesis,
    without_purpose,
    without_remarks,
)

Thinking = Literal["auto", "required", "keep"]

# Where the reasoning of thinking models ends, as their templates write it.
_THINKING_ENDS = (
    "</think>", "</thinking>", "</thought>", "</reasoning>", "</seed:think>", "[/THINK]", "◁/think▷",
    "<|channel|>final<|message|>", "<|end_of_thought|>", "</thoughts>",
)  # fmt: skip
_THINKING_STARTS = re.compile(
    r"\A\s*(?:<think>|<thinking>|<thought>|<thoughts>|<reasoning>|<seed:think>|\[THINK\]|◁think▷|<\|channel\|>analysis|<\|begin_of_thought\|>)"
)
MAX_TAIL = 20_000  # characters from the end in which a sentence with the answer is looked for
_MAX_SENTENCES = 12
_MAX_SENTENCE = 1000

_TAG = re.compile(r"<answer>(.{0,5000}?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"(?m)^[ \t]{0,8}####[ \t]{0,8}([^\n]{1,400})$")
_STATING = r"is|are|was|would be|should be|must be|will be|becomes|equals|comes out to be"
_BETWEEN = r"therefore|thus|then|simply|indeed|just|now|clearly|actually|given by|equal to|option|choice|letter"
_MARKS = r"\s*[*_`]{0,3}\s*"
_ANCHOR = re.compile(
    r"\b(?P<sure>(?:(?:final|correct|right|my|numerical|exact)\s+)*)(?P<noun>answers?|results?|solutions?|option|choice)\b"
    r"(?:\s+(?:to|of|for)\s+(?:the|this|your)\s+\w+)?"
    rf"{_MARKS}(?:(?:{_STATING})\b(?:\s+(?:{_BETWEEN}))*|(?=[:=])){_MARKS}[:=]?[ \t]*[*_`]{{0,3}}"
    r"|(?m:^[ \t#*_>]{0,8}(?:final\s+)?answer[ \t]*[*_]{0,3}[ \t]*$)",
    re.IGNORECASE,
)
# A later sentence with a result of its own.
_STATES_MORE = re.compile(r"\d|\*\*\w|\$[^$\n]+\$|\\[(\[]")
_DOUBTED = re.compile(r"(?:\bnot|n't|\bdoubt)\s+(?:think|believe|say|claim|sure|certain|that|if|whether|\s|the)*$")
_NO_ANSWER = re.compile(
    r"^(?:helpful|correct|right|wrong|incorrect|clear|above|below|found|as follows|not\b|obtained|verified|confirmed"
    r"|consistent|reasonable|in the\b|the same\b|unique\b|useful|already)",
    re.IGNORECASE,
)
# "B. Paris" is one choice and no two sentences.
_ABBREVIATED = "".join(rf"(?<!\b{text}\.)" for text in ("[A-J]", "Mr", "Ms", "Dr", "St", "Mrs"))
_SENTENCE_END = re.compile(rf"(?<=[.!?]){_ABBREVIATED}[*_\"')]{{0,3}}\s+(?![-=<>+*/^\\])|\n+")
_CLAUSE_END = re.compile(
    r"[,;]\s(?!\s*(?:and|or)\b)|\s(?:because|since|which|so|where|when|as|for|if|but|with|after|by)\s|\s[-–—]+\s(?=[A-Za-z])|\s\((?=[a-z])"
)
_BOLD = re.compile(
    r"(?<![\w)*])\*\*(?=[^\s*])([^*\n]{1,300}?)(?<=\S)\*\*(?![\w(*])|(?<![\w`])`([^`\n]{1,200})`(?![\w`])|(?<!\w)__([^_\n]{1,200})__(?!\w)"
)
_MATH = re.compile(
    r"\$\$(.{1,1000}?)\$\$|(?<!\\)\\\[(.{1,1000}?)\\\]|(?<!\\)\\\((.{1,1000}?)\\\)|(?<![\\$\d])\$(?![\s$])([^$\n]{1,400}?)(?<![\s\\])\$(?![\d$])",
    re.DOTALL,
)
_STATES = re.compile(
    r"(?:\b(?:is|are|was|equals|gives|makes|leaves|yields|becomes|get|gets|have|has|total of)|[=:])\s*$", re.IGNORECASE
)
_NUMBER = (
    r"(?:(?<![\w.)\]}])[-+−]\s?)?[$€£¥₹]?(?<![\w.,])(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d+)?(?:\s?/\s?\d+(?![\w.]))?(?:\s?%)?"
)
_LAST_NUMBERS = re.compile(_NUMBER)
_PRICE_FIRST = re.compile(r"[$€£¥₹]\s?\d[\d,.]*[^,;=$€£¥₹]*[,;]\s[^$€£¥₹=]*[A-Za-z]{2}[^$€£¥₹=]*$")
_OUT_OF = re.compile(rf"({_NUMBER}(?:\s[a-z]+)?)\s+(?:out\s+of|of\s+the)\s+(?:the\s+)?(?=\d)")
_COULD_BE_EITHER = re.compile(r"\b(?:could|might|may)\b.*\bor\b.*\b(?:could|might|may)\b", re.IGNORECASE)
# A price, and behind it what it is paid for.
_PRICE = re.compile(r"[$€£¥₹]\s?\d[\d,]*(?:\.\d+)?")
_PAID_FOR = re.compile(r"(?:\s[a-z]+){0,6}\s(?:for|from|in|with|over|at|after|by)\b[^$€£¥₹=]*$")
_OPEN_HEDGE = re.compile(r"\((or\b[^()\n]{1,80})\)")
_HEDGED = re.compile(rf"{_NUMBER}\s*(?:or|/|and/or)\s*(?:maybe |possibly |even )?(?={_NUMBER})", re.IGNORECASE)
_START = re.compile(
    r"(?:(?<=\s)|(?<=\A)|(?<=[:=]))(?=[-+−±\\\d$€£¥₹(\[{√.|]|[A-Za-zα-ωπ](?![A-Za-z])"
    r"|(?:sqrt|pi|sin|cos|tan|log|ln|exp|arcsin|arccos|arctan|oo|infinity)(?![A-Za-z]))"
)
_CLOSING_REMARK = re.compile(
    r"(?:I hope|hope this|let me know|feel free|please let"
    r"|if you (?:have|need|want)|would you like|do you want|good luck|is there anything)\b",
    re.IGNORECASE,
)
# What stands before a number that is denied or only bounds the answer, and what stands behind such a bound.
_DENIED = re.compile(
    r"(?:\b(?:not|cannot|never|neither|nor|doubt)|n't)\s+(?:(?!but\b|only\b)[a-z]+\s+){0,5}$"
    r"|\b(?:anything but|other than|rather than|instead of|except)\s+$"
    r"|\b(?:(?:no\s+)?(?:less|more|fewer|greater|larger|smaller|bigger|higher|lower)\s+than(?:\s+or\s+equal\s+to)?"
    r"|at\s+least|at\s+most|up\s+to|exceeds|rule[sd]?\s+out|eliminated?)\s+$"
    r"|(?:^|\b(?:is|are|be|was|were|has|have)\s+)(?:over|under|above|below)\s+$"
    r"|(?:\\(?:leq?|geq?|neq?)(?:slant)?(?![A-Za-z])|(?<![-=])[<>≤≥≠]=?|!=)\s*$",
    re.IGNORECASE,
)
_OR_MORE = re.compile(
    r"\s*(?:[A-Za-z]+\s+)?(?:or|and)\s+(?:more|less|fewer|greater|larger|smaller|higher|lower|above|below|up)\b|\+(?!\s*[\w\\({])"
)
# "It is minus 7", and no difference such as "12 minus 7".
_SIGN_IN_WORDS = re.compile(
    r"(?:^|(?<=\bis )|(?<=\bwas )|(?<=\bbe )|(?<=\bequals )|(?<=: )|(?<=\*\*))(?:minus|negative) (?=[$€£]?\d)",
    re.IGNORECASE | re.MULTILINE,
)
_JOINED = re.compile(r"\s*(?:,|,?\s?(?:and|or))\s*")
# A sentence up to its number: "Janet makes 18 dollars".
_TWO_WORDS = re.compile(r"(?!.*\b(?:or|either)\b)[A-Za-z]{2,}(?: [A-Za-z']+)+ [$€£]?(?=\d)")
_ARTICLE = re.compile(r"^(?:[aAI]\s|[aAI]$)")


@dataclass(frozen=True)
class Statement:
    """One place in a completion that may say the answer.

    Attributes:
        texts: readings of the place, best first.
        prose: the texts are parts of sentences.
        decisive: nothing before this place counts.
    """

    texts: tuple[str, ...]
    prose: bool
    decisive: bool


def after_thinking(text: str, thinking: Thinking = "auto") -> str | None:
    """Return what follows a thinking model's reasoning; None where there is nothing that could be an answer.

    Args:
        text: a completion.
        thinking: "auto": what follows the last closing tag, nothing where an opening tag is never closed, else all.
            "required": what follows the last closing tag, and nothing where there is none, for templates that open the
            reasoning in the prompt. "keep": the whole, tags and reasoning included.
    """
    if thinking == "keep":
        return text
    end = max((text.rfind(tag) + len(tag) for tag in _THINKING_ENDS if tag in text), default=None)
    if end is not None:
        return text[end:]
    if thinking == "required" or _THINKING_STARTS.match(text):
        return None
    return text


def statements(text: str) -> Iterator[Statement]:
    """Yield the places that may say the answer, best first; a decisive one is the last."""
    marked = boxed(text) or _tagged(text) or _after_hashes(text)
    if marked is not None:
        end = end_of_boxes(text) or max(text.rfind("####"), text.rfind("</answer>"))
        corrected = _corrected(text[end:][-MAX_TAIL:])
        if corrected is not None:
            yield corrected
            return
        content = hedged_box(text) or boxed(marked) or marked
        yield Statement(tuple(_marked_readings(content)), prose=False, decisive=True)
        return
    tail = _SIGN_IN_WORDS.sub("-", text[-MAX_TAIL:])
    yield from _anchored(tail)
    yield from _sentences(without_checks(tail))


def stated_answer(text: str) -> str | None:
    """Return what a sentence "The answer is ..." of a text says; None where there is no such sentence."""
    return next((statement.texts[0] for statement in _anchored(text[-MAX_TAIL:])), None)


def _marked_readings(content: str) -> Iterator[str]:
    """A box's or tag's content, without a label in front, and what a sentence inside of it states."""
    yield content
    plain = plain_notation(content)
    label = re.match(r"[A-Za-z][A-Za-z ]{1,40}:\s*(?=\S)", plain)
    if label is not None:
        yield plain[label.end() :]
    stated = stated_answer(plain)
    if stated is not None:
        yield stated
    numbers = [*_LAST_NUMBERS.finditer(plain)]
    if len(numbers) == 1 and _TWO_WORDS.match(plain) and not _is_bound(plain, numbers[0]):
        yield plain[numbers[0].start() :]


def _tagged(text: str) -> str | None:
    start = text.lower().rfind("<answer>") if len(text) < 10**6 else text.rfind("<answer>")
    match = _TAG.match(text, start) if start >= 0 else None
    return match[1].strip() or None if match is not None else None


def _after_hashes(text: str) -> str | None:
    lines = [match[1].strip() for match in _HASHES.finditer(text[-MAX_TAIL:])]
    numbers = [
        line
        for line in lines
        if re.match(r"[*_`]{0,3}[-+−$€£¥\\(\[{.]?\s?[\d\\]", line) and not re.match(r"\d+[.)]\s", line)
    ]
    return numbers[-1] if numbers else None


def _anchored(text: str) -> Iterator[Statement]:
    """Yield what the last sentence says that names the answer; "the result is" counts where nothing follows it."""
    anchors = list(_ANCHOR.finditer(text))[-_MAX_SENTENCES:]
    for sure in (True, False):
        for anchor in reversed(anchors):
            if _is_sure(anchor) is not sure:
                continue
            phrase, end = _phrase(text, anchor)
            plain = without_markdown(phrase).strip()
            if not re.search(r"\w|[\\∅∞π√]", plain) or _NO_ANSWER.match(plain):
                continue
            if _DOUBTED.search(text[max(0, anchor.start() - 80) : anchor.start()]):
                continue
            if not sure and _STATES_MORE.search(without_checks(text)[end:]):
                continue
            yield _corrected(text[end:]) or Statement(tuple(_phrase_readings(phrase)), prose=True, decisive=True)
            return


def _is_sure(anchor: re.Match[str]) -> bool:
    return anchor["noun"] is None or anchor["noun"].casefold().startswith("answer") or bool(anchor["sure"])


def _corrected(rest: str) -> Statement | None:
    """Return what second thoughts behind an answer say instead of it; None where there are none."""
    doubt = DOUBT.search(rest)
    if doubt is None:
        return None
    rest = rest[doubt.start() :]
    marks = [*CORRECTION.finditer(rest), *(match for match in _ANCHOR.finditer(rest) if _is_sure(match))]
    for mark in sorted(marks, key=lambda match: match.start(), reverse=True)[:_MAX_SENTENCES]:
        phrase, _ = _phrase(rest, mark)
        if re.search(r"\d", phrase) and not _NO_ANSWER.match(phrase):
            return Statement(tuple(_phrase_readings(phrase)), prose=True, decisive=True)
    return None


def _phrase(text: str, anchor: re.Match[str]) -> tuple[str, int]:
    """Return what follows an anchor, and where it ends: the sentence, the next line that is not empty, or a list."""
    rest = text[anchor.end() : anchor.end() + _MAX_SENTENCE]
    items, length = list_below(rest)
    if items:
        return block_answer(items), anchor.end() + length
    line = text[text.rfind("\n", 0, anchor.end()) + 1 : anchor.end()]
    if line.count("**") % 2 and "**" in rest.partition("\n")[0]:  # the end of the emphasis that the anchor is in
        rest = rest.partition("**")[0]
    phrase = _first_sentence(rest)
    return phrase, anchor.end() + max(0, rest.find(phrase)) + len(phrase)


def _first_sentence(text: str) -> str:
    """The sentence that a text begins with; where its first line is empty, the next."""
    lines = [line for line in re.split(r"\n+", text.lstrip(" \t*_`:")) if re.search(r"\w|[^\s*_#>$-]", line)]
    first = next((line for line in lines if not line.rstrip(" *_").endswith(":")), lines[0] if lines else "")
    display = _MATH.match(text.lstrip(" \t*_:\n"))
    if display is not None and display[0].startswith(("$$", "\\[")):
        return display[0]
    if text.lstrip(" \t*_`:").startswith("\n"):
        first = re.sub(r"^\s*[-*•]\s+(?=\S)", "", first)
    return _SENTENCE_END.split(first, maxsplit=1)[0]


def _phrase_readings(phrase: str) -> Iterator[str]:
    """Readings of what follows "the answer is": all of it, its first clause, then as any sentence."""
    phrase = without_parenthesis(phrase)
    plain = _trimmed(phrase)
    yield from _ends_of_chains(plain)
    if _PRICE_FIRST.match(plain):
        yield _CLAUSE_END.split(plain, maxsplit=1)[0]
    yield plain
    if phrase.rstrip(" *_`").endswith("!"):  # a factorial, if one is expected
        yield plain + "!"
    clause = _CLAUSE_END.split(plain, maxsplit=1)[0]
    if clause != plain:
        yield clause
    count = _OUT_OF.match(plain)
    if count is not None:
        yield count[1]
    first_math = _MATH.match(plain)
    if first_math is not None:
        yield first_math[0]
    yield from _sentence_readings(phrase)


def _ends_of_chains(plain: str) -> Iterator[str]:
    """Yield the last of several equations: `16 - 7 = 9, so 9 * 2 = 18`."""
    parts = re.split(r",?\s+(?:and\s+)?(?:so|therefore|thus|hence)\s+", plain)
    if len(parts) > 1 and "=" in parts[0] and "=" in parts[-1]:
        yield parts[-1]


def _trimmed(text: str) -> str:
    """Without marks of emphasis and the end of the sentence."""
    plain = _OPEN_HEDGE.sub(r"\1", without_markdown(text).strip())
    return re.sub(r"[\s.]+$", "", re.sub(r"(?<=[^\s!])!+$", "", plain)).strip()


def _sentences(text: str) -> Iterator[Statement]:
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence and sentence.strip(" *_#`->|$\t")]
    sentences = [sentence for sentence in sentences if not _CLOSING_REMARK.match(sentence.lstrip(" *_>-"))]
    for sentence in reversed(without_remarks(sentences[-_MAX_SENTENCES:])):
        yield Statement(tuple(_sentence_readings(sentence[-_MAX_SENTENCE:])), prose=True, decisive=False)


def _sentence_readings(sentence: str) -> Iterator[str]:
    """The whole sentence, its only price, its emphasis, its longest end that could be mathematics, its last number."""
    sentence = without_purpose(without_comparison(without_parenthesis(sentence)))
    if _COULD_BE_EITHER.search(sentence):
        yield _trimmed(sentence)
        return
    plain = _trimmed(
        re.sub(r"^\s*(?:\d{1,2}[.)]|[-*+•])\s+(?=\S)", "", sentence)
        if not re.fullmatch(r"\s*\d+[.)]\s*", sentence)
        else sentence
    )
    yield plain
    prices = [*_PRICE.finditer(sentence)]
    if len(prices) == 1 and "**" not in sentence and _PAID_FOR.match(sentence, prices[0].end()):
        yield prices[0][0].rstrip(",")
    emphasised = [*_BOLD.finditer(sentence)] or [*_MATH.finditer(sentence)]
    if emphasised and _DENIED.search(sentence[: emphasised[-1].start()]):
        emphasised = []
    if emphasised and not _stated_later(sentence[emphasised[-1].end() :]):
        if len(emphasised) > 1 and _JOINED.fullmatch(sentence[emphasised[-2].end() : emphasised[-1].start()]):
            yield _trimmed(_joined(sentence, emphasised))
        yield _trimmed(next(group for group in emphasised[-1].groups() if group is not None))
    yield from _ends(plain)
    hedge = [match for match in _HEDGED.finditer(plain)]
    numbers = [*_LAST_NUMBERS.finditer(plain)]
    numbers = [number for number in numbers if not _is_bound(plain, number)]
    if numbers:
        last = numbers[-1]
        if hedge and hedge[-1].end() == last.start():
            yield plain[hedge[-1].start() : last.end()]
        yield last[0]


def _is_bound(plain: str, number: re.Match[str]) -> bool:
    """Return True for a number that is denied, or of which more or less is said to be: "at least 5", "5 or more"."""
    return bool(_DENIED.search(plain[: number.start()]) or _OR_MORE.match(plain, number.end()))


def _joined(sentence: str, emphasised: list[re.Match[str]]) -> str:
    """The last formulas of a sentence with the words between them: `$x = 2$ and $x = 4$`."""
    first = len(emphasised) - 1
    while first and _JOINED.fullmatch(sentence[emphasised[first - 1].end() : emphasised[first].start()]):
        first -= 1
    return sentence[emphasised[first].start() : emphasised[-1].end()]


def _stated_later(rest: str) -> bool:
    """True where a number is stated behind the emphasis: `**12** less **7** is 5`."""
    numbers = [*_LAST_NUMBERS.finditer(rest)]
    return bool(numbers) and _STATES.search(rest[: numbers[-1].start()]) is not None


def _ends(plain: str) -> Iterator[str]:
    """Ends of a sentence that begin where mathematics could begin, the longest first."""
    starts = [match.start() for match in _START.finditer(plain[-300:])]
    offset = max(0, len(plain) - 300)
    for start in starts[-40:]:
        end = plain[offset + start :].strip()
        if not _ARTICLE.match(end) and not _DENIED.search(plain[: offset + start]):
            yield end
