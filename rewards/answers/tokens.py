"""Tokens of an expression: numbers, letters, names of functions and signs."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_TOKENS = 400


class NotMathematics(ValueError):
    """A text is no expression that this reader knows, or too long a one."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NO_FACTORS = frozenset(("times", "cdot", "circ", "rfloor", "rceil", "overline", "bar"))
FUNCTIONS = _names(
    "sin cos tan cot sec csc arcsin arccos arctan arccot asin acos atan acot sinh cosh tanh coth asinh acosh "
    "atanh arcsinh arccosh arctanh exp log ln lg sqrt cbrt abs max min gcd lcm floor ceil ceiling factorial "
    "binomial binom Re Im arg sgn sign"
)
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


_DIFFERENTIAL = re.compile(r"d[A-Za-z]")
_DERIVATIVE = re.compile(r"(?<![A-Za-z])d[A-Za-z]\s*\}?\s*[/{]\s*\{?\s*d[A-Za-z](?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    spaced: bool = False


def tokens_of(text: str, letters: bool) -> list[Token]:
    tokens: list[Token] = []
    position = 0
    text = text.rstrip()
    derivative = _DERIVATIVE.search(text) is not None
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None or len(tokens) > MAX_TOKENS:
            raise NotMathematics(f"at {text[position : position + 20]!r}")
        kind, spaced = match.lastgroup, text[position].isspace()
        position = match.end()
        if kind == "word" and derivative and _DIFFERENTIAL.fullmatch(match["word"]):
            tokens.append(Token("letter", match["word"], spaced))
        elif kind == "word":
            tokens.extend(_word_tokens(match["word"], letters, spaced))
        else:
            tokens.append(Token(kind, match[kind], spaced))
    return tokens


def _word_tokens(word: str, letters: bool, spaced: bool) -> list[Token]:
    if len(word) == 1:
        return [Token("letter", word, spaced)]
    if word in FUNCTIONS or word in GREEK or word in INFINITIES or word in ("pi", "Pi", "PI"):
        return [Token("command", "pi" if word in ("Pi", "PI") else word, spaced)]
    if not letters or len(word) > 3 or word.casefold() in _WORDS:
        raise NotMathematics(f"the word {word[:40]!r}")
    return [Token("letter", letter, spaced and i == 0) for i, letter in enumerate(word)]
