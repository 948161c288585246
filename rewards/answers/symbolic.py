"""Comparison by math-verify of what `reading` does not know: set differences, vectors, special functions and the like.

Its own time limits are signals, which fail in a thread, and its simplification has no bound. So it is asked only about
texts in which there is little to compute.
"""

from __future__ import annotations

import logging
import re
import threading

from alignlab_rewards.answers.markup import plain_notation

MAX_LENGTH = 120
_MAX_GROUPS = 12
# What would be computed before it is compared: integrals, sums, products, limits, derivatives, factorials, long numbers
# and powers of powers.
_COMPUTED = re.compile(
    r"\\(?:int|iint|oint|sum|prod|lim|max|min|sup|inf|binom|frac\s?\{d|nabla|partial|pmod|bmod|gcd|lcm|det|arg|zeta|Gamma)(?![A-Za-z])"
    r"|\d{7}|[\^_][^\s^]{0,40}\^|\^\s*\{?-?\d{3}|!"
)
_MATHEMATICAL = re.compile(r"\\[A-Za-z]{2,}|[=<>^]")
# math-verify keeps small caches of what it parsed, and ANTLR's tables grow as it reads: one thread at a time.
_LOCK = threading.Lock()

for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).addFilter(lambda record: "Timeout is disabled" not in record.getMessage())


def can_ask(text: str) -> bool:
    """Return True if math-verify may read a text: short, mathematical, and with nothing large to compute."""
    return (
        len(text) <= MAX_LENGTH
        and len(re.findall(r"[{(\[]", text)) <= _MAX_GROUPS
        and _MATHEMATICAL.search(text) is not None
        and _COMPUTED.search(text) is None
    )


def same_by_math_verify(expected: str, given: str) -> bool:
    """Return True if math-verify finds two answers equal; False for what it may not be asked about."""
    from math_verify import parse, verify  # loads sympy

    texts = [plain_notation(text) for text in (expected, given)]
    if not all(map(can_ask, texts)):
        return False
    with _LOCK:
        try:
            read = [parse(f"${text}$", parsing_timeout=None) for text in texts]
            if not all(read) or any(isinstance(item, str) for items in read for item in items[:1]):
                return False
            return bool(verify(read[0], read[1], timeout_seconds=None))
        except Exception as error:  # sympy raises anything at all on what a model writes
            logging.getLogger(__name__).debug("counted as different: %r, %r: %r", expected, given, error)
            return False
