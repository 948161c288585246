"""Thoughts of the assistant (reasoning before an answer): fields of messages that hold them, and tags around them."""

from __future__ import annotations

import re

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that may hold the thought before its answer."""
THOUGHT_TAG = re.compile(r"<(/?)(?:think|thinking|thought|thoughts|reasoning)>|\[(/?)THINK\]")


def thoughts_and_texts(content: str) -> list[tuple[bool, str]]:
    """Return (is a thought, text) of each piece of a content, cut at the tags around thoughts."""
    pieces, start, is_thought = [], 0, False
    for tag in THOUGHT_TAG.finditer(content):
        is_closing = bool(tag[1] or tag[2])
        pieces.append((is_thought or is_closing, content[start : tag.start()]))
        start, is_thought = tag.end(), not is_closing
    return [*pieces, (is_thought, content[start:])]


def split_thought(content: str) -> tuple[str, str] | None:
    """Return (thought, answer) of a content that is one thought in tags, with or without text after it; else None.

    The opening tag may be missing, because the prompt may hold it; the closing tag must be there.
    """
    pieces = thoughts_and_texts(content)
    is_open = pieces[-1][0]
    texts = [(is_thought, text.strip()) for is_thought, text in pieces if text.strip()]
    if is_open or [is_thought for is_thought, _ in texts] not in ([True], [True, False]):
        return None
    return texts[0][1], "".join(text for _, text in texts[1:])
