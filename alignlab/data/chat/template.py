"""Calls of a tokenizer's chat template, with a fixed date and a generation prompt for templates that lack one."""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.chat.thoughts import THOUGHT_FIELDS, THOUGHT_TAG
from alignlab.data.notices import Notices
from alignlab.errors import ConfigError, DataError
from alignlab.models.hub.template_limits import render_template
from alignlab.types import Message

RESERVED_NAMES = frozenset(
    (
        "conversation", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
        "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
        "strftime_now",
    )
)  # fmt: skip
"""Variables that `chat_template_kwargs` must not set, because they are set otherwise."""
_THOUGHT_FIELD = re.compile(rf"\b(?:{'|'.join(THOUGHT_FIELDS)})\b")
_PROBE = ({"role": "user", "content": "A question?"}, {"role": "assistant", "content": "ANSWER-OF-THE-PROBE"})


class ChatTemplate:
    """Renders messages by a tokenizer's template, always with the same date.

    If the template ignores `add_generation_prompt`, the header that it writes before an answer is added.

    Raises:
        ConfigError: the tokenizer has several templates, and none is the default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: RenderSettings, notices: Notices) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._moment = datetime.datetime.combine(settings.template_date, datetime.time())
        self._notices = notices
        self._headers: dict[str, str] = {}  # by the variables of the template; shared by the rows

    def with_notices(self, notices: Notices) -> Self:
        """Return the same template with other notices."""
        template = copy.copy(self)
        template._notices = notices
        return template

    def check_values(self, values: Mapping[str, Any], source: str) -> None:
        """Log once each name in `values` that is no variable of the template; `source` is where the values come from.

        Raises:
            ConfigError: there are several templates, and none is the default.
        """
        text = self._text(values)
        for name in values:
            if name not in ("chat_template", "documents") and not re.search(rf"\b{re.escape(name)}\b", text):
                self._notices.say(
                    f"variable {name}", "%s has %r, which the chat template has no variable for: it changes nothing",
                    source, name,
                )

    def _text(self, values: Mapping[str, Any]) -> str:
        try:
            return str(self._tokenizer.get_chat_template(values.get("chat_template")))
        except ValueError as error:
            raise ConfigError(
                f"the tokenizer has several chat templates: {error}; name one in "
                f"{self._settings.setting('chat_template_kwargs')}, as {{chat_template: NAME}}"
            ) from error

    def marks_thoughts(self, values: Mapping[str, Any]) -> bool:
        """Return True if the template reads a field for thoughts, and writes thoughts without the usual tags."""
        text = self._text(values)
        return _THOUGHT_FIELD.search(text) is not None and THOUGHT_TAG.search(text) is None

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]], values: Mapping[str, Any],
        generation: bool, open_ended: bool,
    ) -> str:
        """Return the text of the messages.

        Args:
            generation: add the beginning of the assistant's turn.
            open_ended: leave out the end of the last message.

        Raises:
            BadRow: the template refuses the messages, or prints the parts of a content as Python does.
            DataError: the template does not end within its limits.
        """
        text = self._call(messages, tools, values, generation=generation, open_ended=open_ended)
        return text + self._header(values) if generation else text

    def _call(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], values: Mapping[str, Any], *,
        generation: bool, open_ended: bool,
    ) -> str:
        try:
            text = render_template(
                self._tokenizer, messages,
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=generation,
                continue_final_message=open_ended,
                strftime_now=self._today,
                **values,
            )
        except DataError:  # the template's fault, not the row's
            raise
        except Exception as error:  # templates raise any kind of error
            raise BadRow("wrong_type", f"has messages that the chat template refuses: {error}") from error
        if any(isinstance(message.get("content"), list) for message in messages) and "{'type': 'text'" in text:
            raise BadRow("wrong_type", "has a content in parts that the chat template prints as Python does")
        return text

    def _today(self, form: str) -> str:
        self._notices.say(
            "date",
            "the chat template writes today's date, and is given %s on every day, so that the tokens of a run stay the "
            "same; see %s",
            self._moment.date(), self._settings.setting("template_date"),
        )
        return self._moment.strftime(form)

    def _header(self, values: Mapping[str, Any]) -> str:
        """Return the header of an answer if the template does not write it itself; empty for most templates."""
        key = repr(sorted(values.items(), key=lambda item: item[0]))
        if key not in self._headers:
            self._headers[key] = self._missing_header(values)
        return self._headers[key]

    def _missing_header(self, values: Mapping[str, Any]) -> str:
        try:
            prompted = self._call(_PROBE[:1], (), values, generation=True, open_ended=False)
            closed = self._call(_PROBE[:1], (), values, generation=False, open_ended=False)
            answered = self._call(_PROBE, (), values, generation=False, open_ended=False)
        except BadRow:  # the template cannot be probed: add nothing
            return ""
        before, answer, _ = answered.partition(_PROBE[1]["content"])
        header = before.removeprefix(closed)
        opening = closed.partition(_PROBE[0]["content"])[0]
        names_no_speaker = not header.strip() or opening.endswith(header)
        if prompted != closed or not answer or not before.startswith(closed) or names_no_speaker:
            return ""
        self._notices.say(
            "header",
            "the chat template has no generation prompt; the header %r, which it writes before an answer, begins the "
            "assistant's turn",
            header,
        )
        return header
