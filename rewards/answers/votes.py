"""Votes: a reward names the function that reads a completion's answer, so that equal answers can be counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Reward = TypeVar("_Reward", bound=Callable[..., Any])
ReadAnswer = Callable[..., str | None]
SameAnswer = Callable[[str, str], bool]


def reads_answers(read: ReadAnswer, same: SameAnswer | None = None) -> Callable[[_Reward], _Reward]:
    """Return a decorator that gives a reward the attributes `read_answer` and `same_answer`.

    Args:
        read: from a completion's text, and the reward's options that it names, to the answer; None where the
            completion states none.
        same: whether two answers are one; default: equal texts.
    """

    def attach(reward: _Reward) -> _Reward:
        reward.read_answer = read  # type: ignore[attr-defined]
        reward.same_answer = same  # type: ignore[attr-defined]
        return reward

    return attach
