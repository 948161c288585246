"""Reward for a completion of a given form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from alignlab.types import Text, message_text


def regex_format(*, completions: Sequence[Text], pattern: str, **columns: Any) -> list[float | None]:
    r"""Return 1.0 where the whole completion matches `pattern`, else 0.0.

    Args:
        completions: strings or chat messages; white space around them does not count.
        pattern: a regular expression in which `.` matches line breaks too, such as
            `<think>.*</think>\s*<answer>.*</answer>`. Avoid nested repetitions such as `(a+)+`, whose
            matching may take exponential time.
        columns: unused.
    """
    compiled = _compiled(pattern)
    return [float(compiled.fullmatch(message_text(completion).strip()) is not None) for completion in completions]


def _compiled(pattern: Any) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise ValueError(f"the option pattern of regex_format must be text, and is {pattern!r:.80}; correct it")
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"the option pattern of regex_format must be a regular expression, and {pattern!r:.80} is none: {error}; "
            "correct it"
        ) from error
