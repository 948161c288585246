"""What a judge is asked through: a model that says how likely each of some choices is its answer, or writes a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Conversation = Sequence[dict[str, Any]]
FailureKind = Literal["nonsense", "timeout", "unreachable", "refused"]


@dataclass(frozen=True)
class Failure:
    """A question without an answer.

    Attributes:
        kind: nonsense: the answer is none of the choices; timeout; unreachable: no connection, or the server's fault;
            refused: the question was understood, and is not answered.
        message: what happened.
    """

    kind: FailureKind
    message: str


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
