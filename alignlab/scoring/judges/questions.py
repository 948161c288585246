"""Questions to a judge and a critic: conversations of a prompt, completions and a principle of the constitution.

Comparison and choice tokens "1" and "2": Lee et al. (2023), arXiv:2309.00267, Sec. 2.1. Critique and revision: Bai et
al. (2022), arXiv:2212.08073, Sec. 3.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from alignlab.config.judge import Constitution, Principle
from alignlab.scoring.judges.chat_model import Conversation
from alignlab.types import Message, Text, message_text

FIRST_OR_SECOND = ("1", "2")


def ratings(max_rating: int) -> tuple[str, ...]:
    """Return the choices of a rating: "1" to `max_rating`."""
    return tuple(str(rating) for rating in range(1, max_rating + 1))


def comparison(
    constitution: Constitution, principle: Principle, prompt: Text, first: str, second: str, *, reason: bool
) -> Conversation:
    """Ask which of two completions is better; with `reason` the judge reasons in writing before it answers."""
    ask = (
        "Think about it step by step, and end with 1 or 2 on a line of its own."
        if reason
        else "Reply with 1 or 2 only."
    )
    content = f"{_prompt_text(prompt)}\n\nAnswer 1: {first}\n\nAnswer 2: {second}"
    return _conversation(constitution, f"{content}\n\n{principle.prefer} {ask}")


def rating(
    constitution: Constitution, principle: Principle, prompt: Text, answer: str, *, max_rating: int, reason: bool
) -> Conversation:
    """Ask how good a completion is, from 1 to `max_rating`."""
    scale = f"Rate it from 1 to {max_rating}, where {max_rating} is best."
    ask = "Think about it step by step, and end with the number on a line of its own." if reason else (
        "Reply with the number only."
    )
    return _conversation(constitution, f"{_prompt_text(prompt)}\n\nAnswer: {answer}\n\n{principle.rate} {scale} {ask}")


def critique(constitution: Constitution, principle: Principle, prompt: Text, answer: str) -> Conversation:
    """Ask what is wrong with a completion."""
    return _conversation(constitution, f"{_prompt_text(prompt)}\n\nAnswer: {answer}\n\n{principle.critique}")


def revision(
    constitution: Constitution, principle: Principle, prompt: Text, answer: str, criticism: str
) -> Conversation:
    """Ask for a new version of a completion that takes a critique into account."""
    first_turn = critique(constitution, principle, prompt, answer)
    after = {"role": "user", "content": f"{principle.revise} Reply with the new answer only."}
    return [*first_turn, {"role": "assistant", "content": criticism}, after]


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that a sampled answer ends with; None if the last line is something else.

    The line may begin with words and a colon, be in bold, and name the scale behind its number ("7/9", "7 out of 9").
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    any_choice = "|".join(map(re.escape, choices))
    scale = rf"(?:[\s*]*(?:/|out of)\s*{re.escape(choices[-1])})?"
    match = re.fullmatch(rf"(?:.*:)?[\s*]*({any_choice}){scale}[\s*.]*", lines[-1]) if lines else None
    return choices.index(match[1]) if match else None


def _prompt_text(prompt: Text) -> str:
    """Return a prompt's text for a judge: the text of a single message, or a conversation with the roles."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return f"Question: {message_text(prompt)}"
    return "\n".join(f"{message['role']}: {_message_with_calls(message)}" for message in prompt)


def _message_with_calls(message: Message) -> str:
    """Return a message's text with its tool calls."""
    calls = [
        json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()
    ]
    return "\n".join(text for text in (message_text([message]), *(f"(calls {call})" for call in calls)) if text)


def _conversation(constitution: Constitution, question: str) -> Conversation:
    content = f"{constitution.introduction}\n\n{question}" if constitution.introduction else question
    return [{"role": "user", "content": content}]
