"""How rows become text and tokens, wherever the rows come from."""

from __future__ import annotations

from datetime import date
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.base import Frozen
from alignlab.config.messages import BrokenRule
from alignlab.config.on_resume import MayChange, OnResume


class RenderSettings(Frozen):
    """How rows become text and tokens: rows that a program has in memory, and those of a source (`DataSettings`)."""

    on_resume = OnResume.REFUSED
    size: int | None = Field(None, ge=1)
    """Rows to take; default all (for a task, 1000)."""
    prompt_column: str = "prompt"
    """A string, or a list of chat messages: OpenAI's or ShareGPT's, also as the text that a table has for it."""
    system_prompt: str | None = None
    prompt_template: str | None = None
    """Text with `{prompt}` in it, put around a plain prompt."""
    chat: bool | None = None
    """Render through the tokenizer's chat template; default: where the tokenizer has one."""
    max_prompt_tokens: int = Field(1024, ge=1)
    tools: tuple[dict[str, Any], ...] = ()
    """Tools that the chat template is given, as JSON schemas; a row's column `tools` has precedence."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as {enable_thinking: false}; those of a row's column of this name have
    precedence."""
    template_date: date = date(2024, 7, 26)
    """The day that a chat template takes for today: the same on every day, so that a run can be resumed."""
    escape_special_tokens: bool = False
    """Encode special tokens that a row's texts spell, such as <|im_end|>, as text; the template's own stay special."""
    taught_turns: Literal["together", "separately", "last"] = "together"
    """Of a conversation in supervised data: teach all of the assistant's turns in one example, each in an example of
    its own with the history as the template writes it there, or the last one alone."""
    on_bad_row: MayChange[Literal["error", "skip"]] = "error"
    """Bad rows, over-long prompts, and examples that the model has no positions for: stop with the number, or skip and
    count."""

    @property
    def source(self) -> str:
        """The name of the rows in messages."""
        return "the given rows"

    def setting(self, name: str, value: str | bool | None = None) -> str:
        """Return how the user of these settings writes one of them, with a value where one is advised."""
        return f"RenderSettings.{name}" if value is None else f"render_settings=RenderSettings({name}={value!r})"

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise BrokenRule("prompt_template", self.prompt_template, "contain {prompt}", "put it in")
        return self


class HeldOutSettings(RenderSettings):
    """How held-out rows that a program has in memory become text and tokens."""

    def setting(self, name: str, value: str | bool | None = None) -> str:
        """Return how the program gives one of them, with a value where one is advised."""
        if value is None:
            return f"eval_render_settings.{name}"
        return f"eval_render_settings=RenderSettings({name}={value!r})"


class FlagSettings(RenderSettings):
    """Settings that a command is given by its flags."""

    @property
    def source(self) -> str:
        """The name of the prompt in messages."""
        return "the prompt"

    def setting(self, name: str, value: str | bool | None = None) -> str:
        """Return the flag of a setting, with a value where one is advised; prompts without a chat are `--plain`."""
        if name == "chat":
            return "--plain"
        flag = f"--{name.replace('_', '-')}"
        return flag if value is None or value is True else f"{flag} {value}"
