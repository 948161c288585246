"""Comparison of answers as text: words, choices, yes and no."""

from __future__ import annotations

import re
from typing import NamedTuple

from alignlab_rewards.answers.markup import plain_notation, words

_PURE_WORDS = re.compile(r"[^\W\d_][\w\s.,'&:;/()-]*")
# "(B)", "B. Paris", "Option B: Paris".
_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:option|choice|answer|letter)\s+)?\(?([A-J])(?:\)|[.:](?=\s|$)|\s+-\s(?=\S)|$)\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
# "B is correct because ...".
_LETTER_IS_RIGHT = re.compile(
    r"(?:so\s+|therefore,?\s+|thus,?\s+)?(?:option\s+|choice\s+|answer\s+)?\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b.*",
    re.DOTALL,
)
# A line or emphasised part that begins with "B." or "(B)".
_CHOICE_LINE = re.compile(r"(?m)(?:^[ \t]*|\*\*)\(?([A-J])[.):][ \t]+(?=\S)")
# "Option B is the correct answer" inside a text.
_CALLED_RIGHT = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice)\s+\**\(?([A-J])\)?\**\s+is\s+(?:the\s+)?(?:correct\s+|right\s+)?(?:answer|correct|right)\b"
)
# The content of a choice names another one: "A or B", "(A) and (C)".
_OTHER_CHOICE = re.compile(r"\(?\b[A-J]\)|\bor\b|\band\s+\(?[A-J]\b")
# "B. is not the capital" denies the choice.
_DENIES = re.compile(
    r"(?:is|was|cannot|can't|isn't|does)\b.*\b(?:not|n't|wrong|incorrect|false)\b"
    r"|(?:cannot|can't|isn't|doesn't)\b"
)
_VERDICTS = frozenset(("yes", "no", "true", "false"))
# "Yes, because ...", but not "yes or no" and "no solution".
_LEADING_VERDICT = re.compile(
    r"(?:(?:so|therefore|thus|hence|answer|and|well)[,:]?\s+)?(yes|no|true|false)\b(?!\s*(?:/|,?\s(?:or|and|solutions?|one|two)\b))",
    re.IGNORECASE,
)
_BOTH_VERDICTS = re.compile(r"\W*(?:(?:yes|true)\s*,\s*(?:no|false)|(?:no|false)\s*,\s*(?:yes|true))\b", re.IGNORECASE)
# In front of the expected words: "It is not", "It is anything but".
_DENIED = re.compile(
    r"\b(?:not|cannot|never|neither|nor|doubts?|unlikely|nobody|no one|no-one|none|hardly|scarcely)\b|n't\b"
    r"|\b(?:anything|everything) but\s*$"
)
_WITHOUT_DOUBT = re.compile(r"\b(?:no|without(?: a| any)?|beyond(?: a| any)?) doubts?\b|\bnot only\b")
# Behind the expected words: "Alice is the winner", but not "Alice is not" and "Alice is wrong".
_IS_SUBJECT = re.compile(r" (?:is|was|are|were) (?!not\b|one of\b)(?=\w)(?!.*\b(?:wrong|incorrect|false)\b)")
# "It is Monday, not Tuesday": the last words are no answer.
_BUT_NOT = re.compile(r"(?:,\s?(?:and )?| (?:and|but) )not [^,;]{1,60}$")
# In front of the expected words: "Monday or", "neither Monday nor", "rather than".
_UNDECIDED = re.compile(
    r"(?:\b(?:or|not|nor|and|either|neither|never|than|isn't|aren't|wasn't|maybe|versus|vs)|[,/&])\s*$", re.IGNORECASE
)
# In front of a single letter: "The answer is", "I choose".
_CHOOSES = re.compile(
    r"(?:\b(?:is|be|option|choice|answer|choose|chose|pick|select|with|letter|for|namely)|[:=])\s*\(?$", re.IGNORECASE
)
# "The winner is Alice, who beat Bob", "It is a Tuesday, the day after Monday": words behind an answer that describe it.
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


class Choice(NamedTuple):
    """An option of a question: ("B", "") for `(B)`, ("B", "Paris") for `B. Paris`."""

    letter: str
    content: str


