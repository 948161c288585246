"""1 where the completion's mathematical answer equals the expected one, by the library math-verify."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

from alignlab.types import Text, message_text

# Its own time limits are signals, which fail in a thread: they are off, the caller keeps the time, the warning is moot.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).addFilter(lambda record: "Timeout is disabled" not in record.getMessage())


# What math-verify would compute before it compares, and might not finish computing: powers of powers, exponents and
# factorials of thousands. No thread that is computing such a number can be stopped.
_POWER = r"(?:\^|\*\*)\s*"
_EXPLODES = re.compile(
    rf"{_POWER}[{{(]*\s*-?\d{{4,}}"  # a long exponent
    rf"|{_POWER}[{{(][^{{}}()]*{_POWER}|{_POWER}\d+\s*{_POWER}"  # a power in an exponent
    r"|\d{4,}\s*[)}]*\s*!|![)}\s]*!"  # a long factorial, or one of a factorial
)
# Marked LaTeX, or words outside of it: math-verify finds the answer in it. Anything else is one expression.
_MARKED = re.compile(r"(?<!\\)\$|\\boxed")
_LATEX_WORDS = re.compile(r"\\(?:text\w*|mathrm|mbox|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")
_TEXT = re.compile(r"\\(?:text\w*|mathrm|mbox)\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")


def math_answer(
    *,
    completions: Sequence[Text],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where an answer found in the completion is mathematically equal to the expected one, else 0.0.

    The completion's answer is the last `\boxed{}`, else LaTeX between dollars, else a plain number or expression, as
    math-verify finds it; an answer that it cannot read is wrong, and so is one with a power of powers or an exponent of
    thousands, which it might compute for ever. Expected words are compared as text with the last box or the whole.

    Args:
        completions: strings or chat messages.
        answer: the dataset's column: a number, an expression, LaTeX, or a text with a `\boxed{}` in it.
        solution: the same under TRL's name for the column; used where there is no `answer`.
        columns: unused.

    Returns:
        None where there is no expected answer, or none that math-verify can read.
    """
    expected = answer if answer is not None else solution
    if expected is None:
        raise ValueError("math_answer needs a column 'answer' or 'solution' in the dataset")
    return [
        None if gold is None else _value(str(gold), message_text(completion))
        for gold, completion in zip(expected, completions, strict=True)
    ]


def _value(gold: str, completion: str) -> float | None:
    if _is_words(gold):
        return float(_plain(_final(completion)) == _plain(_final(gold)))
    if _EXPLODES.search(gold):
        return None
    prose = _MARKED.search(gold) or _WORD.search(_LATEX_WORDS.sub("", gold))
    read = parse(gold if prose else f"${gold}$", parsing_timeout=None)
    if not read:
        return None
    if _EXPLODES.search(completion):
        return 0.0
    try:
        return float(verify(read, parse(completion, parsing_timeout=None), timeout_seconds=None))
    except Exception as error:  # sympy raises anything at all on what a model writes
        logging.getLogger(__name__).debug("counted as wrong: %r: %r", completion, error)
        return 0.0


def _is_words(gold: str) -> bool:
    """Whether the expected answer is words and no mathematics: `even`, or a name in `\\text{}`."""
    plain = _plain(_final(gold))
    return bool(re.fullmatch(r"[a-z][a-z\s.'-]*", plain)) and len(plain.replace(" ", "")) > 2


def _final(text: str) -> str:
    """What stands in the last box, or the whole text."""
    boxed = _BOXED.findall(text)
    return str(boxed[-1]) if boxed else text


def _plain(text: str) -> str:
    """Without marks, case and the white space around it."""
    return _TEXT.sub(r"\1", text).strip().strip("$.").strip().casefold()
