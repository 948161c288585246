"""Answers compared as text: words, choices, yes and no."""

from __future__ import annotations

import re

from alignlab_rewards.answers.markup import plain_notation, words

_PURE_WORDS = re.compile(r"[^\W\d_][\w\s.,'&:;/()-]*")
_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:option|choice|answer|letter)\s+)?\(?([A-J])(?:\)|[.:](?=\s|$)|\s+-\s(?=\S)|$)\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    r"(?:so\s+|therefore,?\s+|thus,?\s+)?(?:option\s+|choice\s+|answer\s+)?\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b.*",
    re.DOTALL,
)
_CHOICE_LINE = re.compile(r"(?m)(?:^[ \t]*|\*\*)\(?([A-J])[.):][ \t]+(?=\S)")
_CALLED_RIGHT = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice)\s+\**\(?([A-J])\)?\**\s+is\s+(?:the\s+)?(?:correct\s+|right\s+)?(?:answer|correct|right)\b"
)
_OTHER_CHOICE = re.compile(r"\(?\b[A-J]\)|\bor\b|\band\s+\(?[A-J]\b")
_DENIES = re.compile(
    r"(?:is|was|cannot|can't|isn't|does)\b.*\b(?:not|n't|wrong|incorrect|false)\b"
    r"|(?:cannot|can't|isn't|doesn't)\b"
)
_VERDICTS = frozenset(("yes", "no", "true", "false"))
_LEADING = re.compile(
    r"(?:(?:so|therefore|thus|hence|answer|and|well)[,:]?\s+)?(yes|no|true|false)\b(?!\s*(?:/|,?\s(?:or|and|solutions?|one|two)\b))",
    re.IGNORECASE,
)
_BOTH_VERDICTS = re.compile(r"\W*(?:(?:yes|true)\s*,\s*(?:no|false)|(?:no|false)\s*,\s*(?:yes|true))\b", re.IGNORECASE)
_DENIED = re.compile(
    r"\b(?:not|cannot|never|neither|nor|doubts?|unlikely|nobody|no one|no-one|none|hardly|scarcely)\b|n't\b"
    r"|\b(?:anything|everything) but\s*$"
)
_WITHOUT_DOUBT = re.compile(r"\b(?:no|without(?: a| any)?|beyond(?: a| any)?) doubts?\b|\bnot only\b")
_IS_SUBJECT = re.compile(r" (?:is|was|are|were) (?!not\b|one of\b)(?=\w)(?!.*\b(?:wrong|incorrect|false)\b)")
_BUT_NOT = re.compile(r"(?:,\s?(?:and )?| (?:and|but) )not [^,;]{1,60}$")
_UNDECIDED = re.compile(
    r"(?:\b(?:or|not|nor|and|either|neither|never|than|isn't|aren't|wasn't|maybe|versus|vs)|[,/&])\s*$", re.IGNORECASE
)
_CHOOSES = re.compile(
    r"(?:\b(?:is|be|option|choice|answer|choose|chose|pick|select|with|letter|for|namely)|[:=])\s*\(?$", re.IGNORECASE
)
# "The winner is Alice, who beat Bob", "It is a Tuesday, the day after Monday": what is told of an answer behind it.
_ASIDE = re.compile(
    r"(?P<answer>\b(?:is|are|was|were) (?!not\b)(?:[^\s,;:]+ ){0,4}?[^\s,;:]+)"
    r"(?:(?P<clause>,(?:who|whom|whose|which) |[ ,](?:because|since|although|though|whereas|while|unlike) )"
    r"(?!.*[,;:].*\b(?:is|are|was|were)\b)"
    r"|,(?:the|an?) (?:[^\s,;:]+ ){1,3}?(?P<place>(?:after|before|of|from|behind|to|in|at|with|by|between) )"
    r"(?!.*\b(?:is|are|was|were)\b))"
    r"(?!.*\b(?:so|thus|therefore|hence|means?|implies|makes?|leaves?|leaving|but|must|answer)\b)"
)
_SAME_WORDS = {
    "does not exist": "dne",
    "doesn't exist": "dne",
    "no solutions": "no solution",
    "none of these": "none of the above",
}


