r"""Trees of mathematical expressions, read from LaTeX and from plain text such as `sqrt(2)/2` and `x**2`.

    sum     = term (("+" | "-") term)*
    term    = factor (("*" | "/" | nothing) factor)*
    factor  = ("+" | "-") factor | power
    power   = postfix ("^" factor)?
    postfix = atom ("!" | "\\circ")*

Nothing is computed here. Texts of more than `MAX_TOKENS` signs or `MAX_DEPTH` levels are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

from alignlab_rewards.answers.tokens import (
    FUNCTIONS,
    GREEK,
    INFINITIES,
    LONG_ARGUMENTS,
    NO_FACTORS,
    NotMathematics,
    Token,
    tokens_of,
)

MAX_DEPTH = 40
MAX_DIGITS = 4000


@dataclass(frozen=True, slots=True)
class Node:
    """An operation and its operands; a leaf holds a number or a name.

    Attributes:
        op: "number", "symbol", "infinity", "+", "*", "/", "^", "-" (negation), "!", "root", or a function's name.
        args: operands.
        value: of a leaf.
    """

    op: str
    args: tuple[Node, ...] = ()
    value: Fraction | str | None = None


def number(value: int | Fraction) -> Node:
    """Return the leaf of a number."""
    return Node("number", value=Fraction(value))


def negative(node: Node) -> Node:
    """Return the negation of a tree."""
    return Node("-", (node,))


INFINITY = Node("infinity")
MINUS_INFINITY = negative(INFINITY)
_DEGREE = Node("/", (Node("symbol", value="pi"), number(180)))
_CLOSING = {"(": ")", "{": "}", "[": "]"}
_FRACTIONS = {"frac": "/", "binom": "binomial"}
_ROUNDINGS = {"lfloor": "floor", "lceil": "ceil"}


def read_expression(text: str, *, letters: bool = True) -> Node:
    r"""Return the tree of an expression in plain notation.

    Args:
        text: LaTeX or plain text; see `markup.plain_notation`.
        letters: read unknown runs of two or three letters as products, as in `xy`. Off in prose.

    Raises:
        NotMathematics: if the text is anything else.
    """
    reader = _Reader(tokens_of(text, letters))
    node = reader.sum()
    if reader.peek() is not None:
        raise NotMathematics(f"unread: {text[:80]!r}")
    return node


class _Reader:
    """Recursive descent over tokens, with a method for each rule of the grammar."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = list(tokens)
        self.position = 0
        self.depth = 0
        self.bars = 0  # signs "|" that are open

    def peek(self) -> Token | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self) -> Token:
        token = self.peek()
        if token is None:
            raise NotMathematics("it ends too early")
        self.position += 1
        return token

    def at(self, *texts: str) -> bool:
        token = self.peek()
        return token is not None and token.text in texts

    def take_if(self, *texts: str) -> str | None:
        """Take the next token if it is one of these, and return its text."""
        return self.take().text if self.at(*texts) else None

    def expect(self, text: str) -> None:
        if self.take().text != text:
            raise NotMathematics(f"{text!r} is missing")

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """Count a level of nesting, so that no text exhausts Python's stack."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMathematics("too deep")
        yield
        self.depth -= 1

    def sum(self) -> Node:
        """Read terms with signs between them."""
        with self.deeper():
            terms = [self.term()]
            while sign := self.take_if("+", "-"):
                term = self.term()
                terms.append(negative(term) if sign == "-" else term)
        return terms[0] if len(terms) == 1 else Node("+", tuple(terms))

    def term(self) -> Node:
        """Read factors with signs, or nothing, between them."""
        node = self.factor()
        while True:
            if sign := self.take_if("*", "times", "cdot", "/"):
                node = Node("/" if sign == "/" else "*", (node, self.factor()))
            elif self._juxtaposed():
                node = Node("*", (node, self.power()))
            else:
                return node

    def _juxtaposed(self) -> bool:
        """Return True before something that multiplies what stands to its left: `2x`, `(a)(b)`, `3! 4`.

        A number does so behind "!" only: elsewhere two numbers side by side are a mistake or a mixed number.
        """
        token = self.peek()
        if token is None:
            return False
        if token.kind == "number":
            return self.tokens[self.position - 1].text == "!"
        if token.text == "|":
            return self.bars == 0
        return (token.kind in ("letter", "command") and token.text not in NO_FACTORS) or token.text in ("(", "{")

    def factor(self) -> Node:
        """Read a power with any signs in front."""
        if not self.at("-", "+"):
            return self.power()
        with self.deeper():
            sign = self.take().text
            node = self.factor()
        return negative(node) if sign == "-" else node

    def power(self) -> Node:
        """Read a base with its exponent, if it has one."""
        node = self.postfix()
        if self.take_if("^", "**"):
            with self.deeper():
                node = Node("^", (node, self.factor()))
        return node

    def postfix(self) -> Node:
        r"""Read an atom with its factorials and degrees, as in `\sin 30^\circ`."""
        node = self.atom()
        while sign := self.take_if("!", "circ"):
            node = Node("!", (node,)) if sign == "!" else Node("*", (node, _DEGREE))
        return node

    def atom(self) -> Node:
        """Read a number, a letter, a command or a group."""
        token = self.take()
        if token.kind == "number":
            return self._number(token.text)
        if token.kind == "letter":
            return self._symbol(token.text)
        if token.kind == "command":
            return self._command(token.text)
        if token.text in _CLOSING:
            return self._group(_CLOSING[token.text])
        if token.text == "|":
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            self.expect("|")
            return Node("abs", (node,))
        raise NotMathematics(f"at {token.text!r}")

    def _group(self, closing: str) -> Node:
        bars, self.bars = self.bars, 0
        node = self.sum()
        self.bars = bars
        self.expect(closing)
        return node

    def _number(self, text: str) -> Node:
        if len(text) > MAX_DIGITS:
            raise NotMathematics("too many digits")
        value = _decimal(text)
        if self.take_if("overline", "bar"):
            value = self._repeating(text, value)
        elif text.isdigit():
            value = self._mixed(value)
        return Node("based", (number(value), self._argument())) if self.take_if("_") else number(value)

    def _repeating(self, text: str, value: Fraction) -> Fraction:
        r"""Read the period of a decimal: `0.1\overline{6}`."""
        self.expect("{")
        digits = self.take().text
        self.expect("}")
        if "." not in text or not digits.isdigit() or len(digits) > 50:
            raise NotMathematics("no repeating decimal")
        places = len(text) - text.index(".") - 1
        return value + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)

    def _mixed(self, whole: Fraction) -> Fraction:
        r"""Add the proper fraction of two whole numbers right behind: `2 1/2`, `2\frac{1}{2}`, `2\frac12`."""
        following = [token.text for token in self.tokens[self.position : self.position + 7]]
        digits = following[1] if following[:1] == ["frac"] and len(following) > 1 else ""
        forms = (
            (3, following[:1], following[2:3], following[1:2] == ["/"]),
            (7, following[2:3], following[5:6], following[:2] == ["frac", "{"] and following[3:5] == ["}", "{"]),
            (2, [digits[:1]], [digits[1:]], len(digits) == 2),
        )
        for length, top, bottom, fits in forms:
            if fits and _is_proper(top, bottom) and (length < 7 or following[6:] == ["}"]):
                self.position += length
                return whole + Fraction(int(top[0]), int(bottom[0]))
        return whole

    def _symbol(self, name: str) -> Node:
        if self.take_if("_"):
            name += "_" + _written(self._argument())
        while self.take_if("'"):
            name += "'"
        if name in ("f", "g", "h") and self.take_if("("):
            return Node("unknown", (self._group(")"),), name)
        return Node("symbol", value=name)

    def _argument(self) -> Node:
        r"""Read one argument of a LaTeX command: a group, or a single sign, so that `\frac12` is one half."""
        token = self.take()
        if token.text == "{":
            return self._group("}")
        if token.kind == "number" and token.text.isdigit():
            if len(token.text) > 1:
                self.position -= 1
                self.tokens[self.position] = Token("number", token.text[1:])
            return number(int(token.text[0]))
        self.position -= 1
        return self.atom()

    def _command(self, name: str) -> Node:
        if name == "binom" and self.at("("):
            return self._function(name)
        if name in _FRACTIONS:
            return Node(_FRACTIONS[name], (self._argument(), self._argument()))
        if name == "sqrt":
            return self._root()
        if name in _ROUNDINGS:
            node = Node(_ROUNDINGS[name], (self.sum(),))
            self.expect("r" + name[1:])
            return node
        if name in INFINITIES:
            return INFINITY
        if name == "pi" or name in GREEK:
            return self._symbol(name)
        if name in FUNCTIONS:
            return self._function(name)
        raise NotMathematics(f"the command {name[:40]!r}")

    def _root(self) -> Node:
        index = self._group("]") if self.take_if("[") else number(2)
        token = self.peek()
        # \sqrt2 takes one digit; sqrt(2)/2 in plain text and \sqrt{2} a group.
        radicand = self._argument() if token is not None and token.kind == "number" else self.atom()
        return Node("root", (radicand, index))

    def _function(self, name: str) -> Node:
        """Read a function with its argument: `sin(x)`, `sin 2x`, `sin^2 x`, `log_2 8`, `max(3, 5)`."""
        base = (self._argument(),) if self.take_if("_") else ()
        exponent = None
        if self.take_if("^", "**"):
            exponent = self._argument() if self.at("{") else self.factor()
        arguments = (*self._arguments_of(name), *base)
        if exponent == negative(number(1)):
            return Node(f"a{name}", arguments)  # sin^{-1} is the arc sine
        node = Node(name, arguments)
        return node if exponent is None else Node("^", (node, exponent))

    def _arguments_of(self, name: str) -> tuple[Node, ...]:
        opening = self.take_if("(", "{")
        if opening is None:
            if name in LONG_ARGUMENTS and name != "exp":
                raise NotMathematics(f"{name} without parentheses")
            return (self._open_argument(),)
        arguments = [self.sum()]
        while self.take_if(","):
            arguments.append(self.sum())
        self.expect(_CLOSING[opening])
        return tuple(arguments)

    def _open_argument(self) -> Node:
        """Read the argument of a function without parentheses: signs, numbers and letters up to the next operator."""
        if self.take_if("-"):
            return negative(self._open_argument())
        node = self.power()
        while self._juxtaposed() and self.tokens[self.position].text not in FUNCTIONS:
            node = Node("*", (node, self.power()))
        return node


def _is_proper(top: list[str], bottom: list[str]) -> bool:
    """Return True for the digits of a fraction below 1."""
    are_digits = all(len(part) == 1 and part[0].isdigit() and len(part[0]) < 10 for part in (top, bottom))
    return are_digits and 0 < int(top[0]) < int(bottom[0])


def _decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.replace(",", "").casefold().partition("e")
    power = int(exponent or 0)
    if abs(power) > MAX_DIGITS:
        raise NotMathematics("too large an exponent")
    return Fraction(mantissa.removesuffix(".")) * Fraction(10) ** power


def _written(node: Node) -> str:
    """Write a tree as a name, for subscripts."""
    if node.op in ("number", "symbol"):
        return str(node.value)
    return f"{node.op}({','.join(map(_written, node.args))})"
