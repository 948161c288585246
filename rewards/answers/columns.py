"""Expected answers as data sets hold them: numbers of any type, gaps, lists, worked solutions."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

_LOG = logging.getLogger(__name__)
_SAID: set[tuple[str, str]] = set()

# The last line of a solution in GSM8K's form.
_AFTER_HASHES = re.compile(r"(?:^|\n)[ \t]*####[ \t]*([^\n]*\S)\s*\Z")
_MAX_NUMBER = 1000
_MAX_DIGITS = 4000  # of an expected number; Python itself writes no more than 4300
_DIGITS = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")
_PLAIN_NUMBER = re.compile(
    r"([+-]?)\\?[$€£]?([+-]?)([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
)
_GAPS_AS_TEXT = frozenset({"None", "nan", "NaN", "<NA>", "NaT"})


@dataclass(frozen=True)
class ExpectedAnswer:
    """An expected answer as text.

    Attributes:
        text: the answer alone.
        whole: the whole text of the column, which differs where it is a worked solution.
        numeric: the column held a number, so that it is compared by value.
        binary: the column held a binary fraction, which is only as exact as its 53 bits.
        several: the column held a list of several answers.
    """

    text: str
    whole: str
    numeric: bool = False
    binary: bool = False
    several: bool = False


def expected_answer(value: Any, *, reward: str) -> ExpectedAnswer | None:
    """Return the expected answer of one sample, or None where the column holds no answer.

    None, NaN and an empty text are no answer: the log says so once. Numbers of any type are written out, 72.0 as 72.
    A text whose last line is `#### 72`, as in GSM8K, is the 72. A list of several answers is written `1, 2`; a mapping
    is read at its key `ground_truth`.

    Args:
        value: what the column holds for the sample.
        reward: name of the reward, for messages.

    Raises:
        ValueError: for a value that cannot be an answer.
    """
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        value = value.tolist()
    if isinstance(value, Mapping):
        return expected_answer(_ground_truth(value, reward), reward=reward)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _several(list(value), reward)
    gap = _gap(value)
    if gap is not None:
        _say_once(reward, gap)
        return None
    if isinstance(value, str):
        solution = _AFTER_HASHES.search(value)
        return ExpectedAnswer(solution[1].strip() if solution else value.strip(), value.strip())
    _require_writable(value, reward)
    text = _number_text(value)
    if text is None:
        raise ValueError(
            f"{reward} needs expected answers that are text or numbers, and a row holds {value!r:.100} "
            f"({type(value).__name__}); write the answer as text, or leave it None where there is none"
        )
    return ExpectedAnswer(text, text, numeric=not isinstance(value, bool), binary=isinstance(value, float))


def _gap(value: Any) -> str | None:
    """Name the kind of missing answer that a value is; None where it is an answer."""
    if value is None:
        return "None"
    if type(value).__name__ in ("NAType", "NaTType"):
        return "missing"
    if isinstance(value, str):
        text = value.strip()
        return "empty" if not text else f"the text {text}" if text in _GAPS_AS_TEXT else None
    if isinstance(value, Decimal):
        return "NaN" if value.is_nan() else None
    return "NaN" if isinstance(value, float) and math.isnan(value) else None


def _say_once(reward: str, gap: str) -> None:
    if (reward, gap) in _SAID:
        return
    _SAID.add((reward, gap))
    # None is how a data set of several tasks says that a reward does not apply; the others are gaps in the data.
    level = logging.INFO if gap == "None" else logging.WARNING
    _LOG.log(level, "%s: a row's expected answer is %s; such samples get no value from this reward", reward, gap)


def _ground_truth(value: Mapping[Any, Any], reward: str) -> Any:
    if "ground_truth" not in value:
        raise ValueError(
            f"{reward} needs expected answers that are text or numbers, and a row holds a mapping with the keys "
            f"{sorted(map(str, value))}; give the answer itself, or put it under the key 'ground_truth'"
        )
    return value["ground_truth"]


def _several(values: list[Any], reward: str) -> ExpectedAnswer | None:
    if not values:
        _say_once(reward, "an empty list")
        return None
    parts = [expected_answer(value, reward=reward) for value in values]
    if len(parts) == 1:
        return parts[0]
    if any(part is None for part in parts):
        raise ValueError(f"{reward} needs a whole expected answer, and a row holds {values!r:.100}, a list with a gap")
    text = ", ".join(part.text for part in parts if part is not None)
    return ExpectedAnswer(text, text, several=True)


def _require_writable(value: Any, reward: str) -> None:
    """Raise ValueError for a number that has too many digits to be written out."""
    digits = 0
    if isinstance(value, Decimal) and value.is_finite():
        digits = len(value.as_tuple().digits) + abs(int(value.as_tuple().exponent))
    elif isinstance(value, (Integral, Fraction)):
        bits = max(abs(part).bit_length() for part in (int(value.numerator), int(value.denominator)))
        digits = bits * 30103 // 100000 + 1
    if digits > _MAX_DIGITS:
        raise ValueError(
            f"{reward} needs expected numbers of at most {_MAX_DIGITS} digits, and a row's {type(value).__name__} "
            f"has about {digits}; write it as text, such as '10^{{5000}}'"
        )


def _number_text(value: Any) -> str | None:
    """Write a number without an exponent or a useless point; None for what is no number."""
    if isinstance(value, (bool, Integral)):
        return str(value if isinstance(value, bool) else int(value))
    if isinstance(value, Fraction):
        return str(value)
    if not isinstance(value, (Real, Decimal)):
        return None
    number = value if isinstance(value, Decimal) else Decimal(repr(float(value)))
    if number.is_infinite():
        return "infinity" if number > 0 else "-infinity"
    return str(int(number)) if number == int(number) else format(number, "f")


def in_digits(text: str) -> Fraction | None:
    """Return the value of a text that is digits, perhaps with a sign and a point; None for anything else."""
    return Fraction(text) if len(text) <= _MAX_NUMBER and _DIGITS.fullmatch(text) else None


def plain_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number, such as `-1,234.50`, `$18` or `72.`; None for anything else."""
    match = _PLAIN_NUMBER.fullmatch(text.strip().replace("\u2212", "-"))
    if match is None or len(text) > _MAX_NUMBER:
        return None
    return Fraction((match[1] or match[2]) + match[3].replace(",", "").removesuffix("."))
