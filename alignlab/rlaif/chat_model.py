"""What a judge is asked through: a model that says how likely each of some choices is its answer, or writes a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from alignlab.errors import JudgeError

Conversation = Sequence[dict[str, Any]]
FailureKind = Literal["nonsense", "timeout", "unreachable", "unusable", "refused"]
DOWN = ("timeout", "unreachable", "unusable")
"""Failures that are the judge's, and not of one question."""


@dataclass(frozen=True)
class Failure:
    """A question without an answer.

    Attributes:
        kind: nonsense: the answer is none of the choices; timeout; unreachable: no connection, or the server's fault;
            unusable: the server answers nobody, as without a key, or not in the way that is asked; refused: this
            question is not answered.
        message: what happened.
    """

    kind: FailureKind
    message: str


def refuse_silence(answers: Sequence[object]) -> None:
    """A judge that answers nothing at all is not asked on and on.

    Raises:
        JudgeError: every answer is a failure of the judge's own.
    """
    down = [answer for answer in answers if isinstance(answer, Failure) and answer.kind in DOWN]
    if down and len(down) == len(answers):
        raise JudgeError(
            f"the judge answered none of {len(answers)} questions, the first because: {down[0].message}; see that it "
            "runs, and go on where it stopped (alignlab train --resume)"
        )


class ChatModel(Protocol):
    """A model that answers conversations.

    Attributes:
        identity: names all that its answers depend on.
        num_retries: requests that were sent once more.
    """

    identity: str
    num_retries: int

    def choose(
        self, conversations: Sequence[Conversation], choices: Sequence[str]
    ) -> list[tuple[float, ...] | Failure]:
        """Log-probability, in nats, of each choice as the beginning of the answer to each conversation.

        Raises:
            ConfigError: two choices begin with the same token.
        """
        ...

    def write(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[str | Failure]:
        """An answer to each conversation."""
        ...
