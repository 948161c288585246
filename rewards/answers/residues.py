"""Equality of numbers too large to be written out, by their remainders modulo large primes."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from fractions import Fraction

from alignlab_rewards.answers.evaluation import Evaluator
from alignlab_rewards.answers.exact import NoValue
from alignlab_rewards.answers.expressions import Node

# Primes without a short form: a power of 2 or 10 has no short period modulo them.
_PRIMES = (1208925819614639051249299, 1237940039285380286010235313, 170141183460469231731687303731563117979)

_MAX_FACTORIAL = 20_000  # the largest whose product is computed


def same_residues(first: Node, second: Node) -> bool:
    """Return True if two expressions have the same remainder modulo every prime.

    A name or a function stands for an arbitrary number, the same one wherever it is written the same.
    """
    try:
        return all(_residue(first, prime) == _residue(second, prime) for prime in _PRIMES)
    except (NoValue, ValueError):
        return False


def _residue(node: Node, prime: int) -> int:
    if node.op == "number" and isinstance(node.value, Fraction):
        return _quotient(node.value.numerator, node.value.denominator, prime)
    if node.op in _OPERATIONS:
        return _OPERATIONS[node.op]([_residue(argument, prime) for argument in node.args], prime)
    residue = _large_residue(node, prime)
    # A name or a function stands for a number that depends on its writing alone.
    return zlib.crc32(repr(node).encode()) ** 5 % prime if residue is None else residue


def _large_residue(node: Node, prime: int) -> int | None:
    """Return the remainder of a power with a whole exponent or a factorial; None for any other expression."""
    exponent = _whole(node.args[-1]) if node.op in ("^", "!", "factorial") else None
    if exponent is None:
        return None
    if node.op == "^":
        return pow(_residue(node.args[0], prime), exponent, prime)
    return _factorial(exponent, prime) if 0 <= exponent <= _MAX_FACTORIAL else None


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


_OPERATIONS: dict[str, Callable[[list[int], int], int]] = {
    "+": lambda values, prime: sum(values) % prime,
    "-": lambda values, prime: -values[0] % prime,
    "*": lambda values, prime: values[0] * values[1] % prime,
    "/": lambda values, prime: _quotient(values[0], values[1], prime),
}
