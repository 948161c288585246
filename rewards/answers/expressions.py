r"""Trees of mathematical expressions, read from LaTeX and from plain text such as `sqrt(2)/2` and `x**2`.

    sum     = term (("+" | "-") term)*
    term    = factor (("*" | "/" | nothing) factor)*
    factor  = ("+" | "-") factor | power
    power   = postfix ("^" factor)?
    postfix = atom ("!" | "\\circ")*

Nothing is computed here. Texts of more than `MAX_TOKENS` signs or `MAX_DEPTH` levels are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_TOKENS = 400
MAX_DEPTH = 40
MAX_DIGITS = 4000


class NotMathematics(ValueError):
    """A text is no expression that this reader knows, or too long a one."""


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


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DEGREE = Node("/", (Node("symbol", value="pi"), Node("number", value=Fraction(180))))
_NO_FACTORS = frozenset(("times", "cdot", "circ", "rfloor", "rceil", "overline", "bar"))
FUNCTIONS = _names(
    "sin cos tan cot sec csc arcsin arccos arctan arccot asin acos atan acot sinh cosh tanh coth asinh acosh "
    "atanh arcsinh arccosh arctanh exp log ln lg sqrt cbrt abs max min gcd lcm floor ceil ceiling factorial "
    "binomial binom Re Im arg sgn sign"
)
_LONG_ARGUMENTS = _names(
    "sqrt cbrt abs max min gcd lcm floor ceil ceiling factorial binomial binom Re Im arg sgn sign exp"
)
_GREEK = _names(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma "
    "tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"
)
_INFINITIES = frozenset(("infty", "infinity", "Infinity", "oo", "inf"))
# Short words of English that are no products of letters.
_WORDS = _names(
    "is of to in it we so an at by he no or and the was are has all for you can if as on be not yes dne one "
    "two six ten our its let now"
)

_TOKEN = re.compile(
    r"\s*(?:"
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6}(?![0-9.A-Za-z]))?)"
    r"|\\(?P<command>[A-Za-z]+)"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<sign>\*\*|\\[{}|]|[-+*/^_!(){}\[\],|'])"
    r")"
)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    spaced: bool = False


def read_expression(text: str, *, letters: bool = True) -> Node:
    r"""Return the tree of an expression in plain notation.

    Args:
        text: LaTeX or plain text; see `markup.plain_notation`.
        letters: read unknown runs of two or three letters as products, as in `xy`. Off in prose.

    Raises:
        NotMathematics: if the text is anything else.
    """
    reader = _Reader(_tokens(text, letters))
    node = reader.sum()
    if reader.peek() is not None:
        raise NotMathematics(f"unread: {text[:80]!r}")
    return node


def _tokens(text: str, letters: bool) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None or len(tokens) > MAX_TOKENS:
            raise NotMathematics(f"at {text[position : position + 20]!r}")
        kind, spaced = match.lastgroup, text[position].isspace()
        position = match.end()
        if kind == "word":
            tokens.extend(_word_tokens(match["word"], letters, spaced))
        else:
            tokens.append(_Token(kind, match[kind], spaced))
    return tokens


def _word_tokens(word: str, letters: bool, spaced: bool) -> list[_Token]:
    if len(word) == 1:
        return [_Token("letter", word, spaced)]
    if word in FUNCTIONS or word in _GREEK or word in _INFINITIES or word in ("pi", "Pi", "PI"):
        return [_Token("command", "pi" if word in ("Pi", "PI") else word, spaced)]
    if not letters or len(word) > 3 or word.casefold() in _WORDS:
        raise NotMathematics(f"the word {word[:40]!r}")
    return [_Token("letter", letter, spaced and i == 0) for i, letter in enumerate(word)]


class _Reader:
    """Recursive descent over tokens."""

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self.tokens = list(tokens)
        self.position = 0
        self.depth = 0
        self.bars = 0

    def peek(self) -> _Token | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self) -> _Token:
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
        return (token.kind in ("letter", "command") and token.text not in _NO_FACTORS) or token.text in ("(", "{")

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
                self.tokens[self.position] = _Token("number", token.text[1:])
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
        if name in _INFINITIES:
            return Node("infinity")
        if name == "pi" or name in _GREEK:
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
        elif name in _LONG_ARGUMENTS and name != "exp":
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
        while self._juxtaposed() and (self.peek() or _Token("", "")).text not in FUNCTIONS:
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
