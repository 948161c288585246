"""Values of expressions: exact fractions where possible, else many digits, and never a computation without a bound.

A number is exact while it has at most `MAX_BITS` bits; beyond that, and for irrational values, it is a complex number
of mpmath with the precision asked for. Magnitudes are limited before anything is computed: `10^{10^{10}}` has no value.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath
from alignlab_rewards.answers.expressions import Node

MAX_BITS = 65536  # 2024! has 19,000
MAX_EXPONENT_BITS = 2**30  # of an inexact number: its size may be 2 to the power of this
MAX_ARGUMENT_BITS = 300  # of what sine, exponential and the like are computed of
MAX_FACTORIAL = 10**6

_LOCAL = threading.local()

Value = Fraction | Any  # Any: mpmath's complex numbers


class NoValue(ArithmeticError):
    """An expression has no value: it is undefined, unknown, or too large to be computed."""


class Evaluator:
    """Computes trees at given values of their symbols.

    Args:
        digits: decimal digits of inexact numbers.
        symbols: values of the symbols; `e`, `i` and `pi` are constants unless given.
        decimal_log: read `log` without a base as the one of base 10, not the natural one.
        real: refuse whatever is only defined over the complex numbers, such as the root of a negative number.
    """

    def __init__(
        self, digits: int, symbols: Mapping[str, Value] | None = None, *, decimal_log: bool = False, real: bool = False
    ) -> None:
        self.context = _context(digits)
        self.symbols = symbols or {}
        self.decimal_log = decimal_log
        self.real = real
        self.lossy = False  # a part was lost that no number of digits would have shown

    def value(self, node: Node) -> Value:
        """Return the value of a tree, a Fraction where it is exact. Raises NoValue where there is none."""
        try:
            value = self._of(node)
        except (ZeroDivisionError, OverflowError, ValueError, TypeError, mpmath.libmp.NoConvergence) as error:
            raise NoValue(str(error)) from error
        if not isinstance(value, Fraction) and self.context.isnan(value):
            raise NoValue("not a number")
        return value

    def inexact(self, value: Value) -> Any:
        """Return a value as one of mpmath's complex numbers."""
        if not isinstance(value, Fraction):
            return value
        return self.context.mpc(self.context.mpf(value.numerator) / value.denominator)

    def _rounded(self, value: Value) -> Any:
        """Return a value of limited precision for an exact one that is too large."""
        self.lossy = True
        return self.inexact(value)

    def _of(self, node: Node) -> Value:
        if node.op == "number":
            assert isinstance(node.value, Fraction)
            return node.value
        if node.op == "symbol":
            return self._symbol(str(node.value))
        if node.op == "infinity":
            return self.context.mpc(self.context.inf)
        values = [self._of(argument) for argument in node.args]
        if node.op == "unknown":
            return self._unknown(str(node.value), values[0])
        operation = _OPERATIONS.get(node.op)
        if operation is None:
            raise NoValue(f"unknown operation {node.op}")
        value = operation(self, *values)
        return self._bounded(value)

    def _bounded(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            return value if _bits(value) <= MAX_BITS else self._rounded(value)
        value = self.context.mpc(value)
        if (
            self.real
            and value.imag != 0
            and abs(value.imag) > abs(value.real) * self.context.mpf(10) ** (5 - self.context.dps)
        ):
            raise NoValue("not real")
        return value

    def _symbol(self, name: str) -> Value:
        if name in self.symbols:
            return self.symbols[name]
        if name == "e":
            return self.context.mpc(self.context.e)
        if name == "pi":
            return self.context.mpc(self.context.pi)
        if name == "i":
            return self.context.mpc(0, 1)
        raise NoValue(f"the symbol {name}")

    def _unknown(self, name: str, argument: Value) -> Value:
        """A function that the text only names: any fixed function that no other expression equals by chance."""
        seed = Fraction(zlib.crc32(name.encode()) % 9973 + 17, 3511)
        return self.context.sin(self._argument(argument) * self.inexact(seed)) + self.inexact(seed)

    def _argument(self, value: Value) -> Any:
        """Return a value that a function can be computed of in bounded time."""
        number = self.inexact(value)
        if self.context.isinf(number):
            raise NoValue("a function of infinity")
        if number != 0 and self.context.mag(number) > MAX_ARGUMENT_BITS:
            raise NoValue("too large an argument")
        return number

    def add(self, *values: Value) -> Value:
        """Return the sum."""
        if all(isinstance(value, Fraction) for value in values):
            total = Fraction(0)
            for value in values:
                total += value
                if _bits(total) > MAX_BITS:
                    break
            else:
                return total
        numbers = [self.inexact(value) for value in values]
        self.lossy = self.lossy or self._absorbs(numbers)
        return sum(numbers, self.context.mpc(0))

    def _absorbs(self, numbers: list[Any]) -> bool:
        """Return True if one of the numbers is too large for the smallest to be seen in their sum."""
        sizes = [self.context.mag(number) for number in numbers if number != 0 and not self.context.isinf(number)]
        largest = max(sizes, default=0)
        return largest > self.context.prec / 2 and largest - min(sizes) > self.context.prec - 10

    def multiply(self, left: Value, right: Value) -> Value:
        """Return the product."""
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left * right
        return self.inexact(left) * self.inexact(right)

    def divide(self, left: Value, right: Value) -> Value:
        """Return the quotient."""
        if right == 0:
            raise NoValue("division by zero")
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left / right
        return self.inexact(left) / self.inexact(right)

    def power(self, base: Value, exponent: Value) -> Value:
        """Return the power; a negative base with an odd root in the exponent has the real one."""
        if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
            if base in (0, 1, -1):
                return self._unit_power(base, int(exponent))
            if (_bits(base) - 1) * abs(int(exponent)) <= MAX_BITS:
                return base ** int(exponent)
            self.lossy = True
        if (
            isinstance(exponent, Fraction)
            and exponent.denominator % 2
            and exponent.denominator > 1
            and _is_negative(self, base)
        ):
            root = self.root(base, Fraction(exponent.denominator))
            return self.power(root, Fraction(exponent.numerator))
        number, power = self.inexact(base), self.inexact(exponent)
        if self.context.isinf(number) or self.context.isinf(power):
            raise NoValue("a power of infinity")
        if number == 0:
            if power.real <= 0:
                raise NoValue("a power of zero")
            return Fraction(0)
        if (
            self.context.mag(power) + self.context.mag(abs(self.context.log(abs(number))) + 1)
            > MAX_EXPONENT_BITS.bit_length()
        ):
            raise NoValue("too large a power")
        return number**power

    def _unit_power(self, base: Fraction, exponent: int) -> Fraction:
        if base == 0:
            if exponent <= 0:
                raise NoValue("a power of zero")
            return base
        return base if exponent % 2 else Fraction(1)

    def root(self, value: Value, index: Value) -> Value:
        """Return the root; exact where it is, and real for odd roots of negative numbers."""
        if not isinstance(index, Fraction) or index.denominator != 1 or not 1 <= index <= 10**6:
            return self.power(value, self.divide(Fraction(1), index))
        n = int(index)
        if _is_negative(self, value) and n % 2:
            return self.multiply(Fraction(-1), self.root(self.multiply(Fraction(-1), value), index))
        if isinstance(value, Fraction) and value >= 0 and n <= 64:
            top, bottom = _whole_root(value.numerator, n), _whole_root(value.denominator, n)
            if top is not None and bottom is not None:
                return Fraction(top, bottom)
        return self.power(self.inexact(value), Fraction(1, n))

    def factorial(self, value: Value) -> Value:
        """Return the factorial: exact to some thousands, then by Stirling's series."""
        if isinstance(value, Fraction):
            if value.denominator == 1 and 0 <= value <= 3000:
                return Fraction(math.factorial(int(value)))
            if value.denominator == 1 and value < 0:
                raise NoValue("the factorial of a negative number")
            self.lossy = self.lossy or value.denominator == 1
        number = self.inexact(value)
        if self.context.isinf(number) or abs(number) > MAX_FACTORIAL:
            raise NoValue("too large a factorial")
        return self.context.factorial(number)

    def binomial(self, n: Value, k: Value) -> Value:
        """Return the binomial coefficient."""
        whole = isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1
        if whole and 0 <= n <= 3000:
            return Fraction(math.comb(int(n), int(k))) if k >= 0 else Fraction(0)
        return self.divide(
            self.factorial(n),
            self.multiply(self.factorial(k), self.factorial(self.add(n, self.multiply(Fraction(-1), k)))),
        )

    def logarithm(self, value: Value, base: Value | None = None) -> Value:
        """Return the logarithm: natural, or of base 10 if `decimal_log`, or of the given base."""
        number = self.inexact(value)
        if number == 0 or self.context.isinf(number):
            raise NoValue("a logarithm of zero or infinity")
        if base is None:
            return self.context.log(number) / (self.context.log(10) if self.decimal_log else 1)
        other = self.inexact(base)
        if other in (0, 1):
            raise NoValue("a logarithm without a base")
        return self.context.log(number) / self.context.log(other)

    def absolute(self, value: Value) -> Value:
        """Return the absolute value."""
        return abs(value) if isinstance(value, Fraction) else abs(self.inexact(value))

    def whole(self, kind: str, value: Value) -> Value:
        """Return the floor or the ceiling."""
        if isinstance(value, Fraction):
            return Fraction(math.floor(value) if kind == "floor" else math.ceil(value))
        number = self._argument(value)
        return self.context.floor(number.real) if kind == "floor" else self.context.ceil(number.real)

    def extreme(self, largest: bool, *values: Value) -> Value:
        """Return the largest or the smallest of real numbers."""
        if not all(isinstance(value, Fraction) or value.imag == 0 for value in values):
            raise NoValue("an order of complex numbers")
        key: Callable[[Value], Any] = lambda value: self.inexact(value).real  # noqa: E731
        return max(values, key=key) if largest else min(values, key=key)

    def divisors(self, lcm: bool, *values: Value) -> Value:
        """Return the greatest common divisor or the least common multiple of whole numbers."""
        if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
            raise NoValue("a divisor of what is no whole number")
        whole = [int(value) for value in values]
        return Fraction(math.lcm(*whole) if lcm and len(whole) < 20 else math.gcd(*whole))

    def function(self, name: str, value: Value) -> Value:
        """Return one of mpmath's functions of an argument of limited size."""
        if isinstance(value, Fraction) and value == 0:
            exact = {"sin": 0, "cos": 1, "tan": 0, "sinh": 0, "cosh": 1, "exp": 1}.get(name)
            if exact is not None:
                return Fraction(exact)
        number = self._argument(value)
        if name in ("exp", "sinh", "cosh", "tanh", "coth") and abs(number.real) > 10**9:
            raise NoValue("too large an exponential")
        if abs(number.imag) > 10**4 and name not in ("re", "im", "arg", "sign"):
            raise NoValue("too large an argument")
        return getattr(self.context, name)(number)


def _context(digits: int) -> Any:
    """Return this thread's mpmath of a precision: mpmath changes its context while it computes."""
    contexts = _LOCAL.__dict__.setdefault("contexts", {})
    if digits not in contexts:
        contexts[digits] = mpmath.MPContext()
        contexts[digits].dps = digits
    return contexts[digits]


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _is_negative(evaluator: Evaluator, value: Value) -> bool:
    if isinstance(value, Fraction):
        return value < 0
    return bool(value.imag == 0 and value.real < 0)


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


def _reciprocal(name: str) -> Callable[[Evaluator, Value], Value]:
    return lambda evaluator, value: evaluator.divide(Fraction(1), evaluator.function(name, value))


def _common_log(base: int) -> Callable[[Evaluator, Value], Value]:
    return lambda evaluator, value: evaluator.logarithm(value, Fraction(base))


_OPERATIONS: dict[str, Callable[..., Value]] = {
    "+": Evaluator.add,
    "*": Evaluator.multiply,
    "/": Evaluator.divide,
    "-": lambda evaluator, value: evaluator.multiply(Fraction(-1), value),
    "^": Evaluator.power,
    "!": Evaluator.factorial,
    "factorial": Evaluator.factorial,
    "root": Evaluator.root,
    "cbrt": lambda evaluator, value: evaluator.root(value, Fraction(3)),
    "abs": Evaluator.absolute,
    "binomial": Evaluator.binomial,
    "log": Evaluator.logarithm,
    "ln": lambda evaluator, value: (
        evaluator.inexact(evaluator.context.log(evaluator.inexact(value))) if value != 0 else _undefined()
    ),
    "lg": _common_log(10),
    "floor": lambda evaluator, value: evaluator.whole("floor", value),
    "ceil": lambda evaluator, value: evaluator.whole("ceil", value),
    "ceiling": lambda evaluator, value: evaluator.whole("ceil", value),
    "max": lambda evaluator, *values: evaluator.extreme(True, *values),
    "min": lambda evaluator, *values: evaluator.extreme(False, *values),
    "gcd": lambda evaluator, *values: evaluator.divisors(False, *values),
    "lcm": lambda evaluator, *values: evaluator.divisors(True, *values),
    "based": lambda evaluator, value, base: _in_base(value, base),
    "csc": _reciprocal("sin"),
    "sec": _reciprocal("cos"),
}


def _undefined() -> Value:
    raise NoValue("a logarithm of zero")


def _in_base(value: Value, base: Value) -> Value:
    if not isinstance(base, Fraction) or base.denominator != 1 or not 2 <= base <= 36:
        raise NoValue("no base of a number")
    try:
        return Fraction(int(str(value), int(base)))
    except ValueError as error:
        raise NoValue("digits that the base does not have") from error


def _register_functions() -> None:
    names = {name: name for name in ["sin", "cos", "tan", "cot", "sinh", "cosh", "tanh", "coth", "exp", "arg"]}
    for name in ["sin", "cos", "tan", "cot", "sinh", "cosh", "tanh"]:
        names[f"arc{name}"] = names[f"a{name}"] = f"a{name}"
    names |= {"Re": "re", "Im": "im", "sgn": "sign", "sign": "sign"}
    for written, name in names.items():
        _OPERATIONS[written] = _one_argument(name)


def _one_argument(name: str) -> Callable[[Evaluator, Value], Value]:
    return lambda evaluator, value: evaluator.function(name, value)


_register_functions()
