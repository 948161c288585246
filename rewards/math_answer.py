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


# Marked LaTeX, or words: math-verify finds the answer in it. Anything else is one expression, and is marked as such.
_PROSE = re.compile(r"\$|\\boxed|(?<![\\A-Za-z])[A-Za-z]{3,}")


def math_answer(
    *,
    completions: Sequence[Text],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where an answer found in the completion is mathematically equal to the expected one, else 0.0.

    The completion's answer is the last `\boxed{}`, else LaTeX between dollars, else a plain number or expression, as
    math-verify finds it; an answer that it cannot read is wrong.

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
    read = parse(gold if _PROSE.search(gold) else f"${gold}$", parsing_timeout=None)
    if not read:
        return None
    try:
        return float(verify(read, parse(completion, parsing_timeout=None), timeout_seconds=None))
    except Exception as error:  # sympy raises anything at all on what a model writes
        logging.getLogger(__name__).debug("counted as wrong: %r: %r", completion, error)
        return 0.0
