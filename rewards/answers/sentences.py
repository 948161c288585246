"""Readings of a sentence: the texts in it that may be the answer, best first."""

from __future__ import annotations

import re
from collections.abc import Iterator

from alignlab_rewards.answers.markup import without_markdown
from alignlab_rewards.answers.remarks import without_comparison, without_parenthesis, without_purpose

# "B. Paris" and "Mr. Smith" do not end a sentence at their point.
_ABBREVIATED = "".join(rf"(?<!\b{text}\.)" for text in ("[A-J]", "Mr", "Ms", "Dr", "St", "Mrs"))
SENTENCE_END = re.compile(rf"(?<=[.!?]){_ABBREVIATED}[*_\"')]{{0,3}}\s+(?![-=<>+*/^\\])|\n+")
_CLAUSE_END = re.compile(
    r"[,;]\s(?!\s*(?:and|or)\b)|\s(?:because|since|which|so|where|when|as|for|if|but|with|after|by)\s|\s[-–—]+\s(?=[A-Za-z])|\s\((?=[a-z])"
)
_BOLD = re.compile(
    r"(?<![\w)*])\*\*(?=[^\s*])([^*\n]{1,300}?)(?<=\S)\*\*(?![\w(*])|(?<![\w`])`([^`\n]{1,200})`(?![\w`])|(?<!\w)__([^_\n]{1,200})__(?!\w)"
)
MATH = re.compile(
    r"\$\$(.{1,1000}?)\$\$|(?<!\\)\\\[(.{1,1000}?)\\\]|(?<!\\)\\\((.{1,1000}?)\\\)|(?<![\\$\d])\$(?![\s$])([^$\n]{1,400}?)(?<![\s\\])\$(?![\d$])",
    re.DOTALL,
)
_BEFORE_RESULT = re.compile(
    r"(?:\b(?:is|are|was|equals|gives|makes|leaves|yields|becomes|get|gets|have|has|total of)|[=:])\s*$", re.IGNORECASE
)
_NUMBER = (
    r"(?:(?<![\w.)\]}])[-+−]\s?)?[$€£¥₹]?(?<![\w.,])(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d+)?(?:\s?/\s?\d+(?![\w.]))?(?:\s?%)?"
)
NUMBER = re.compile(_NUMBER)
# "$18 in all, with 3 eggs left": no other price follows.
_PRICE_FIRST = re.compile(r"[$€£¥₹]\s?\d[\d,.]*[^,;=$€£¥₹]*[,;]\s[^$€£¥₹=]*[A-Za-z]{2}[^$€£¥₹=]*$")
# "3 out of 5", "3 of the 5".
_OUT_OF = re.compile(rf"({_NUMBER}(?:\s[a-z]+)?)\s+(?:out\s+of|of\s+the)\s+(?:the\s+)?(?=\d)")
_COULD_BE_EITHER = re.compile(r"\b(?:could|might|may)\b.*\bor\b.*\b(?:could|might|may)\b", re.IGNORECASE)
# "$5 for 3 apples": a price, and behind it the goods.
_PRICE = re.compile(r"[$€£¥₹]\s?\d[\d,]*(?:\.\d+)?")
_PAID_FOR = re.compile(r"(?:\s[a-z]+){0,6}\s(?:for|from|in|with|over|at|after|by)\b[^$€£¥₹=]*$")
# "12 (or 13)" is read as "12 or 13".
_OPEN_HEDGE = re.compile(r"\((or\b[^()\n]{1,80})\)")
_HEDGED = re.compile(rf"{_NUMBER}\s*(?:or|/|and/or)\s*(?:maybe |possibly |even )?(?={_NUMBER})", re.IGNORECASE)
_MATH_START = re.compile(
    r"(?:(?<=\s)|(?<=\A)|(?<=[:=]))(?=[-+−±\\\d$€£¥₹(\[\]{√.|]|[A-Za-zα-ωπ](?![A-Za-z])"
    r"|(?:sqrt|pi|sin|cos|tan|log|ln|exp|arcsin|arccos|arctan|oo|infinity)(?![A-Za-z]))"
)
# In front of a number that is denied or only bounds the answer ("not 5", "at least 5"), and behind one ("5 or more").
_DENIED = re.compile(
    r"(?:\b(?:not|cannot|never|neither|nor|doubt)|n't)\s+(?:(?!but\b|only\b)[a-z]+\s+){0,5}$"
    r"|\b(?:(?:any|every)thing but|any [a-z]+ but|other than|rather than|instead of|except)\s+$"
    r"|\bnone\s+of\s+(?:the\s+)?(?:(?:options?|choices?|answers?)\s+)?$"
    r"|\b(?:(?:no\s+)?(?:less|more|fewer|greater|larger|smaller|bigger|higher|lower)\s+than(?:\s+or\s+equal\s+to)?"
    r"|at\s+least|at\s+most|up\s+to|exceeds|rule[sd]?\s+out|eliminated?)\s+$"
    r"|(?:^|\b(?:is|are|be|was|were|has|have)\s+)(?:over|under|above|below)\s+$"
    r"|(?:\\(?:leq?|geq?|neq?)(?:slant)?(?![A-Za-z])|(?<![-=])[<>≤≥≠]=?|!=)\s*$",
    re.IGNORECASE,
)
_OR_MORE = re.compile(
    r"\s*(?:[A-Za-z]+\s+)?(?:or|and)\s+(?:more|less|fewer|greater|larger|smaller|higher|lower|above|below|up)\b|\+(?!\s*[\w\\({])"
)
_JOINER = re.compile(r"\s*(?:,|,?\s?(?:and|or))\s*")
_ARTICLE = re.compile(r"^(?:[aAI]\s|[aAI]$)")
_ONLY_LIST_NUMBER = re.compile(r"\s*\d+[.)]\s*")
_LIST_MARK = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*+•])\s+(?=\S)")
_MAX_END, _MAX_ENDS = 300, 40


