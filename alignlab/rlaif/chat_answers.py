"""What a server's chat completion says, checked before it is believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alignlab.rlaif.chat_model import Failure

_ROUNDING = 1e-3  # a log-probability of 0 may be computed as a little more


def first_choice(answer: Any) -> dict[str, Any]:
    """Return the only choice of an answer to a request for one.

    Raises:
        ValueError: there is none, or more than one.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError("it must be an object with one choice")
    return choices[0]


def completion_text(choice: Any) -> str | Failure:
    """Return the text of a choice."""
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
    """Return the log-probability of each of `choices` as the first token, from the likeliest tokens that are told."""
    try:
        likeliest = answer["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(entry["token"], _logprob(entry["logprob"])) for entry in likeliest]
    except (LookupError, TypeError, ValueError, OverflowError):
        return Failure("unusable", "the server gives no log-probabilities (top_logprobs); use answers: sampled")
    listed = [(token, value) for token, value in pairs if math.isfinite(value) and isinstance(token, str)]
    by_choice = [[value for token, value in listed if token.strip() == choice] for choice in choices]
    if not any(by_choice):
        return Failure("nonsense", f"none of {', '.join(choices)} is among the likeliest tokens {listed[:3]!r:.200}")
    least = min(value for _, value in listed)
    return tuple(_total(values) if values else least for values in by_choice)


def _logprob(value: Any) -> float:
    """Return a log-probability; NaN and infinite ones, which servers write for a probability of 0, are passed on.

    Raises:
        TypeError, ValueError, OverflowError: it is no number, or that of a probability over 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    if value > _ROUNDING:
        raise ValueError(value)
    return float(value)


def _total(logprobs: Sequence[float]) -> float:
    """Return the log of the sum of probabilities."""
    top = max(logprobs)
    return top + math.log(sum(math.exp(logprob - top) for logprob in logprobs))
