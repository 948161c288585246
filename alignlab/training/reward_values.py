"""Reading what a reward function returned: one finite number or None for each completion."""

from __future__ import annotations

import decimal
import math
import numbers
from collections.abc import Sequence
from typing import Any

from alignlab.training.reward_calls import RewardFailure

_CLIP = 200


def values_of(result: Any, count: int) -> list[Any]:
    """Return the result as a list of `count` values, each still to be read by `number_of`.

    A list or a tuple says None where the reward does not apply. A tensor, an array or a pandas Series, none of which
    can hold None among numbers, says NaN or NA there. Anything else is refused: a set or a dict has no order of the
    completions, and a generator would run outside of the call's time limit.

    Raises:
        RewardFailure: it is something else, or has another number of values.
    """
    holds_none = isinstance(result, list | tuple)
    values = result if holds_none or not hasattr(result, "tolist") else result.tolist()
    if not isinstance(values, list | tuple):
        raise RewardFailure(
            "not a list", f"must return a list, one value a completion, and returned {type(result).__name__}"
        )
    if len(values) != count:
        raise RewardFailure("wrong count", f"must return {count} values, one a completion, and returned {len(values)}")
    return list(values) if holds_none else [None if _is_missing(value) else value for value in values]


def _is_missing(value: Any) -> bool:
    """Return whether a value of an array stands for no value: NaN, or the NA of pandas."""
    return type(value).__name__ == "NAType" or (isinstance(value, float) and math.isnan(value))


def number_of(value: Any, sample: int) -> float | None:
    """Return one value as a float; None stays None.

    Raises:
        RewardFailure: it is no number, or not a finite one.
    """
    number = _plain_number(value)
    if number is None and value is not None:
        raise RewardFailure("not a number", f"returned {clipped(value)} ({type(value).__name__})", sample)
    if number is not None and not math.isfinite(number):
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
    except (RuntimeError, TypeError, ValueError):  # an array of several, a signalling NaN
        return None


def weighted_sum(weights: Sequence[float], values: Sequence[float | None]) -> float:
    """Return the weighted sum of the values that are not None; nan where all are None.

    Raises:
        OverflowError: the sum is beyond a float.
    """
    applying = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    total = math.fsum(applying) if applying else math.nan
    if applying and not math.isfinite(total):
        raise OverflowError
    return total


def clipped(value: Any) -> str:
    """Return how a value looks in a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= _CLIP else f"{text[:_CLIP]}..."
