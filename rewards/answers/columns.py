"""Expected answers in the columns of datasets: numbers of any type, gaps, lists, worked solutions."""

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
_LOGGED_GAPS: set[tuple[str, str]] = set()

# The last line of a worked solution in GSM8K.
_AFTER_HASHES = re.compile(r"(?:^|\n)[ \t]*####[ \t]*([^\n]*\S)\s*\Z")
_MAX_NUMBER_TEXT = 1000
_MAX_DIGITS = 4000  # of an expected number; Python itself writes out at most 4300
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
        whole: the whole text of the column; more than the answer in a worked solution.
        numeric: the column holds a number, which is compared by value.
        binary: the column holds a float, which is only as exact as its 53 bits.
        several: the column holds a list of several answers.
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
        value: the sample's entry in the column.
        reward: name of the reward, for messages.

    Raises:
        ValueError: if a value cannot be an answer.
    """
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        value = value.tolist()
    if isinstance(value, Mapping):
        return expected_answer(_ground_truth(value, reward), reward=reward)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _joined(list(value), reward)
    gap = _gap(value)
    if gap is not None:
        _log_once(reward, gap)
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
    """Return the kind of gap that a value is; None where it is an answer."""
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


def _log_once(reward: str, gap: str) -> None:
    if (reward, gap) in _LOGGED_GAPS:
        return
    _LOGGED_GAPS.add((reward, gap))
    # In a dataset of several tasks, None says that the reward does not apply; other gaps are faults of the data.
    level = logging.INFO if gap == "None" else logging.WARNING
    _LOG.log(level, "%s: a row's expected answer is %s; such samples get no value from this reward", reward, gap)


def _ground_truth(value: Mapping[Any, Any], reward: str) -> Any:
    if "ground_truth" not in value:
        raise ValueError(
            f"{reward} needs expected answers that are text or numbers, and a row holds a mapping with the keys "
            f"{sorted(map(str, value))}; give the answer itself, or put it under the key 'ground_truth'"
        )
    return value["ground_truth"]


def _joined(values: list[Any], reward: str) -> ExpectedAnswer | None:
    if not values:
        _log_once(reward, "an empty list")
        return None
    answers = [expected_answer(value, reward=reward) for value in values]
    if len(answers) == 1:
        return answers[0]
    if any(answer is None for answer in answers):
        raise ValueError(f"{reward} needs a whole expected answer, and a row holds {values!r:.100}, a list with a gap")
    text = ", ".join(answer.text for answer in answers if answer is not None)
    return ExpectedAnswer(text, text, several=True)


def _require_writable(value: Any, reward: str) -> None:
    """Raise if a number has too many digits to be written out."""
    digits = 0
    if isinstance(value, Decimal) and value.is_finite():
        digits = len(value.as_tuple().digits) + abs(int(value.as_tuple().exponent))
    elif isinstance(value, (Integral, Fraction)):
        bits = max(abs(term).bit_length() for term in (int(value.numerator), int(value.denominator)))
        digits = bits * 30103 // 100000 + 1
    if digits > _MAX_DIGITS:
        raise ValueError(
            f"{reward} needs expected numbers of at most {_MAX_DIGITS} digits, and a row's {type(value).__name__} "
            f"has about {digits}; write it as text, such as '10^{{5000}}'"
        )


def _number_text(value: Any) -> str | None:
    """Return a number without an exponent, 72.0 as "72"; None for any other value."""
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
    return Fraction(text) if len(text) <= _MAX_NUMBER_TEXT and _DIGITS.fullmatch(text) else None


def plain_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number, such as `-1,234.50`, `$18` or `72.`; None for anything else."""
    match = _PLAIN_NUMBER.fullmatch(text.strip().replace("\u2212", "-"))
    if match is None or len(text) > _MAX_NUMBER_TEXT:
        return None
    return Fraction((match[1] or match[2]) + match[3].replace(",", "").removesuffix("."))
