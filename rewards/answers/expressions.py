r"""Trees of mathematical expressions, read from LaTeX and from plain text such as `sqrt(2)/2` and `x**2`.

    sum     = term (("+" | "-") term)*
    term    = factor (("*" | "/" | nothing) factor)*
    factor  = ("+" | "-") factor | power
    power   = postfix ("^" factor)?
    postfix = atom ("!" | "\\circ")*

Nothing is computed here. Texts of more than `MAX_TOKENS` signs or `MAX_DEPTH` levels are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
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


_DEGREE = Node("/", (Node("symbol", value="pi"), Node("number", value=Fraction(180))))


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
    """Recursive descent over tokens."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = list(tokens)
        self.position = 0
        self.depth = 0
        self.bars = 0

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

    def expect(self, text: str) -> None:
        if self.take().text != text:
            raise NotMathematics(f"{text!r} is missing")

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMathematics("too deep")
        terms = [self.term()]
        while self.at("+", "-"):
            negative = self.take().text == "-"
            term = self.term()
            terms.append(Node("-", (term,)) if negative else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("+", tuple(terms))

    def term(self) -> Node:
        node = self.factor()
        while True:
            if self.at("*", "times", "cdot"):
                self.take()
                node = Node("*", (node, self.factor()))
            elif self.at("/"):
                self.take()
                node = Node("/", (node, self.factor()))
            elif self._juxtaposed():
                node = Node("*", (node, self.power()))
            else:
                return node

    def _juxtaposed(self) -> bool:
        """True before something that multiplies what stands to its left: never a number, which would be ambiguous."""
        token = self.peek()
        if token is None:
            return False
        if token.kind == "number":
            return self.tokens[self.position - 1].text == "!"
        if token.text == "|":
            return self.bars == 0
        return (token.kind in ("letter", "command") and token.text not in NO_FACTORS) or token.text in ("(", "{")

    def factor(self) -> Node:
        if self.at("-", "+"):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise NotMathematics("too many signs")
            negative = self.take().text == "-"
            node = self.factor()
            self.depth -= 1
            return Node("-", (node,)) if negative else node
        return self.power()

    def power(self) -> Node:
        node = self.postfix()
        if self.at("^", "**"):
            self.take()
            node = Node("^", (node, self._exponent()))
        return node

    def _exponent(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMathematics("too deep")
        node = self.factor()
        self.depth -= 1
        return node

    def postfix(self) -> Node:
        node = self.atom()
        while self.at("!", "circ"):
            # Degrees inside an expression, as in \sin 30^\circ.
            node = Node("!", (node,)) if self.take().text == "!" else Node("*", (node, _DEGREE))
        return node

    def atom(self) -> Node:
        token = self.take()
        if token.kind == "number":
            return self._number(token.text)
        if token.kind == "letter":
            return self._symbol(token.text)
        if token.kind == "command":
            return self._command(token.text)
        closing = {"(": ")", "{": "}", "[": "]"}.get(token.text)
        if closing is not None:
            node = self._inside(closing)
            return node
        if token.text == "|":
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            self.expect("|")
            return Node("abs", (node,))
        raise NotMathematics(f"at {token.text!r}")

    def _inside(self, closing: str) -> Node:
        bars, self.bars = self.bars, 0
        node = self.sum()
        self.bars = bars
        self.expect(closing)
        return node

    def _number(self, text: str) -> Node:
        if len(text) > MAX_DIGITS:
            raise NotMathematics("too many digits")
        value = _decimal(text)
        if self.at("overline", "bar"):
            self.take()
            value = self._repeating(text, value)
        elif text.isdigit():
            value = self._mixed(value)
        if self.at("_"):
            self.take()
            return Node("based", (Node("number", value=value), self._argument()))
        return Node("number", value=value)

    def _repeating(self, text: str, value: Fraction) -> Fraction:
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
        if self.at("_"):
            self.take()
            name += "_" + _written(self._argument())
        while self.at("'"):
            self.take()
            name += "'"
        if name in ("f", "g", "h") and self.at("("):
            self.take()
            return Node("unknown", (self._inside(")"),), name)
        return Node("symbol", value=name)

    def _argument(self) -> Node:
        r"""One argument of a LaTeX command: a group, or a single sign, `\frac12` being one half."""
        token = self.take()
        if token.text == "{":
            return self._inside("}")
        if token.kind == "number" and token.text.isdigit():
            if len(token.text) > 1:
                self.position -= 1
                self.tokens[self.position] = Token("number", token.text[1:])
            return Node("number", value=Fraction(int(token.text[0])))
        self.position -= 1
        return self.atom()

    def _command(self, name: str) -> Node:
        if name in ("frac", "binom"):
            if name == "binom" and self.at("("):
                return self._function(name)
            return Node("/" if name == "frac" else "binomial", (self._argument(), self._argument()))
        if name == "sqrt":
            return self._root()
        if name in ("lfloor", "lceil"):
            node = self._inside_command("r" + name[1:])
            return Node("floor" if name == "lfloor" else "ceil", (node,))
        if name in INFINITIES:
            return Node("infinity")
        if name == "pi" or name in GREEK:
            return self._symbol(name)
        if name in FUNCTIONS:
            return self._function(name)
        raise NotMathematics(f"the command {name[:40]!r}")

    def _inside_command(self, closing: str) -> Node:
        node = self.sum()
        self.expect(closing)
        return node

    def _root(self) -> Node:
        index = Node("number", value=Fraction(2))
        if self.at("["):
            self.take()
            index = self._inside("]")
        # sqrt(2)/2 in plain text, \sqrt{2} and \sqrt2 in LaTeX
        radicand = self.atom() if self.at("(") or not self._digit_follows() else self._argument()
        return Node("root", (radicand, index))

    def _digit_follows(self) -> bool:
        token = self.peek()
        return token is not None and token.kind == "number"

    def _function(self, name: str) -> Node:
        """A function with its argument: `sin(x)`, `sin 2x`, `sin^2 x`, `log_2 8`, `max(3, 5)`."""
        base = exponent = None
        if self.at("_"):
            self.take()
            base = self._argument()
        if self.at("^", "**"):
            self.take()
            exponent = self._argument() if self.at("{") else self.factor()
        if self.at("(", "{"):
            arguments = self._arguments(")" if self.take().text == "(" else "}")
        elif name in LONG_ARGUMENTS and name != "exp":
            raise NotMathematics(f"{name} without parentheses")
        else:
            arguments = (self._open_argument(),)
        if base is not None:
            arguments = (*arguments, base)
        if exponent == Node("-", (Node("number", value=Fraction(1)),)):
            return Node(f"a{name}", arguments)
        node = Node(name, arguments)
        return node if exponent is None else Node("^", (node, exponent))

    def _arguments(self, closing: str) -> tuple[Node, ...]:
        arguments = [self.sum()]
        while self.at(","):
            self.take()
            arguments.append(self.sum())
        self.expect(closing)
        return tuple(arguments)

    def _open_argument(self) -> Node:
        """What a function without parentheses is applied to: signs, numbers and letters up to the next operator."""
        if self.at("-"):
            self.take()
            return Node("-", (self._open_argument(),))
        node = self.power()
        while self._juxtaposed() and (self.peek() or Token("", "")).text not in FUNCTIONS:
            node = Node("*", (node, self.power()))
        return node


def _is_proper(top: list[str], bottom: list[str]) -> bool:
    return all(len(part) == 1 and part[0].isdigit() and len(part[0]) < 10 for part in (top, bottom)) and (
        0 < int(top[0]) < int(bottom[0])
    )


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
