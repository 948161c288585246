"""Equality of numbers too large to be written out, by their remainders modulo large primes."""

from __future__ import annotations

import functools
import zlib
from fractions import Fraction

from alignlab_rewards.answers.evaluation import Evaluator, NoValue
from alignlab_rewards.answers.expressions import Node

# Primes without a short form: a power of 2 or 10 has no short period modulo them.
_PRIMES = (1208925819614639051249299, 1237940039285380286010235313, 170141183460469231731687303731563117979)

_MAX_FACTORIAL = 20_000  # of which the product is computed


def same_residues(left: Node, right: Node) -> bool:
    """Return True if two expressions have the same remainder by every prime.

    Names and functions stand for any numbers, the same ones wherever the same is written.
    """
    try:
        return all(_residue(left, prime) == _residue(right, prime) for prime in _PRIMES)
    except (NoValue, ValueError):
        return False


def _residue(node: Node, prime: int) -> int:
    if node.op == "number" and isinstance(node.value, Fraction):
        return _quotient(node.value.numerator, node.value.denominator, prime)
    exponent = _whole(node.args[-1]) if node.op in ("^", "!", "factorial") else None
    if node.op == "^" and exponent is not None:
        return pow(_residue(node.args[0], prime), exponent, prime)
    if node.op in ("!", "factorial") and exponent is not None and 0 <= exponent <= _MAX_FACTORIAL:
        return _factorial(exponent, prime)
    if node.op not in ("+", "*", "/", "-"):
        return zlib.crc32(repr(node).encode()) ** 5 % prime
    values = [_residue(argument, prime) for argument in node.args]
    if node.op == "+":
        return sum(values) % prime
    if node.op == "-":
        return -values[0] % prime
    if node.op == "*":
        return values[0] * values[1] % prime
    return _quotient(values[0], values[1], prime)


def _whole(node: Node) -> int | None:
    """Return the value of an expression that is a whole number; None for any other."""
    try:
        value = Evaluator(50).value(node)
    except NoValue:
        return None
    return int(value) if isinstance(value, Fraction) and value.denominator == 1 else None




def _quotient(top: int, bottom: int, prime: int) -> int:
    return top * pow(bottom, -1, prime) % prime


@functools.lru_cache(maxsize=64)
def _factorial(number: int, prime: int) -> int:
    product = 1
    for factor in range(2, number + 1):
        product = product * factor % prime
    return product