def same_text(expected: str, answer: str) -> bool:
    """Return True if two answers are the same text: exactly in plain notation, or without regard to case if words.

    A single letter keeps its case, unless it is a choice from A to J.
    """
    expected, answer = words(expected), words(answer)
    if not expected or not answer:
        return False
    if expected == answer:
        return True
    if not (_PURE_WORDS.fullmatch(expected) and _PURE_WORDS.fullmatch(answer)):
        return False
    if len(expected) == 1 and expected.casefold() not in "abcdefghij":
        return False
    expected, answer = (re.sub(r"^(?:the|a|an) |\.", "", text.casefold()) for text in (expected, answer))
    return _SAME_WORDS.get(expected, expected) == _SAME_WORDS.get(answer, answer)


def choice_of(text: str) -> Choice | None:
    """Return the one choice that a text is; None where it is something else, or offers or denies several."""
    plain = plain_notation(text).strip()
    if len(plain) > 300:
        return None
    called_right = _LETTER_IS_RIGHT.fullmatch(plain)
    if called_right is not None:
        return Choice(called_right[1], "")
    match = _CHOICE.fullmatch(plain)
    if match is None or _OTHER_CHOICE.search(match[2]) or _DENIES.match(match[2]):
        return None
    if match[1].islower() and not plain.startswith("("):  # "(b)" is a choice, and "a: 5" names a value
        return None
    return Choice(match[1].upper(), match[2].strip(" ."))


def only_choice(text: str) -> str | None:
    """Return the letter that a text calls right last, or the letter of its only line or emphasised part with one."""
    called_right = _CALLED_RIGHT.findall(text)
    if called_right:
        return str(called_right[-1])
    letters = [match[1] for match in _CHOICE_LINE.finditer(text)]
    return letters[0] if len(letters) == 1 else None


def _spellings(text: str) -> list[str]:
    """Return an answer's words and others that say the same; none for an empty answer."""
    spelling = words(text).casefold()
    short = _SAME_WORDS.get(spelling, spelling)
    synonyms = (synonym for synonym, meaning in _SAME_WORDS.items() if meaning == short)
    return [spelling, short, *synonyms] if spelling else []


def are_letters(*texts: str) -> bool:
    """Return True if each text is a single word of two or more letters."""
    return all(re.fullmatch(r"[^\W\d_]{2,}", words(text)) for text in texts)


def is_verdict(text: str) -> bool:
    """Return True for yes, no, true and false."""
    return words(text).casefold() in _VERDICTS


def leading_verdict(sentence: str) -> str | None:
    """Return the yes, no, true or false at the beginning of a sentence; None where it begins with something else."""
    plain = plain_notation(sentence)
    match = None if _BOTH_VERDICTS.match(plain) else _LEADING_VERDICT.match(plain)
    return match[1].casefold() if match is not None else None


def ends_with_text(expected: str, sentence: str) -> bool:
    """Return True if a sentence ends with the expected words, and does not offer them beside others or deny them.

    A single letter counts only behind a word that chooses, as in "I choose B". Words at the beginning count as the
    subject of a sentence: "Alice is the winner".
    """
    sentence, spellings = _BUT_NOT.sub("", words(sentence).casefold()), _spellings(expected)
    subject = next((text for text in spellings if sentence.startswith(text)), "")
    if len(subject) > 1 and _IS_SUBJECT.match(sentence, len(subject)):
        return True
    before, ending = _split_end(sentence, spellings)
    aside = _ASIDE.search(sentence)
    if aside is not None and len(before) >= max(aside.end("clause"), aside.end("place")):
        before, ending = _split_end(sentence[: aside.end("answer")], spellings)
    return bool(ending) and _are_stated(ending, before)


def _split_end(sentence: str, spellings: list[str]) -> tuple[str, str]:
    """Cut the expected words off the end of a sentence; they are empty where the sentence ends with others."""
    ending = next((text for text in spellings if sentence.endswith(text)), "")
    return sentence[: len(sentence) - len(ending)], ending


def _are_stated(ending: str, before: str) -> bool:
    """Return True if the words before an ending leave it a word of its own, and neither deny nor doubt it."""
    if before and (before[-1].isalnum() or before[-1] in "-+*/^_\\"):
        return False
    if len(ending.strip("()")) == 1:
        return _DENIED.search(before[-40:]) is None and _CHOOSES.search(before) is not None
    clause = re.split(r"[,;:]|(?<!thing )\bbut\b|\. ", before)[-1]
    return _UNDECIDED.search(before) is None and _DENIED.search(_WITHOUT_DOUBT.sub("", clause)) is None
