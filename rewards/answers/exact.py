"""Exact powers and roots of fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

MAX_BITS = 65536  # 2024! has 19,000


class NoValue(ArithmeticError):
    """Raised for an expression without a value: one that is undefined, unknown, or too large to be computed."""


def bits(value: Fraction) -> int:
    """Return the size of the larger of numerator and denominator."""
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def exact_power(base: Fraction, exponent: int) -> Fraction | None:
    """Return the power; None where it would have more than `MAX_BITS` bits."""
    if base == 0:
        return power_of_zero(exponent)
    if base in (1, -1):
        return base if exponent % 2 else Fraction(1)
    return base**exponent if (bits(base) - 1) * abs(exponent) <= MAX_BITS else None


def power_of_zero(exponent: Any) -> Fraction:
    """Return 0. Raises NoValue for an exponent that is not positive."""
    if exponent <= 0:
        raise NoValue("a power of zero")
    return Fraction(0)


def exact_root(value: Fraction, degree: int) -> Fraction | None:
    """Return the root of a fraction of two powers of the degree; None for other numbers."""
    if value < 0:
        return None
    top, bottom = _whole_root(value.numerator, degree), _whole_root(value.denominator, degree)
    return None if top is None or bottom is None else Fraction(top, bottom)


def _whole_root(number: int, n: int) -> int | None:
    """Return the whole n-th root of a number that is a power of n, by Newton's method; None for other numbers."""
    if number < 2:
        return number
    root = 1 << -(-number.bit_length() // n)
    while True:
        better = ((n - 1) * root + number // root ** (n - 1)) // n
        if better >= root:
            return root if root**n == number else None
        root = better
