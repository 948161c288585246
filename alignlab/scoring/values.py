"""The values that a reward function returned, read as one finite number or None for each completion.

A returned object is code of the reward's author: a list may report a wrong length, a number may raise or hang when it
is converted. So a result is read in the function's place, within the time of the call.
"""

from __future__ import annotations

import decimal
import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignlab.scoring.calls import RewardFailure

_MAX_CHARS = 200
LARGEST_TOTAL = 1e18
"""Largest reward of a completion: differences of two such rewards, squared and summed, stay within float32."""


@dataclass(frozen=True)
class RewardValues:
    """The values of one call.

    Attributes:
        values: one a completion; None where the reward does not apply or the value could not be read.
        num_unreadable: values that could not be read.
        failure: the first of these values' failures.
    """

    values: list[float | None]
    num_unreadable: int = 0
    failure: RewardFailure | None = None


def read_values(result: Any, count: int) -> RewardValues:
    """Read a function's result.

    Raises:
        RewardFailure: the result is no list of `count` values. Any other error comes from the result's own code.
    """
    values: list[float | None] = []
    failures: list[RewardFailure] = []
    for sample, value in enumerate(as_list(result, count)):
        try:
            values.append(as_number(value, sample))
        except RewardFailure as error:
            values.append(None)
            failures.append(error)
    return RewardValues(values, len(failures), failures[0] if failures else None)


def as_list(result: Any, count: int) -> list[Any]:
    """Return the result as a list of `count` values, each still to be read by `as_number`.

    A list or a tuple uses None where the reward does not apply. A tensor, an array or a pandas Series, which cannot
    hold None among numbers, uses NaN or NA. Anything else is refused: a set or a dict has no order of the completions,
    and a generator need not end.

    Raises:
        RewardFailure: the result is of another type, or has another number of values.
    """
    holds_none = isinstance(result, list | tuple)
    sequence = result if holds_none or not hasattr(result, "tolist") else result.tolist()
    if not isinstance(sequence, list | tuple):
        raise RewardFailure(
            "not a list", f"must return a list, one value a completion, and returned {type(result).__name__}"
        )
    values = list(itertools.islice(iter(sequence), count + 1))  # the iterator of a subclass of list need not end
    if len(values) != count:
        has_true_length = type(sequence) in (list, tuple)
        returned = len(values) if len(values) < count else len(sequence) if has_true_length else "more"
        raise RewardFailure("wrong count", f"must return {count} values, one a completion, and returned {returned}")
    return values if holds_none else [None if _is_missing(value) else value for value in values]


def _is_missing(value: Any) -> bool:
    """Return whether a value of an array stands for no value: NaN, or the NA of pandas."""
    return type(value).__name__ == "NAType" or (isinstance(value, float) and math.isnan(value))


def as_number(value: Any, sample: int) -> float | None:
    """Return one value as a float; None stays None.

    Raises:
        RewardFailure: the value is no number, or not a finite one.
    """
    if value is None:
        return None
    number = _to_float(value)
    if number is None:
        raise RewardFailure("not a number", f"returned {clipped(value)} ({type(value).__name__})", sample)
    if not math.isfinite(number):
        hint = "; return None where the reward does not apply" if math.isnan(number) else ""
        raise RewardFailure("not finite", f"returned {clipped(value)}{hint}", sample)
    return number


def _to_float(value: Any) -> float | None:
    """Return the float of a Python, NumPy or torch number, a Decimal or a Fraction; None for anything else."""
    try:
        plain = value.item() if hasattr(value, "item") else value
        return float(plain) if isinstance(plain, numbers.Real | decimal.Decimal) else None
    except OverflowError:  # an integer or a fraction larger than any float
        return math.inf
    except Exception:  # an array of several numbers, a signalling NaN, or a class whose code raises
        return None


def weighted_sum(weights: Sequence[float], values: Sequence[float | None]) -> float:
    """Return the weighted sum of the values that are not None; nan where all are None.

    Raises:
        OverflowError: the sum, or one of its terms, is beyond `LARGEST_TOTAL`.
    """
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    if not terms:
        return math.nan
    if not all(abs(term) <= LARGEST_TOTAL for term in terms):
        raise OverflowError
    total = math.fsum(terms)
    if abs(total) > LARGEST_TOTAL:
        raise OverflowError
    return total


def clipped(value: Any) -> str:
    """Return a value's `repr` for a message, cut to a readable length; only the type where `repr` raises."""
    try:
        text = repr(value)
    except Exception:  # an integer of 5,000 digits, or a class whose code raises
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."
