r"""The places of a completion that may state the final answer, best first, whatever answer is expected.

The last `\boxed{}`, else the last `<answer>` tag, else the last line `#### 72`, else the last sentence "The answer is
...", else the last sentences, from the end. A correction behind such a place counts instead of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from alignlab_rewards.answers.blocks import block_answer, list_below
from alignlab_rewards.answers.boxes import boxed, end_of_boxes, hedged_box
from alignlab_rewards.answers.markup import plain_notation, without_markdown
from alignlab_rewards.answers.remarks import CORRECTION, DOUBT, without_checks, without_remarks, without_spelling
from alignlab_rewards.answers.sentences import MATH, NUMBER, SENTENCE_END, is_bound, phrase_readings, sentence_readings

MAX_TAIL = 20_000  # characters at the end of a completion that are searched for sentences and corrections
_MAX_SENTENCES = 12
_MAX_SENTENCE = 1000

_TAG = re.compile(r"<answer>(.{0,5000}?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"(?m)^[ \t]{0,8}####[ \t]{0,8}([^\n]{1,400})$")
_VALUE = re.compile(r"[*_`]{0,3}[-+−$€£¥\\(\[{.]?\s?[\d\\]")
_STATING = r"is|are|was|would be|should be|must be|will be|becomes|equals|comes out to be"
_BETWEEN = r"therefore|thus|then|simply|indeed|just|now|clearly|actually|given by|equal to|option|choice|letter"
_MARKS = r"\s*[*_`]{0,3}\s*"
# "The final answer is", "Result:", and a heading "Answer". Results that are not called final may be intermediate ones.
_ANCHOR = re.compile(
    r"\b(?P<sure>(?:(?:final|correct|right|my|numerical|exact)\s+)*)(?P<noun>answers?|results?|solutions?|option|choice)\b"
    r"(?:\s+(?:to|of|for)\s+(?:the|this|your)\s+\w+)?"
    rf"{_MARKS}(?:(?:{_STATING})\b(?:\s+(?:{_BETWEEN}))*|(?=[:=])){_MARKS}[:=]?[ \t]*[*_`]{{0,3}}"
    r"|(?m:^[ \t#*_>]{0,8}(?:final\s+)?answer[ \t]*[*_]{0,3}[ \t]*$)",
    re.IGNORECASE,
)
# A result in a later sentence: then "the result is 5" named an intermediate one.
_STATES_MORE = re.compile(r"\d|\*\*\w|\$[^$\n]+\$|\\[(\[]")
# "I do not think that" in front of "the answer is 5".
_DOUBTED = re.compile(r"(?:\bnot|n't|\bdoubt)\s+(?:think|believe|say|claim|sure|certain|that|if|whether|\s|the)*$")
# "The answer is correct" states no answer.
_NO_ANSWER = re.compile(
    r"^(?:helpful|correct|right|wrong|incorrect|clear|above|below|found|as follows|not\b|obtained|verified|confirmed"
    r"|consistent|reasonable|in the\b|the same\b|unique\b|useful|already)",
    re.IGNORECASE,
)
_CLOSING_REMARK = re.compile(
    r"(?:I hope|hope this|let me know|feel free|please let"
    r"|if you (?:have|need|want)|would you like|do you want|good luck|is there anything)\b",
    re.IGNORECASE,
)
# "It is minus 7", but not a difference such as "12 minus 7".
_SIGN_IN_WORDS = re.compile(
    r"(?:^|(?<=\bis )|(?<=\bwas )|(?<=\bbe )|(?<=\bequals )|(?<=: )|(?<=\*\*))(?:minus|negative) (?=[$€£]?\d)",
    re.IGNORECASE | re.MULTILINE,
)
# A sentence up to its number: "Janet makes 18 dollars".
_TWO_WORDS = re.compile(r"(?!.*\b(?:or|either)\b)[A-Za-z]{2,}(?: [A-Za-z']+)+ [$€£]?(?=\d)")


@dataclass(frozen=True)
class Statement:
    """A place in a completion that may state the answer.

    Attributes:
        texts: readings of the place, best first.
        prose: the texts are parts of sentences.
        decisive: no earlier place counts.
    """

    texts: tuple[str, ...]
    prose: bool
    decisive: bool


def statements(text: str) -> Iterator[Statement]:
    """Yield the places that may state the answer, best first; a decisive one is the last."""
    marked = boxed(text) or _tagged(text) or _after_hashes(text)
    if marked is not None:
        end = end_of_boxes(text) or max(text.rfind("####"), text.rfind("</answer>"))
        content = without_spelling(hedged_box(text) or boxed(marked) or marked)
        yield _correction(text[end:][-MAX_TAIL:]) or Statement(
            tuple(_marked_readings(content)), prose=False, decisive=True
        )
        return
    tail = _SIGN_IN_WORDS.sub("-", text[-MAX_TAIL:])
    yield from _anchored(tail)
    yield from _sentences(without_checks(tail))


def stated_answer(text: str) -> str | None:
    """Return the rest of the last sentence "The answer is ..." of a text; None where there is no such sentence."""
    return next((statement.texts[0] for statement in _anchored(text[-MAX_TAIL:])), None)


def _marked_readings(content: str) -> Iterator[str]:
    """Yield a box's or tag's content, then without a label, the answer that it states, and its only number."""
    yield content
    plain = plain_notation(content)
    label = re.match(r"[A-Za-z][A-Za-z ]{1,40}:\s*(?=\S)", plain)
    if label is not None:
        yield plain[label.end() :]
    stated = stated_answer(plain)
    if stated is not None:
        yield stated
    numbers = [*NUMBER.finditer(plain)]
    if len(numbers) == 1 and _TWO_WORDS.match(plain) and not is_bound(plain, numbers[0]):
        yield plain[numbers[0].start() :]


def _tagged(text: str) -> str | None:
    """Return the content of the last tag `<answer>`."""
    # `lower` copies a text; one of millions of characters is not worth a copy.
    start = text.lower().rfind("<answer>") if len(text) < 10**6 else text.rfind("<answer>")
    match = _TAG.match(text, start) if start >= 0 else None
    return match[1].strip() or None if match is not None else None


def _after_hashes(text: str) -> str | None:
    """Return the last line `#### 72`; a line `#### 3. Next step` is a heading."""
    lines = [match[1].strip() for match in _HASHES.finditer(text[-MAX_TAIL:])]
    values = [line for line in lines if _VALUE.match(line) and not re.match(r"\d+[.)]\s", line)]
    return values[-1] if values else None


def _anchored(text: str) -> Iterator[Statement]:
    """Yield the last sentence "the answer is"; else the last "the result is", if no other result follows."""
    anchors = [*_ANCHOR.finditer(text)][-_MAX_SENTENCES:]
    for anchor in sorted(reversed(anchors), key=_is_sure, reverse=True):
        phrase, end = _phrase(text, anchor)
        plain = without_markdown(phrase).strip()
        says_nothing = not re.search(r"\w|[\\∅∞π√]", plain) or _NO_ANSWER.match(plain)
        if says_nothing or _DOUBTED.search(text[max(0, anchor.start() - 80) : anchor.start()]):
            continue
        if _is_sure(anchor) or not _STATES_MORE.search(without_checks(text)[end:]):
            yield _correction(text[end:]) or _stated(phrase)
            return


def _is_sure(anchor: re.Match[str]) -> bool:
    return anchor["noun"] is None or anchor["noun"].casefold().startswith("answer") or bool(anchor["sure"])


def _stated(phrase: str) -> Statement:
    return Statement(tuple(phrase_readings(phrase)), prose=True, decisive=True)


def _correction(text: str) -> Statement | None:
    """Return what second thoughts behind an answer state instead of it; None where there are none."""
    doubt = DOUBT.search(text)
    if doubt is None:
        return None
    text = text[doubt.start() :]
    anchors = [*CORRECTION.finditer(text), *(match for match in _ANCHOR.finditer(text) if _is_sure(match))]
    for anchor in sorted(anchors, key=lambda match: match.start(), reverse=True)[:_MAX_SENTENCES]:
        phrase, _ = _phrase(text, anchor)
        if re.search(r"\d", phrase) and not _NO_ANSWER.match(phrase):
            return _stated(phrase)
    return None


def _phrase(text: str, anchor: re.Match[str]) -> tuple[str, int]:
    """Return the text behind an anchor, and where it ends: the sentence, the next line that is not empty, or a list."""
    behind = text[anchor.end() : anchor.end() + _MAX_SENTENCE]
    items, length = list_below(behind)
    if items:
        return block_answer(items), anchor.end() + length
    line = text[text.rfind("\n", 0, anchor.end()) + 1 : anchor.end()]
    if line.count("**") % 2 and "**" in behind.partition("\n")[0]:  # `**The answer is 5** because of 7.`
        behind = behind.partition("**")[0]
    phrase = _first_sentence(behind)
    return phrase, anchor.end() + max(0, behind.find(phrase)) + len(phrase)


def _first_sentence(text: str) -> str:
    """Return the sentence or displayed formula that a text begins with; where its first line is empty, the next."""
    formula = MATH.match(text.lstrip(" \t*_:\n"))
    if formula is not None and formula[0].startswith(("$$", "\\[")):
        return formula[0]
    text = text.lstrip(" \t*_`:")
    lines = [line for line in re.split(r"\n+", text) if re.search(r"\w|[^\s*_#>$-]", line)]
    # A line such as "in dollars:" announces the next one.
    first = next((line for line in lines if not line.rstrip(" *_").endswith(":")), lines[0] if lines else "")
    if text.startswith("\n"):
        first = re.sub(r"^\s*[-*•]\s+(?=\S)", "", first)
    return SENTENCE_END.split(first, maxsplit=1)[0]


def _sentences(text: str) -> Iterator[Statement]:
    """Yield the last sentences, from the end, without remarks behind the answer such as "I hope this helps!"."""
    sentences = [sentence for sentence in SENTENCE_END.split(text) if sentence and sentence.strip(" *_#`->|$\t")]
    sentences = [sentence for sentence in sentences if not _CLOSING_REMARK.match(sentence.lstrip(" *_>-"))]
    for sentence in reversed(without_remarks(sentences[-_MAX_SENTENCES:])):
        yield Statement(tuple(sentence_readings(sentence[-_MAX_SENTENCE:])), prose=True, decisive=False)
