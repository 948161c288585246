"""The end of a thinking model's reasoning, behind which its answer stands."""

from __future__ import annotations

import re
from typing import Literal

Thinking = Literal["auto", "required", "keep"]

# Closing tags in the chat templates of different model families.
_ENDS = (
    "</think>", "</thinking>", "</thought>", "</reasoning>", "</seed:think>", "[/THINK]", "◁/think▷",
    "<|channel|>final<|message|>", "<|end_of_thought|>", "</thoughts>",
)  # fmt: skip
_START = re.compile(
    r"\A\s*(?:<think>|<thinking>|<thought>|<thoughts>|<reasoning>|<seed:think>|\[THINK\]|◁think▷|<\|channel\|>analysis|<\|begin_of_thought\|>)"
)


def after_thinking(text: str, thinking: Thinking = "auto") -> str | None:
    """Return what follows a thinking model's reasoning; None where there is nothing that could be an answer.

    Args:
        text: a completion.
        thinking: "auto": what follows the last closing tag, nothing where an opening tag is never closed, else all.
            "required": what follows the last closing tag, and nothing where there is none, for templates that open the
            reasoning in the prompt. "keep": the whole, tags and reasoning included.
    """
    if thinking == "keep":
        return text
    end = max((text.rfind(tag) + len(tag) for tag in _ENDS if tag in text), default=None)
    if end is not None:
        return text[end:]
    if thinking == "required" or _START.match(text):
        return None
    return text
