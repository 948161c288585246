"""One plain notation for an answer: without Markdown, LaTeX layout, or other characters for the same sign."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙᵢ", "0123456789+-()ni")
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ]+")
_LOWERED = re.compile(r"[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙᵢ]+")
_VULGAR = re.compile(r"([0-9]?)([¼-¾⅐-⅞])")
_ROOT = re.compile(r"([√∛])\s*(\(|[0-9.]+|[A-Za-zπ])?")
# Each sign in plain notation, and the characters that are written for it.
_SIGNS = {
    "-": "−–—‐‑﹣", r"\times ": "×✕", r"\cdot ": "·⋅∙", "*": "∗", "/": "÷⁄∕", r"\pm ": "±", r"\mp ": "∓",
    r"\le ": "≤⩽", r"\ge ": "≥⩾", r"\ne ": "≠", r"\approx ": "≈", r"\infty ": "∞", r"\emptyset ": "∅",
    r"\cup ": "∪", r"\cap ": "∩", r"\setminus ": "∖", r"\land ": "∧", r"\lor ": "∨", r"\in ": "∈",
    r"\circ ": "°º", "'": "′’‘", '"': "“”", "l": "ℓ", r"\Omega ": "Ω", r"\mu ": "µ", r"\Delta ": "Δ",
    r"\mathbb{R}": "ℝ", r"\mathbb{Z}": "ℤ", r"\mathbb{N}": "ℕ", r"\mathbb{Q}": "ℚ", r"\mathbb{C}": "ℂ",
    r"\langle ": "⟨", r"\rangle ": "⟩", r"\lfloor ": "⌊", r"\rfloor ": "⌋", r"\lceil ": "⌈", r"\rceil ": "⌉",
    "...": "…", r"\int ": "∫", r"\sum ": "∑", r"\prod ": "∏", r"\to ": "→", r"\Rightarrow ": "⇒", " ": "∴",
}  # fmt: skip
_GREEK = {
    letter: f"\\{unicodedata.name(letter).split()[-1].lower().replace('lamda', 'lambda')} "
    for letter in "αβγδεζηθικλμνξπρστυφχψω"
}
# In place of LaTeX's double backslash, which ends a line or a row.
ROW_BREAK = "␞"
_CHARACTERS = str.maketrans({character: sign for sign, written in _SIGNS.items() for character in written} | _GREEK)

_BOLD = re.compile(r"(?<![\w)\]}*])(\*\*\*|\*\*|\*)(?=[^\s*])([^*\n]{1,300}?)(?<=[^\s*])\1(?![\w(*])")
_UNDERLINED = re.compile(r"(?<!\w)(__|_)(?=[^\s_{])([^_\n]{1,300}?)(?<=[^\s_])\1(?!\w)")
_CODE = re.compile(r"(?<!`)(`{1,3})(?!`)([^`\n]{1,300})\1(?!`)")
_HTML = re.compile(r"</?(?:b|i|em|strong|u|sup|sub|br|p|span|center)\s?/?>", re.IGNORECASE)

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|sc|normal|up)?|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|mbox|hbox|emph|underline"
    r"|operatorname\*?|bf|rm|it|unit|si|mathbfit|textcolor\{[a-z]{1,20}\}|color\{[a-z]{1,20}\})\s?\{([^{}]*)\}"
)
_SWITCH = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|large|Large|LARGE|huge|Huge|small|tiny|normalsize|bf|rm|it|limits|nolimits|left|right|[bB]igg?[lrm]?|middle|mathopen|mathclose)(?![A-Za-z])"
)
_SPACE = re.compile(
    r"\\(?:quad|qquad|hspace\{[^{}]{0,20}\}|phantom\{[^{}]{0,40}\}|hfill|newline)(?![A-Za-z])|\\[ ;:>]|(?<!\\)~|\u00a0"
)
_THIN = re.compile(r"(?<=\d)(?:\\[,!:;]|\\ |[\u2009\u202f\u00a0~]|\{,\}(?:\\!)?|,\\!)(?=\d{3}(?!\d))")
# Each name or sign in plain notation, and LaTeX's other commands for it.
_COMMANDS = {
    "frac": "dfrac tfrac cfrac", "binom": "dbinom tbinom", "le": "leq leqslant", "ge": "geq geqslant", "ne": "neq",
    "<": "lt", ">": "gt", "emptyset": "varnothing", "{": "lbrace", "}": "rbrace", "[": "lbrack", "]": "rbrack",
    "land": "wedge", "lor": "vee", "*": "ast", "/": "div", ":": "colon", "|": "lvert rvert vert mid",
    "circ": "degree degrees textdegree", "...": "dots ldots cdots", "cup": "bigcup", "i": "imath", "tan": "tg",
    "cot": "ctg", "arctan": "arctg", "Rightarrow": "implies", "-": "minus textminus", "'": "prime",
    "€": "euro", "£": "pounds", "¥": "yen", "$": "textdollar", "infty": "infin",
}  # fmt: skip
_NAMES = {command: name for name, commands in _COMMANDS.items() for command in commands.split()}
_NAME = re.compile(r"\\([A-Za-z]+)")
_SPACED_THOUSANDS = re.compile(r"(?<![\w.,^])(\d{1,3})((?: \d{3})+)(?![\d]|\s*/)")
_TIMES_LETTER = re.compile(r"(?<=\d)\s*[xX]\s*(?=\d)|(?<=\d)\s+[xX]\s+(?=[\d(])")
_ROW_SPACE = re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\]")
_THOUSANDS_LETTER = re.compile(r"(?<=\d)\s*\\text\{\s*k\s*\}")
_RAISED_PRIMES = re.compile(r"\^\s*\{?\s*('(?:\s*')*)\s*\}?")
# A formula between dollars; the dollars of "$5 and $6" are prices.
_INLINE = re.compile(r"(?<!\\)\$(?!\s)([^$\n]{1,1000}?)(?<![\s\\])\$(?!\d)")
# Behind a word, marks end a sentence; behind a number or letter they are factorials and derivatives.
_AFTER_WORD = re.compile(r"[^\W\d_]{2}[ .,;:!?\"'`*]*$")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))


def without_markdown(text: str) -> str:
    """Return a text without the marks of bold, italics, code, headings, quotes and lists, in Markdown or HTML.

    Asterisks between numbers and letters, as in `x**2` and `2*3`, are left: they are powers and products.
    """
    text = re.sub(r"(?m)^[ \t]{0,8}(?:>[ \t]?)*(?:#{1,6}[ \t]+|[*•][ \t]+|[-+][ \t]+(?![\d.]))?", "", text)
    text = _HTML.sub("", text)
    for _ in range(2):  # bold inside italics
        text = _BOLD.sub(r"\2", text)
    return _CODE.sub(r"\2", _UNDERLINED.sub(r"\2", text))


def without_delimiters(text: str) -> str:
    """Return a text without the LaTeX delimiters that stand around the whole of it."""
    text = text.strip()
    for opening, closing in _DELIMITERS:
        inside = text[len(opening) : -len(closing)]
        around = text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing)
        if around and opening not in inside and not inside.endswith("\\"):
            return without_delimiters(inside)
    return text


def plain_notation(text: str) -> str:
    r"""Return an answer in one notation: ASCII and LaTeX's names, without layout, fonts and spacing commands.

    `\dfrac` is `\frac`, `\text{ cm}` is ` cm `, `½` is ` 1/2`, `x²` is `x^{2}`, `1{,}234` is `1,234`.
    """
    text = without_delimiters(without_markdown(text))
    text = _ROW_SPACE.sub(ROW_BREAK, text)
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", _INLINE.sub(r" \1 ", text.replace("$$", " ")))
    text = text.replace("\\\\", ROW_BREAK)
    text = _THOUSANDS_LETTER.sub(r"\\times 1000", text)
    text = _THIN.sub(",", text)
    text = _unicode(text)
    for _ in range(3):  # \textbf{\text{...}}
        text = _TEXT.sub(r" \1 ", text)
    text = _SPACE.sub(" ", _SWITCH.sub(" ", text)).replace("\\,", " ").replace("\\!", "")
    text = _NAME.sub(_renamed, text)
    text = re.sub(r"\\([%$&#_])", r"\1", text.replace("{,}", ","))
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", r" \\circ ", text)
    text = _RAISED_PRIMES.sub(lambda match: match[1].replace(" ", ""), text)
    text = re.sub(r"(?<=[A-Za-z])\s+(?='(?![A-Za-z]))", "", text)
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ").replace("==", "=")
    text = re.sub(r"(?<=\d)\s?(?:\^\s?)?\{?\s?(?:st|nd|rd|th)\b\s?\}?", "", text)
    text = _SPACED_THOUSANDS.sub(lambda match: match[1] + match[2].replace(" ", ","), text)
    return _TIMES_LETTER.sub("*", re.sub(r"\s+", " ", text)).strip()


def _unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _VULGAR.sub(lambda m: m[1] + " " + unicodedata.normalize("NFKC", m[2]), text)
    text = _RAISED.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = _ROOT.sub(_root, text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    return re.sub("[\u200b-\u200f\u2060\ufeff\ufe0f]", "", text)


def _root(match: re.Match[str]) -> str:
    name = r"\sqrt" if match[1] == "√" else r"\sqrt[3]"
    return name + ("(" if match[2] == "(" else "{" + match[2] + "}" if match[2] else " ")


def _renamed(match: re.Match[str]) -> str:
    name = _NAMES.get(match[1])
    if name is None:
        return match[0]
    if name in ("{", "}"):
        return "\\" + name
    return f"\\{name}" if len(name) > 1 and name.isalpha() else f" {name} "


def words(text: str) -> str:
    """Return an answer as text to compare: plain notation in single spaces, without the punctuation around it."""
    text = plain_notation(text).strip(' .,;:"`*')
    if _AFTER_WORD.search(text):
        text = text.strip(" .,;:!?\"'`*")
    return re.sub(r"\s*([,;:=<>(){}\[\]/+*^-])\s*", r"\1", re.sub(r"\s+", " ", text)).strip()
