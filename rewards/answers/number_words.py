"""Numbers written in words: `twelve`, `twenty-five`, `one hundred and five`."""

from __future__ import annotations

import re

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: value for value, word in enumerate(_ONES)} | {word: 10 * (i + 2) for i, word in enumerate(_TENS)}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_WORD = rf"(?:{'|'.join(sorted((*_SMALL, 'hundred', *_LARGE), key=len, reverse=True))})"  # "nineteen" before "nine"
_NUMBER = re.compile(rf"({_WORD}(?:(?:[\s-]|\s?,\s?|\sand\s){_WORD}){{0,12}})\b", re.IGNORECASE)
_SIGN = re.compile(r"(?:minus|negative)\s", re.IGNORECASE)
# Words behind a number that make it another one, or one of several.
_OTHER = (
    r"of|or|and|to|than|that|which|the|more|less|fewer|times|point|squared|cubed|factorial|dozens?|score|half|halves"
    r"|quarters?|thirds?|(?:four|fif|six|seven|eigh|nin|ten|twelf|hundred|thousand|million)ths?|if|when|by|minus|plus|over"
)
_UNIT = re.compile(rf"(?:\s(?!(?:{_OTHER})\b)[A-Za-z]+){{0,2}}")


def in_digits_of_words(text: str) -> str | None:
    """Return a text that is a number in words, or one with its unit, with digits: `105 apples`; else None."""
    plain = text.strip(" .!*_\"'")
    sign = _SIGN.match(plain)
    match = _NUMBER.match(plain, sign.end() if sign else 0)
    if match is None or not _UNIT.fullmatch(plain, match.end()):
        return None
    value = _value(re.findall(_WORD, match[1].casefold()))
    return None if value is None else f"{'-' if sign else ''}{value}{plain[match.end() :]}"


def _value(words: list[str]) -> int | None:
    """Return the number that words say in this order; None where they are several numbers, as `two three`."""
    total = group = 0
    smallest = 10**12  # of the magnitudes so far: each has to be smaller than the one before
    last = 1000
    for word in words:
        if word in _LARGE:
            if not group or _LARGE[word] >= smallest:
                return None
            smallest = _LARGE[word]
            total, group, last = total + group * smallest, 0, 1000
        elif word == "hundred":
            if not 1 <= group <= 99 or last == 100:
                return None
            group, last = group * 100, 100
        else:
            value = _SMALL[word]
            fits = last == 1000 or last == 100 or (last >= 20 and value < 10 and value > 0)
            if not fits:
                return None
            group, last = group + value, value
    return total + group
