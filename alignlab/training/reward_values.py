"""Reading what a reward function returned: one finite number or None for each completion.

What a function returns is code of its author's too: a list may lie about its length, a number may raise or hang when it
is read. So a result is read where the function ran, within the time of the call.
"""

from __future__ import annotations

import decimal
import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignlab.training.reward_calls import RewardFailure

_CLIP = 200
LARGEST_TOTAL = 1e18
"""Of a completion's reward: the square of a difference of two, and sums of such squares, are float32 numbers."""


@dataclass(frozen=True)
class RewardValues:
    """One call's values.

    Attributes:
        values: of each completion; None where the reward does not apply or could not be read.
        num_unread: values that could not be read.
        failure: of the first of them.
    """

    values: list[float | None]
    num_unread: int = 0
    failure: RewardFailure | None = None


def read_values(result: Any, count: int) -> RewardValues:
    """Read a function's result.

    Raises:
        RewardFailure: it is no list of `count` values. What else its author's code raises comes through.
    """
    values: list[float | None] = []
    failures: list[RewardFailure] = []
    for sample, value in enumerate(values_of(result, count)):
        try:
            values.append(number_of(value, sample))
        except RewardFailure as error:
            values.append(None)
            failures.append(error)
    return RewardValues(values, len(failures), failures[0] if failures else None)


def values_of(result: Any, count: int) -> list[Any]:
    """Return the result as a list of `count` values, each still to be read by `number_of`.

    A list or a tuple says None where the reward does not apply. A tensor, an array or a pandas Series, none of which
    can hold None among numbers, says NaN or NA there. Anything else is refused: a set or a dict has no order of the
    completions, and a generator need not end.

    Raises:
        RewardFailure: it is something else, or has another number of values.
    """
    holds_none = isinstance(result, list | tuple)
    values = result if holds_none or not hasattr(result, "tolist") else result.tolist()
    if not isinstance(values, list | tuple):
        raise RewardFailure(
            "not a list", f"must return a list, one value a completion, and returned {type(result).__name__}"
        )
    read = list(itertools.islice(iter(values), count + 1))  # an iterator of a list's subclass need not end
    if len(read) != count:
        returned = len(read) if len(read) < count else len(values) if type(values) in (list, tuple) else "more"
        raise RewardFailure("wrong count", f"must return {count} values, one a completion, and returned {returned}")
    return read if holds_none else [None if _is_missing(value) else value for value in read]


def _is_missing(value: Any) -> bool:
    """Return whether a value of an array stands for no value: NaN, or the NA of pandas."""
    return type(value).__name__ == "NAType" or (isinstance(value, float) and math.isnan(value))


def number_of(value: Any, sample: int) -> float | None:
    """Return one value as a float; None stays None.

    Raises:
        RewardFailure: it is no number, or not a finite one.
    """
    if value is None:
        return None
    number = _plain_number(value)
    if number is None:
        raise RewardFailure("not a number", f"returned {clipped(value)} ({type(value).__name__})", sample)
    if not math.isfinite(number):
        hint = "; return None where the reward does not apply" if math.isnan(number) else ""
        raise RewardFailure("not finite", f"returned {clipped(value)}{hint}", sample)
    return number


def _plain_number(value: Any) -> float | None:
    """Return the float of a Python, NumPy or torch number, a Decimal or a Fraction; None for anything else."""
    try:
        plain = value.item() if hasattr(value, "item") else value
        return float(plain) if isinstance(plain, numbers.Real | decimal.Decimal) else None
    except OverflowError:  # an integer or a fraction beyond a float
        return math.inf
    except Exception:  # an array of several, a signalling NaN, or a class whose own code raises
        return None


def weighted_sum(weights: Sequence[float], values: Sequence[float | None]) -> float:
    """Return the weighted sum of the values that are not None; nan where all are None.

    Raises:
        OverflowError: the sum, or a part of it, is beyond `LARGEST_TOTAL`.
    """
    applying = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    if not applying:
        return math.nan
    if not all(abs(part) <= LARGEST_TOTAL for part in applying):
        raise OverflowError
    total = math.fsum(applying)
    if abs(total) > LARGEST_TOTAL:
        raise OverflowError
    return total


def clipped(value: Any) -> str:
    """Return how a value looks in a message, cut to a readable length; of one that cannot be shown, its type."""
    try:
        text = repr(value)
    except Exception:  # an integer of 5,000 digits, or a class whose own code raises
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _CLIP else f"{text[:_CLIP]}..."
