"""Comparison by math-verify of notation that `reading` does not know: set differences, intersections, vectors, angles.

math-verify's own time limits are signals, which fail in a thread, and its simplification has no bound. So it compares
only short texts of a vocabulary in which there is next to nothing to compute.
"""

from __future__ import annotations

import logging
import re
import threading

from alignlab_rewards.answers.markup import ROW_BREAK, plain_notation
from math_verify import parse, verify

MAX_LENGTH = 80
_MAX_BRACKETS = 10
# Commands that `reading` does not know: at least one of the two texts must have one of them.
_BEYOND = frozenset(
    ("setminus", "cap", "notin", "subset", "subseteq", "vec", "hat", "overline", "overrightarrow", "angle", "triangle")
)
_ALLOWED = _BEYOND | {
    "mathbb", "mathcal", "cup", "frac", "sqrt", "pi", "infty", "in", "times", "cdot", "le", "ge", "ne", "emptyset",
    "langle", "rangle", "alpha", "beta", "gamma", "theta", "left", "right", "circ",
}  # fmt: skip
# Long numbers, high powers, powers of powers, factorials and words may take long to compute. Names of several points,
# `AB`, are products for math-verify, and their order counts.
_COMPUTED = re.compile(rf"\d{{5}}|\^[^\^]*\^|\^\s*\{{?\s*-?\d{{2}}|!|(?<!\\)\b[A-Za-z]{{4,}}|[A-Z]\s?[A-Z]|{ROW_BREAK}")
# math-verify caches parsed texts, and the tables of its parser grow as it reads: one thread at a time.
_LOCK = threading.Lock()

for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).addFilter(lambda record: "Timeout is disabled" not in record.getMessage())


def same_by_math_verify(expected: str, answer: str) -> bool:
    """Return True if math-verify finds two answers equal; False for texts that it does not compare here."""
    if len(expected) > 2 * MAX_LENGTH or len(answer) > 2 * MAX_LENGTH:
        return False
    texts = [plain_notation(text) for text in (expected, answer)]
    commands = [set(re.findall(r"\\([A-Za-z]+)", text)) for text in texts]
    if not (commands[0] | commands[1]) & _BEYOND or not all(map(_is_bounded, texts, commands)):
        return False
    with _LOCK:
        try:
            return _verified(*texts)
        except Exception as error:  # sympy raises anything at all on what a model writes
            logging.getLogger(__name__).debug("counted as different: %r, %r: %r", expected, answer, error)
            return False


def _verified(expected: str, answer: str) -> bool:
    parsed = [parse(f"${text}$", parsing_timeout=None) for text in (expected, answer)]
    are_mathematics = all(items and not isinstance(items[0], str) for items in parsed)
    return are_mathematics and bool(verify(*parsed, timeout_seconds=None))


def _is_bounded(text: str, commands: set[str]) -> bool:
    brackets = sum(text.count(bracket) for bracket in "{([")
    return len(text) <= MAX_LENGTH and brackets <= _MAX_BRACKETS and commands <= _ALLOWED and not _COMPUTED.search(text)
