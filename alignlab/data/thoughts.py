"""Thoughts of the assistant's: the fields that messages have them in, and the tags that mark them in a content."""

from __future__ import annotations

import re

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message may have what the assistant thought before its answer."""
THOUGHT_TAG = re.compile(r"<(/?)(?:think|thinking|thought|thoughts|reasoning)>|\[(/?)THINK\]")


def thoughts_and_texts(content: str) -> list[tuple[bool, str]]:
    """Return a content cut at the tags around thoughts: of each piece whether it is a thought, and its text."""
    pieces, place, thinks = [], 0, False
    for tag in THOUGHT_TAG.finditer(content):
        closes = bool(tag[1] or tag[2])
        pieces.append((thinks or closes, content[place : tag.start()]))
        place, thinks = tag.end(), not closes
    return [*pieces, (thinks, content[place:])]


def split_thought(content: str) -> tuple[str, str] | None:
    """Return (thought, answer) of a content that is one thought in tags and what follows it; else None.

    The opening tag may be missing, as where the prompt has it; the closing one may not.
    """
    pieces = thoughts_and_texts(content)
    is_open = pieces[-1][0]
    held = [(thinks, text.strip()) for thinks, text in pieces if text.strip()]
    if is_open or [thinks for thinks, _ in held] not in ([True], [True, False]):
        return None
    return held[0][1], "".join(text for _, text in held[1:])
