"""Values of expressions: exact fractions where possible, else many digits, every computation bounded.

A number is exact while it has at most `MAX_BITS` bits; beyond that, and for irrational values, it is a complex number
of mpmath with the precision asked for. Magnitudes are limited before anything is computed: `10^{10^{10}}` has no value.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import mpmath
from alignlab_rewards.answers.exact import MAX_BITS, NoValue, bits, exact_power, exact_root, power_of_zero
from alignlab_rewards.answers.expressions import Node

MAX_EXPONENT_BITS = 2**30  # of an inexact number: its size may be 2 to the power of this
MAX_ARGUMENT_BITS = 300  # of the argument of sine, exponential and the like
MAX_FACTORIAL = 10**6
MAX_LCM_ARGUMENTS = 19

_LOCAL = threading.local()

Value = Fraction | Any  # Any: mpmath's complex numbers


class Evaluator:
    """Evaluator of trees at given values of their symbols.

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
        self.lossy = False  # True once a part of a huge number was rounded away, as in 10^9999 + 1

    def value(self, node: Node) -> Value:
        """Return the value of a tree, a Fraction where it is exact.

        Raises:
            NoValue: it is undefined, unknown, or too large.
        """
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

    def is_infinite(self, *values: Value) -> bool:
        """Return True if one of mpmath's numbers is infinite."""
        return any(self.context.isinf(value) for value in values)

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
        return self._bounded(operation(self, *values))

    def _bounded(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            return value if bits(value) <= MAX_BITS else self._rounded(value)
        value = self.context.mpc(value)
        rounding = self.context.mpf(10) ** (5 - self.context.dps)
        if self.real and value.imag != 0 and abs(value.imag) > abs(value.real) * rounding:
            raise NoValue("not real")
        return value

    def _symbol(self, name: str) -> Value:
        if name in self.symbols:
            return self.symbols[name]
        if name == "i":
            return self.context.mpc(0, 1)
        if name in ("e", "pi"):
            return self.context.mpc(getattr(self.context, name))
        raise NoValue(f"the symbol {name}")

    def _unknown(self, name: str, argument: Value) -> Value:
        """Return the value of a function that the text only names: f(2) equals f(2), and nothing else by chance."""
        seed = Fraction(zlib.crc32(name.encode()) % 9973 + 17, 3511)
        return self.context.sin(self._argument(argument) * self.inexact(seed)) + self.inexact(seed)

    def _argument(self, value: Value) -> Any:
        """Return a value as the argument of a function that is computed in bounded time."""
        number = self.inexact(value)
        if self.is_infinite(number):
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
                if bits(total) > MAX_BITS:
                    break
            else:
                return total
        numbers = [self.inexact(value) for value in values]
        self.lossy = self.lossy or self._absorbs(numbers)
        return sum(numbers, self.context.mpc(0))

    def _absorbs(self, numbers: list[Any]) -> bool:
        """Return True if the largest number is so large that the smallest does not change their sum."""
        sizes = [self.context.mag(number) for number in numbers if number != 0 and not self.is_infinite(number)]
        largest = max(sizes, default=0)
        return largest > self.context.prec / 2 and largest - min(sizes) > self.context.prec - 10

    def multiply(self, first: Value, second: Value) -> Value:
        """Return the product."""
        if isinstance(first, Fraction) and isinstance(second, Fraction):
            return first * second
        return self.inexact(first) * self.inexact(second)

    def divide(self, dividend: Value, divisor: Value) -> Value:
        """Return the quotient."""
        if divisor == 0:
            raise NoValue("division by zero")
        if isinstance(dividend, Fraction) and isinstance(divisor, Fraction):
            return dividend / divisor
        return self.inexact(dividend) / self.inexact(divisor)

    def power(self, base: Value, exponent: Value) -> Value:
        """Return the power; real for a negative base with an odd denominator of the exponent: (-8)^(1/3) is -2."""
        if isinstance(exponent, Fraction):
            if exponent.denominator == 1 and isinstance(base, Fraction):
                exact = exact_power(base, int(exponent))
                if exact is not None:
                    return exact
                self.lossy = True
            elif exponent.denominator % 2 and exponent.denominator > 1 and _is_negative(base):
                root = self.root(base, Fraction(exponent.denominator))
                return self.power(root, Fraction(exponent.numerator))
        return self._inexact_power(self.inexact(base), self.inexact(exponent))

    def _inexact_power(self, base: Any, exponent: Any) -> Value:
        if self.is_infinite(base, exponent):
            raise NoValue("a power of infinity")
        if base == 0:
            return power_of_zero(exponent.real)
        magnitude, log = self.context.mag, self.context.log
        if magnitude(exponent) + magnitude(abs(log(abs(base))) + 1) > MAX_EXPONENT_BITS.bit_length():
            raise NoValue("too large a power")
        return base**exponent

    def root(self, value: Value, index: Value) -> Value:
        """Return the root; exact where it is, and real for odd roots of negative numbers."""
        if not isinstance(index, Fraction) or index.denominator != 1 or not 1 <= index <= 10**6:
            return self.power(value, self.divide(Fraction(1), index))
        degree = int(index)
        if _is_negative(value) and degree % 2:
            return self.multiply(Fraction(-1), self.root(self.multiply(Fraction(-1), value), index))
        exact = exact_root(value, degree) if isinstance(value, Fraction) and degree <= 64 else None
        return self.power(self.inexact(value), Fraction(1, degree)) if exact is None else exact

    def factorial(self, value: Value) -> Value:
        """Return the factorial: exact to some thousands, then by Stirling's series."""
        if isinstance(value, Fraction):
            if value.denominator == 1 and 0 <= value <= 3000:
                return Fraction(math.factorial(int(value)))
            if value.denominator == 1 and value < 0:
                raise NoValue("the factorial of a negative number")
            self.lossy = self.lossy or value.denominator == 1
        number = self.inexact(value)
        if self.is_infinite(number) or abs(number) > MAX_FACTORIAL:
            raise NoValue("too large a factorial")
        return self.context.factorial(number)

    def binomial(self, n: Value, k: Value) -> Value:
        """Return the binomial coefficient."""
        are_whole = isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1
        if are_whole and 0 <= n <= 3000:
            return Fraction(math.comb(int(n), int(k))) if k >= 0 else Fraction(0)
        difference = self.add(n, self.multiply(Fraction(-1), k))
        return self.divide(self.factorial(n), self.multiply(self.factorial(k), self.factorial(difference)))

    def logarithm(self, value: Value, base: Value | None = None) -> Value:
        """Return the logarithm: natural, or of base 10 if `decimal_log`, or of the given base."""
        number = self.inexact(value)
        if number == 0 or self.is_infinite(number):
            raise NoValue("a logarithm of zero or infinity")
        if base is None:
            return self.context.log(number) / (self.context.log(10) if self.decimal_log else 1)
        inexact_base = self.inexact(base)
        if inexact_base in (0, 1):
            raise NoValue("a logarithm without a base")
        return self.context.log(number) / self.context.log(inexact_base)

    def natural_logarithm(self, value: Value) -> Value:
        """Return the natural logarithm, which is infinite for infinity."""
        if value == 0:
            raise NoValue("a logarithm of zero")
        return self.inexact(self.context.log(self.inexact(value)))

    def absolute(self, value: Value) -> Value:
        """Return the absolute value."""
        return abs(value) if isinstance(value, Fraction) else abs(self.inexact(value))

    def floor(self, value: Value) -> Value:
        """Return the largest whole number that is not above a value."""
        return Fraction(math.floor(value)) if isinstance(value, Fraction) else self._rounded_whole("floor", value)

    def ceiling(self, value: Value) -> Value:
        """Return the smallest whole number that is not below a value."""
        return Fraction(math.ceil(value)) if isinstance(value, Fraction) else self._rounded_whole("ceil", value)

    def _rounded_whole(self, rounding: str, value: Any) -> Any:
        return getattr(self.context, rounding)(self._argument(value).real)

    def largest(self, *values: Value) -> Value:
        """Return the largest of real numbers."""
        return max(self._real(values), key=lambda value: self.inexact(value).real)

    def smallest(self, *values: Value) -> Value:
        """Return the smallest of real numbers."""
        return min(self._real(values), key=lambda value: self.inexact(value).real)

    def _real(self, values: Sequence[Value]) -> Sequence[Value]:
        if not all(isinstance(value, Fraction) or value.imag == 0 for value in values):
            raise NoValue("an order of complex numbers")
        return values

    def function(self, name: str, value: Value) -> Value:
        """Return one of mpmath's functions of an argument of limited size."""
        if isinstance(value, Fraction) and value == 0 and name in _AT_ZERO:
            return Fraction(_AT_ZERO[name])
        number = self._argument(value)
        if name in _EXPONENTIALS and abs(number.real) > 10**9:
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


def _is_negative(value: Value) -> bool:
    if isinstance(value, Fraction):
        return value < 0
    return bool(value.imag == 0 and value.real < 0)


def _of_whole_numbers(function: Callable[..., int]) -> Callable[..., Value]:
    """Return the operation that is a function of whole numbers, such as `math.gcd`."""

    def operation(evaluator: Evaluator, *values: Value) -> Value:
        if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
            raise NoValue("a divisor of a number that is not whole")
        return Fraction(function(*map(int, values)))

    return operation


def _common_multiple(*numbers: int) -> int:
    if len(numbers) > MAX_LCM_ARGUMENTS:
        raise NoValue("a common multiple of too many numbers")
    return math.lcm(*numbers)


def _in_base(evaluator: Evaluator, value: Value, base: Value) -> Value:
    if not isinstance(base, Fraction) or base.denominator != 1 or not 2 <= base <= 36:
        raise NoValue("no base of a number")
    try:
        return Fraction(int(str(value), int(base)))
    except ValueError as error:
        raise NoValue("digits that the base does not have") from error


def _reciprocal(name: str) -> Callable[[Evaluator, Value], Value]:
    return lambda evaluator, value: evaluator.divide(Fraction(1), evaluator.function(name, value))


def _function(name: str) -> Callable[[Evaluator, Value], Value]:
    return lambda evaluator, value: evaluator.function(name, value)


_AT_ZERO = {"sin": 0, "cos": 1, "tan": 0, "sinh": 0, "cosh": 1, "exp": 1}
_EXPONENTIALS = frozenset(("exp", "sinh", "cosh", "tanh", "coth"))
_INVERTIBLE = ("sin", "cos", "tan", "cot", "sinh", "cosh", "tanh")
# Each function as it is written, and its name in mpmath.
_MPMATH_NAMES = (
    {name: name for name in (*_INVERTIBLE, "coth", "exp", "arg")}
    | {f"{prefix}{name}": f"a{name}" for name in _INVERTIBLE for prefix in ("arc", "a")}
    | {"Re": "re", "Im": "im", "sgn": "sign", "sign": "sign"}
)

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
    "ln": Evaluator.natural_logarithm,
    "lg": lambda evaluator, value: evaluator.logarithm(value, Fraction(10)),
    "floor": Evaluator.floor,
    "ceil": Evaluator.ceiling,
    "ceiling": Evaluator.ceiling,
    "max": Evaluator.largest,
    "min": Evaluator.smallest,
    "gcd": _of_whole_numbers(math.gcd),
    "lcm": _of_whole_numbers(_common_multiple),
    "based": _in_base,
    "csc": _reciprocal("sin"),
    "sec": _reciprocal("cos"),
    **{written: _function(name) for written, name in _MPMATH_NAMES.items()},
}
