"""How a judge and a critic are asked: conversations made of a prompt, completions and a principle of the constitution.

Comparison and choice tokens "1" and "2": Lee et al. (2023), arXiv:2309.00267, Sec. 2.1. Critique and revision: Bai et
al. (2022), arXiv:2212.08073, Sec. 3.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from alignlab.config.constitution import Constitution, Principle
from alignlab.rlaif.chat_model import Conversation
from alignlab.types import Message, Text, message_text

FIRST_OR_SECOND = ("1", "2")


def ratings(max_rating: int) -> tuple[str, ...]:
    """The choices of a rating."""
    return tuple(str(rating) for rating in range(1, max_rating + 1))


def comparison(
    constitution: Constitution, principle: Principle, prompt: Text, first: str, second: str, *, reason: bool
) -> Conversation:
    """Which of two completions is better; with `reason` the judge thinks aloud before it says so."""
    ask = (
        "Think about it step by step, and end with 1 or 2 on a line of its own."
        if reason
        else "Reply with 1 or 2 only."
    )
    shown = f"{_shown(prompt)}\n\nAnswer 1: {first}\n\nAnswer 2: {second}"
    return _asked(constitution, f"{shown}\n\n{principle.prefer} {ask}")


def rating(
    constitution: Constitution, principle: Principle, prompt: Text, answer: str, *, max_rating: int, reason: bool
) -> Conversation:
    """How good one completion is, from 1 to `max_rating`."""
    scale = f"Rate it from 1 to {max_rating}, where {max_rating} is best."
    ask = "Think about it step by step, and end with the number on a line of its own." if reason else (
        "Reply with the number only."
    )
    return _asked(constitution, f"{_shown(prompt)}\n\nAnswer: {answer}\n\n{principle.rate} {scale} {ask}")


def critique(constitution: Constitution, principle: Principle, prompt: Text, answer: str) -> Conversation:
    """What is wrong with a completion."""
    return _asked(constitution, f"{_shown(prompt)}\n\nAnswer: {answer}\n\n{principle.critique}")


def revision(
    constitution: Constitution, principle: Principle, prompt: Text, answer: str, remarks: str
) -> Conversation:
    """The completion written anew, in the light of what was said of it."""
    asked = critique(constitution, principle, prompt, answer)
    after = {"role": "user", "content": f"{principle.revise} Reply with the new answer only."}
    return [*asked, {"role": "assistant", "content": remarks}, after]


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """Which choice a sampled answer ends with; None where its last line is something else.

    The line may begin with words and a colon, be in bold, and name the scale behind its number ("7/9", "7 out of 9").
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    one = "|".join(map(re.escape, choices))
    scale = rf"(?:[\s*]*(?:/|out of)\s*{re.escape(choices[-1])})?"
    found = re.fullmatch(rf"(?:.*:)?[\s*]*({one}){scale}[\s*.]*", lines[-1]) if lines else None
    return choices.index(found[1]) if found else None


def _shown(prompt: Text) -> str:
    """The prompt as a judge reads it: a single message as it is, a conversation with who said what."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return f"Question: {message_text(prompt)}"
    return "\n".join(f"{message['role']}: {_said(message)}" for message in prompt)


def _said(message: Message) -> str:
    """What a message says, the calls of tools in it included."""
    calls = [
        json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()
    ]
    return "\n".join(part for part in (message_text([message]), *(f"(calls {call})" for call in calls)) if part)


def _asked(constitution: Constitution, question: str) -> Conversation:
    said = f"{constitution.introduction}\n\n{question}" if constitution.introduction else question
    return [{"role": "user", "content": said}]
