"""Tokens of an expression: numbers, letters, names of functions and signs."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_TOKENS = 400


class NotMathematics(ValueError):
    """Raised for a text that is no expression, or too long a one."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Commands that multiply nothing in front of them.
NO_FACTORS = frozenset(("times", "cdot", "circ", "rfloor", "rceil", "overline", "bar"))
FUNCTIONS = _names(
    "sin cos tan cot sec csc arcsin arccos arctan arccot asin acos atan acot sinh cosh tanh coth asinh acosh "
    "atanh arcsinh arccosh arctanh exp log ln lg sqrt cbrt abs max min gcd lcm floor ceil ceiling factorial "
    "binomial binom Re Im arg sgn sign"
)
# Functions that need brackets around their argument.
LONG_ARGUMENTS = _names(
    "sqrt cbrt abs max min gcd lcm floor ceil ceiling factorial binomial binom Re Im arg sgn sign exp"
)
GREEK = _names(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma "
    "tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"
)
INFINITIES = frozenset(("infty", "infinity", "Infinity", "oo", "inf"))
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

# `dy/dx` and `\frac{dy}{dx}`: there, `dy` is one name.
_DERIVATIVE = re.compile(r"(?<![A-Za-z])d[A-Za-z]\s*\}?\s*[/{]\s*\{?\s*d[A-Za-z](?![A-Za-z])")
_DIFFERENTIAL = re.compile(r"d[A-Za-z]")
_PI = frozenset(("pi", "Pi", "PI"))
_COMMANDS = FUNCTIONS | GREEK | INFINITIES


@dataclass(frozen=True, slots=True)
class Token:
    """The smallest part of an expression.

    Attributes:
        kind: "number", "letter" (a variable), "command" (a name of LaTeX or a function) or "sign".
        text: the part as it is written, without a backslash in front of a command.
    """

    kind: str
    text: str


def tokens_of(text: str, letters: bool) -> list[Token]:
    """Split an expression into tokens.

    Args:
        text: an expression in plain notation.
        letters: read unknown words of two or three letters as a product of them: `xy`.

    Raises:
        NotMathematics: for another word or sign, and for more than `MAX_TOKENS` tokens.
    """
    tokens: list[Token] = []
    position = 0
    text = text.rstrip()
    has_derivative = _DERIVATIVE.search(text) is not None
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None or len(tokens) > MAX_TOKENS:
            raise NotMathematics(f"at {text[position : position + 20]!r}")
        kind, position = match.lastgroup, match.end()
        if kind != "word":
            tokens.append(Token(kind, match[kind]))
        elif has_derivative and _DIFFERENTIAL.fullmatch(match[kind]):
            tokens.append(Token("letter", match[kind]))
        else:
            tokens.extend(_word_tokens(match[kind], letters))
    return tokens


def _word_tokens(word: str, letters: bool) -> list[Token]:
    """Read a word without a backslash: a variable, a name that LaTeX knows, or a product of letters."""
    if len(word) == 1:
        return [Token("letter", word)]
    if word in _PI:
        return [Token("command", "pi")]
    if word in _COMMANDS:
        return [Token("command", word)]
    if not letters or len(word) > 3 or word.casefold() in _WORDS:
        raise NotMathematics(f"the word {word[:40]!r}")
    return [Token("letter", letter) for letter in word]
