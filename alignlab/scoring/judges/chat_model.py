"""The interface of a judge's model: it gives the log-probability of each of some answers, or writes a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from alignlab.errors import JudgeError

Conversation = Sequence[dict[str, Any]]
FailureKind = Literal["nonsense", "timeout", "unreachable", "unusable", "refused"]
DOWN = ("timeout", "unreachable", "unusable")
"""Failures of the judge itself, rather than of one question."""


@dataclass(frozen=True)
class Failure:
    """A question without an answer.

    Attributes:
        kind: nonsense (the answer is none of the choices), timeout, unreachable (no connection, or a fault of the
            server), unusable (the server rejects every request, such as without a key, or answers in another form), or
            refused (the server rejects this request).
        message: what happened.
    """

    kind: FailureKind
    message: str


def raise_if_down(answers: Sequence[object]) -> None:
    """Raise if the judge itself fails at every question, so that it is not asked on and on.

    Raises:
        JudgeError: every answer is a failure of a kind in `DOWN`.
    """
    down = [answer for answer in answers if isinstance(answer, Failure) and answer.kind in DOWN]
    if down and len(down) == len(answers):
        raise JudgeError(
            f"the judge answered none of {len(answers)} questions, the first because: {down[0].message}; see that it "
            "runs, and start again (a run goes on by alignlab train --resume)"
        )


class ChatModel(Protocol):
    """A model that answers conversations.

    Attributes:
        identity: a text of all that the answers depend on.
        num_retries: number of requests that were sent again.
    """

    identity: str
    num_retries: int

    def choose(
        self, conversations: Sequence[Conversation], choices: Sequence[str]
    ) -> list[tuple[float, ...] | Failure]:
        """Return the log-probability, in nats, of each choice as the beginning of the answer to each conversation.

        Raises:
            ConfigError: two choices begin with the same token.
        """
        ...

    def write(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[str | Failure]:
        """Return a sampled answer to each conversation."""
        ...
