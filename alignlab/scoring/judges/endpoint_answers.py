"""Reading of a server's chat completions, whose content may be anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alignlab.scoring.judges.chat_model import Failure

_ROUNDING = 1e-3
"""A log-probability of 0 may be computed as a little more than 0."""


def first_choice(answer: Any) -> dict[str, Any]:
    """Return the only choice of an answer to a request for one.

    Raises:
        ValueError: the answer has no choice, or more than one.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError("it must be an object with one choice")
    return choices[0]


def completion_text(choice: Any) -> str | Failure:
    """Return the text of a choice; empty for a message without content."""
    message = choice.get("message")
    if not isinstance(message, dict):
        return Failure("refused", f"the server's answer has no message: {choice!r:.200}")
    text = message.get("content")
    if text is None:
        return ""
    if not isinstance(text, str):
        return Failure("refused", f"the server's message is no text: {text!r:.200}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Failure("nonsense", "the server's message has half a character in it (a lone surrogate)")
    return text


def choice_logprobs(answer: Any, choices: Sequence[str]) -> tuple[float, ...] | Failure:
    """Return the log-probability of each of `choices` as the first token, from the likeliest tokens in the answer.

    A choice that is not among these tokens gets the smallest of their log-probabilities, the most that it can have.
    """
    try:
        likeliest = _top_logprobs(answer)
    except (LookupError, TypeError, ValueError, OverflowError):
        return Failure("unusable", "the server gives no log-probabilities (top_logprobs); use answers: sampled")
    by_choice = [[logprob for token, logprob in likeliest if token.strip() == choice] for choice in choices]
    if not any(by_choice):
        return Failure("nonsense", f"none of {', '.join(choices)} is among the likeliest tokens {likeliest[:3]!r:.200}")
    least = min(logprob for _, logprob in likeliest)
    return tuple(_log_sum(logprobs) if logprobs else least for logprobs in by_choice)


def _top_logprobs(answer: Any) -> list[tuple[str, float]]:
    """Return the likeliest first tokens with their finite log-probabilities."""
    entries = answer["logprobs"]["content"][0]["top_logprobs"]
    pairs = [(entry["token"], _logprob(entry["logprob"])) for entry in entries]
    return [(token, logprob) for token, logprob in pairs if math.isfinite(logprob) and isinstance(token, str)]


def _logprob(value: Any) -> float:
    """Return a log-probability; NaN and infinity, which servers write for a probability of 0, are returned as they are.

    Raises:
        TypeError, ValueError, OverflowError: the value is no number, or the logarithm of a probability over 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    if value > _ROUNDING:
        raise ValueError(value)
    return float(value)


def _log_sum(logprobs: Sequence[float]) -> float:
    """Return the logarithm of the sum of probabilities."""
    top = max(logprobs)
    return top + math.log(sum(math.exp(logprob - top) for logprob in logprobs))