def phrase_readings(phrase: str) -> Iterator[str]:
    """Yield readings of the words behind "the answer is": all of them, their first clause, then as any sentence."""
    phrase = without_parenthesis(phrase)
    plain = _trimmed(phrase)
    clause = _CLAUSE_END.split(plain, maxsplit=1)[0]
    yield from _ends_of_chains(plain)
    if _PRICE_FIRST.match(plain):
        yield clause
    yield plain
    if phrase.rstrip(" *_`").endswith("!"):  # a factorial, if one is expected
        yield plain + "!"
    if clause != plain:
        yield clause
    count = _OUT_OF.match(plain)
    if count is not None:
        yield count[1]
    formula = MATH.match(plain)
    if formula is not None:
        yield formula[0]
    yield from sentence_readings(phrase)


def sentence_readings(sentence: str) -> Iterator[str]:
    """Yield the whole sentence, its only price, its emphasis, its ends that could be mathematics, its last number."""
    sentence = without_purpose(without_comparison(without_parenthesis(sentence)))
    if _COULD_BE_EITHER.search(sentence):
        yield _trimmed(sentence)
        return
    plain = _trimmed(sentence if _ONLY_LIST_NUMBER.fullmatch(sentence) else _LIST_MARK.sub("", sentence))
    yield plain
    yield from _only_price(sentence)
    yield from _emphasis(sentence)
    yield from _ends(plain)
    yield from _last_number(plain)


def is_bound(plain: str, number: re.Match[str]) -> bool:
    """Return True for a number that is denied or only bounds the answer: "not 5", "at least 5", "5 or more"."""
    return bool(_DENIED.search(plain[: number.start()]) or _OR_MORE.match(plain, number.end()))


def _trimmed(text: str) -> str:
    """Return a text without marks of emphasis and the end of the sentence."""
    plain = _OPEN_HEDGE.sub(r"\1", without_markdown(text).strip())
    return re.sub(r"[\s.]+$", "", re.sub(r"(?<=[^\s!])!+$", "", plain)).strip()


def _ends_of_chains(plain: str) -> Iterator[str]:
    """Yield the last of several equations: `16 - 7 = 9, so 9 * 2 = 18`."""
    equations = re.split(r",?\s+(?:and\s+)?(?:so|therefore|thus|hence)\s+", plain)
    if len(equations) > 1 and "=" in equations[0] and "=" in equations[-1]:
        yield equations[-1]


def _only_price(sentence: str) -> Iterator[str]:
    """Yield $18 of "She makes $18 in 3 days": the number behind the price is not the answer."""
    prices = [*_PRICE.finditer(sentence)]
    if len(prices) == 1 and "**" not in sentence and _PAID_FOR.match(sentence, prices[0].end()):
        yield prices[0][0].rstrip(",")


def _emphasis(sentence: str) -> Iterator[str]:
    """Yield the last emphasised parts with the words that join them, then the last alone; formulas if none is bold."""
    spans = [*_BOLD.finditer(sentence)] or [*MATH.finditer(sentence)]
    if not spans or _DENIED.search(sentence[: spans[-1].start()]) or _states_result(sentence[spans[-1].end() :]):
        return
    first = len(spans) - 1
    while first and _JOINER.fullmatch(sentence[spans[first - 1].end() : spans[first].start()]):
        first -= 1
    if first < len(spans) - 1:  # `$x = 2$ and $x = 4$`
        yield _trimmed(sentence[spans[first].start() : spans[-1].end()])
    yield _trimmed(next(group for group in spans[-1].groups() if group is not None))


def _states_result(text: str) -> bool:
    """Return True if a text behind an emphasis states a number of its own: "is 5" in `**12** less **7** is 5`."""
    numbers = [*NUMBER.finditer(text)]
    return bool(numbers) and _BEFORE_RESULT.search(text[: numbers[-1].start()]) is not None


def _ends(plain: str) -> Iterator[str]:
    """Yield the ends of a sentence that begin where mathematics could begin, the longest first."""
    offset = max(0, len(plain) - _MAX_END)
    starts = [offset + match.start() for match in _MATH_START.finditer(plain[-_MAX_END:])]
    for start in starts[-_MAX_ENDS:]:
        end = plain[start:].strip()
        if not _ARTICLE.match(end) and not _DENIED.search(plain[:start]):
            yield end


def _last_number(plain: str) -> Iterator[str]:
    """Yield the last number that is no bound; in front of it, both numbers of "11 or 12"."""
    numbers = [number for number in NUMBER.finditer(plain) if not is_bound(plain, number)]
    if not numbers:
        return
    offers = [*_HEDGED.finditer(plain)]
    if offers and offers[-1].end() == numbers[-1].start():
        yield plain[offers[-1].start() : numbers[-1].end()]
    yield numbers[-1][0]