def same_text(expected: str, given: str) -> bool:
    """Return True if two answers are the same text: exactly in plain notation, or without regard to case if words.

    A single letter keeps its case, unless it is a choice from A to J.
    """
    left, right = words(expected), words(given)
    if not left or not right:
        return False
    if left == right:
        return True
    if not (_PURE_WORDS.fullmatch(left) and _PURE_WORDS.fullmatch(right)):
        return False
    if len(left) == 1 and left.casefold() not in "abcdefghij":
        return False
    left, right = (re.sub(r"^(?:the|a|an) |\.", "", text.casefold()) for text in (left, right))
    return _SAME_WORDS.get(left, left) == _SAME_WORDS.get(right, right)


def choice_of(text: str) -> tuple[str, str] | None:
    """Return letter and content of a single choice: ("B", "") for `(B)`, ("B", "Paris") for `B. Paris`; or None."""
    plain = plain_notation(text).strip()
    if len(plain) > 300:
        return None
    right = _IS_RIGHT.fullmatch(plain)
    if right is not None:
        return right[1], ""
    match = _CHOICE.fullmatch(plain)
    if match is None or _OTHER_CHOICE.search(match[2]) or _DENIES.match(match[2]):
        return None
    if match[1].islower() and not plain.startswith("("):
        return None
    return match[1].upper(), match[2].strip(" .")


def only_choice(text: str) -> str | None:
    """Return the letter that a text calls right, or of the only line or emphasised part that is a choice."""
    right = _CALLED_RIGHT.findall(text)
    if right:
        return str(right[-1])
    letters = [match[1] for match in _CHOICE_LINE.finditer(text)]
    return letters[0] if len(letters) == 1 else None


def _spellings(text: str) -> list[str]:
    """An answer's words, and others that say the same."""
    wanted = words(text).casefold()
    same = _SAME_WORDS.get(wanted, wanted)
    return [wanted, same, *(other for other, meaning in _SAME_WORDS.items() if meaning == same)] if wanted else []


def are_letters(*texts: str) -> bool:
    """Return True if all texts are single words of two or more letters, which are no products of these."""
    return all(re.fullmatch(r"[^\W\d_]{2,}", words(text)) for text in texts)


def is_verdict(text: str) -> bool:
    """Return True for yes, no, true and false."""
    return words(text).casefold() in _VERDICTS


def leading_verdict(sentence: str) -> str | None:
    """Return the yes, no, true or false that a sentence begins with; None where it begins with something else."""
    plain = plain_notation(sentence)
    match = None if _BOTH_VERDICTS.match(plain) else _LEADING.match(plain)
    return match[1].casefold() if match is not None else None


def _split_end(expected: str, said: str) -> tuple[str, str]:
    """Return words cut before the expected ones at their end, which are empty where they are not there."""
    wanted = next((text for text in _spellings(expected) if said.endswith(text)), "")
    return said[: len(said) - len(wanted)], wanted


def ends_with_text(expected: str, sentence: str) -> bool:
    """Return True if a sentence ends with the expected words, and does not offer them beside others or deny them.

    A single letter counts only behind a word that chooses, as in "I choose B".
    """
    said = _BUT_NOT.sub("", words(sentence).casefold())
    subject = next((text for text in _spellings(expected) if said.startswith(text)), "")
    if len(subject) > 1 and _IS_SUBJECT.match(said, len(subject)):
        return True
    before, wanted = _split_end(expected, said)
    aside = _ASIDE.search(said)
    if aside is not None and len(before) >= max(aside.end("clause"), aside.end("place")):
        before, wanted = _split_end(expected, said[: aside.end("answer")])
    if not wanted:
        return False
    if before and (before[-1].isalnum() or before[-1] in "-+*/^_\\"):
        return False
    if len(wanted.strip("()")) == 1:
        return _DENIED.search(before[-40:]) is None and _CHOOSES.search(before) is not None
    clause = re.split(r"[,;:]|(?<!thing )\bbut\b|\. ", before)[-1]
    return _UNDECIDED.search(before) is None and _DENIED.search(_WITHOUT_DOUBT.sub("", clause)) is None
