"""Rendering of texts and messages to strings and tokens for a model, with a check that nothing is lost."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.chat.content_check import fragments_of, fragments_of_tools, missing
from alignlab.data.chat.forms import forms_of_tools
from alignlab.data.chat.from_text import with_chats
from alignlab.data.chat.lossless import LossCheck
from alignlab.data.chat.special_text import SpecialText, unmarked, with_marks
from alignlab.data.chat.template import RESERVED_NAMES, ChatTemplate
from alignlab.data.chat.tool_calls import template_values_of, tools_of
from alignlab.data.messages import check_media, check_text
from alignlab.data.notices import Notices
from alignlab.data.rows import check_text_sizes, plain_row
from alignlab.errors import ConfigError
from alignlab.types import Message, Text

_QUESTION: tuple[Message, ...] = ({"role": "user", "content": "A question?"},)
_SYSTEM_FIX = "give it as a message of the role system, or for all rows as the setting system_prompt"
_MASK_FIX = "the assistant's messages are taught, except those whose field weight is 0"
_CONTEXT_FIX = "where the model needs it for its answer, write it into the prompt"
_UNREAD_COLUMNS = {
    "system": _SYSTEM_FIX, "system_prompt": _SYSTEM_FIX, "functions": "call it tools",
    **dict.fromkeys(("input", "context", "history", "choices", "options"), _CONTEXT_FIX),
    "completion_mask": _MASK_FIX, "assistant_masks": _MASK_FIX,
}  # fmt: skip
"""Columns of other programs' data that are not rendered, and what to do instead."""


class PromptRenderer:
    """Renders texts and messages to strings and token ids, by one group of settings.

    The chat template writes the special tokens of a chat itself, so none is added. A plain prompt gets the special
    tokens that the tokenizer adds: at most one at the beginning, and none at the end.

    A row is refused if the rendered text leaves a part of it out; so are settings, by a `ConfigError`. Parts that a
    template leaves out by design, such as thoughts of earlier turns, are logged once.

    Args:
        settings: how rows are rendered.
        tokenizer: the model's tokenizer, with its chat template.
        needs_thoughts: refuse a taught turn without its thought; otherwise a missing thought is logged once.
        notices: warnings that are logged once; default: new ones.
    """

    def __init__(
        self, settings: RenderSettings, tokenizer: PreTrainedTokenizerBase, *, needs_thoughts: bool = True,
        notices: Notices | None = None,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.needs_thoughts = needs_thoughts
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self.chat = has_template if settings.chat is None else settings.chat
        self._check_settings(has_template)
        self.notices = notices or Notices(settings.source)
        self._special = SpecialText(tokenizer)
        self._template = ChatTemplate(tokenizer, settings, self.notices) if self.chat else None
        self._values: dict[str, Any] = dict(settings.chat_template_kwargs)
        self._tools: Sequence[Mapping[str, Any]] = self._rendered_form(settings.tools)
        if self._template is not None:
            self._template.check_values(self._values, settings.setting("chat_template_kwargs"))

    def _check_settings(self, has_template: bool) -> None:
        settings = self.settings
        if self.chat and not has_template:
            raise ConfigError(
                f"{settings.setting('chat')} is true, and the tokenizer has no chat template; set "
                f"{settings.setting('chat', False)}"
            )
        if not self.chat:
            self._check_plain_settings()
        reserved = RESERVED_NAMES.intersection(settings.chat_template_kwargs)
        if reserved:
            raise ConfigError(
                f"{settings.setting('chat_template_kwargs')} must not hold {min(reserved)!r}, which is given by other "
                "means; remove it"
            )
        for tool in settings.tools:
            try:
                tools_of([tool])
            except BadRow as error:
                raise ConfigError(f"{settings.setting('tools')} {error}; correct it") from error

    def _check_plain_settings(self) -> None:
        settings = self.settings
        if settings.system_prompt is not None:
            raise ConfigError(
                f"{settings.setting('system_prompt')} needs a chat template, and prompts are plain here; "
                f"put the text into {settings.setting('prompt_template')} instead"
            )
        for name in ("tools", "chat_template_kwargs"):
            if getattr(settings, name):
                raise ConfigError(
                    f"{settings.setting(name)} needs a chat template, and prompts are plain here; remove it, or use a "
                    "tokenizer with a chat template"
                )

    def read(self, raw_row: Any, index: int) -> tuple[dict[str, Any], PromptRenderer]:
        """Return a row as a plain dict, in which chats written as text are lists of messages, and the row's renderer.

        Raises:
            BadRow: the row is damaged or far too long; or see `of_row`.
        """
        row = plain_row(raw_row)
        check_text_sizes(row, self.settings.prompt_column, self.settings.max_prompt_tokens)
        renderer = self.of_row(row, index)
        if self.settings.chat is not False:
            row = with_chats(row, self.settings.prompt_column, renderer.notices)
        return row, renderer

    def of_row(self, columns: Mapping[str, Any], index: int) -> PromptRenderer:
        """Return the renderer of one row, with the tools and the template's variables in its columns.

        Raises:
            BadRow: these columns cannot be read, or the row has an image, a video or a sound.
        """
        if not isinstance(columns, Mapping):
            return self
        check_media(columns)
        renderer = copy.copy(self)
        renderer.notices = self.notices.of_row(index)
        renderer._say_unread(columns)
        tools, values = (columns.get(name) for name in ("tools", "chat_template_kwargs"))
        if self._template is None:
            if tools or values:
                self.notices.of_row(index).say(
                    "plain", "the column %r is for a chat template, and prompts are plain here: it is not rendered",
                    "tools" if tools else "chat_template_kwargs",
                )
            return renderer
        renderer._template = self._template.with_notices(renderer.notices)
        if values is not None:
            row_values = template_values_of(values)
            reserved = RESERVED_NAMES.intersection(row_values)
            if reserved:
                raise BadRow("wrong_type", f"has {min(reserved)!r} in 'chat_template_kwargs', which is given otherwise")
            renderer._values = self._values | row_values
            renderer._template.check_values(row_values, "the column 'chat_template_kwargs'")
        if tools is not None:
            renderer._tools = renderer._rendered_form(tools_of(tools))
        return renderer

    def _rendered_form(self, tools: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return tools in the form whose names the chat template writes; unchanged if there is no such form."""
        if self._template is None or not tools:
            return tools
        for form in forms_of_tools(tools):
            try:
                text = self._render(_QUESTION, form, generation=True, continue_last=False)
            except BadRow:
                continue
            if not missing(fragments_of_tools(tools), unmarked(text)):
                return form
        return tools

    def _say_unread(self, columns: Mapping[str, Any]) -> None:
        """Log once that a column of other programs' data is not rendered."""
        prompt_column = self.settings.prompt_column
        for name, fix in _UNREAD_COLUMNS.items():
            if columns.get(name) is not None and name != prompt_column:
                self.notices.say(f"unread {name}", "the column %r is not rendered; %s", name, fix)
        if columns.get("messages") is not None and columns.get(prompt_column) is not None:
            self.notices.say("unread messages", "the column 'messages' is not rendered beside %r", prompt_column)

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Spellings of the tokenizer's special tokens."""
        return self._special.spellings

    @property
    def template_columns(self) -> dict[str, Any]:
        """Tools and variables of the chat template, as columns of a row that is rendered without these settings."""
        columns = {"tools": [dict(tool) for tool in self._tools], "chat_template_kwargs": self._values}
        return {name: value for name, value in columns.items() if value}

    def __call__(self, text: Text) -> str:
        """Return the rendered prompt of a completion.

        If the last message is the assistant's, the completion continues it.
        """
        if not self.chat:
            return self._plain(text)
        messages = self.lossless(self.messages(text))
        return self.render_chat(messages)

    def messages(self, text: Text) -> list[Message]:
        """Return the prompt as chat messages, with `system_prompt` first unless the prompt has a system message."""
        if not self.chat:
            raise ConfigError(self._not_chat())
        if isinstance(text, str):
            text = [{"role": "user", "content": self._around(text)}]
        elif self.settings.prompt_template is not None:
            raise ConfigError(
                f"{self.settings.setting('prompt_template')} is put around plain prompts, and a row's prompt is a list "
                "of messages; remove it"
            )
        checked = check_text(text, self.settings.prompt_column)
        assert not isinstance(checked, str)
        if self.settings.system_prompt is None or checked[0]["role"] == "system":
            return list(checked)
        return [{"role": "system", "content": self.settings.system_prompt}, *checked]

    def lossless(self, messages: Sequence[Message], *, taught: Collection[int] = ()) -> Sequence[Message]:
        """Return the messages in the form in which the chat template writes all of them; see `LossCheck.form_of`."""
        self._say_special(messages)
        return self._loss_check.form_of(messages, taught=taught)

    def check_taught(self, messages: Sequence[Message], index: int, turn: str) -> None:
        """Refuse a taught turn in which something of its message is not; see `LossCheck.check_taught`."""
        self._loss_check.check_taught(messages, index, unmarked(turn))

    @property
    def _loss_check(self) -> LossCheck:
        assert self._template is not None
        return LossCheck(
            self.settings, self.notices, self._unmarked, self._tools, self._values, self.needs_thoughts,
            self._template.marks_thoughts(self._values),
        )

    def _unmarked(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]], generation: bool) -> str:
        return unmarked(self._render(messages, tools, generation=generation, continue_last=True))

    def render_chat(self, messages: Sequence[Message], *, generation: bool = True, continue_last: bool = True) -> str:
        """Return the template's text of the messages; with `generation`, up to the beginning of the answer.

        Args:
            messages: the chat, at least one message, in the form that `lossless` returns.
            generation: add the beginning of the assistant's turn.
            continue_last: if the last message is the assistant's, continue it instead of beginning another turn.
        """
        return self._render(messages, self._tools, generation=generation, continue_last=continue_last)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, generation: bool, continue_last: bool
    ) -> str:
        assert self._template is not None
        open_ended = generation and continue_last and messages[-1]["role"] == "assistant"
        plain_tools: Any = list(tools)
        plain_messages: Any = [dict(message) for message in messages]
        if self.settings.escape_special_tokens:
            plain_messages, plain_tools = self._special.marked(plain_messages), self._special.marked(plain_tools)
        text = self._template.render(
            plain_messages, tools=plain_tools, values=self._values, generation=generation and not open_ended,
            open_ended=open_ended,
        )
        return with_marks(text) if self.settings.escape_special_tokens else text

    def check_length(self, token_ids: Sequence[int]) -> None:
        """Refuse a prompt of no tokens, or of more than `max_prompt_tokens`."""
        if not token_ids:
            raise BadRow("empty", "has a prompt of no tokens")
        if len(token_ids) > self.settings.max_prompt_tokens:
            raise BadRow(
                "too_long",
                f"has a prompt of {len(token_ids)} tokens, and {self.settings.setting('max_prompt_tokens')} is "
                f"{self.settings.max_prompt_tokens}; raise it",
            )

    def plain_completion(self, text: str) -> str:
        """Return the text of a completion of a plain prompt, to be encoded."""
        return self._checked_plain(text, text.removesuffix(str(self.tokenizer.eos_token)))

    def _plain(self, text: Text) -> str:
        if not isinstance(text, str):
            raise ConfigError(self._not_chat())
        return self._around(self._checked_plain(text, text.removeprefix(str(self.tokenizer.bos_token))))

    def _checked_plain(self, text: str, checked_part: str) -> str:
        """Return a plain text, with marks in special tokens that are to be encoded as text.

        Args:
            checked_part: the text without a special token at its beginning or end, which is meant as such.
        """
        if self.settings.escape_special_tokens:
            return str(self._special.marked(text))
        self._say_special([{"role": "user", "content": checked_part}])
        return text

    def _around(self, text: str) -> str:
        template = self.settings.prompt_template
        return text if template is None else template.replace("{prompt}", text)

    def _say_special(self, messages: Sequence[Message]) -> None:
        """Log once that spellings of special tokens in a row are encoded as these tokens."""
        if self.settings.escape_special_tokens or self.notices.was_said("special"):
            return
        for fragment in fragments_of(messages):
            spelled = self._special.spelled_in(fragment.text)
            if spelled is not None:
                self.notices.say(
                    "special",
                    "the text spells the special token %s and is encoded as that token; to have such tokens in rows as "
                    "text, set %s",
                    spelled, self.settings.setting("escape_special_tokens", True),
                )
                return

    def _not_chat(self) -> str:
        return (
            f"a row's prompt is a list of chat messages, and prompts are plain here ({self.settings.setting('chat')} "
            "is false, or the tokenizer has no chat template); use a tokenizer with one, or plain prompts"
        )

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the token ids of rendered prompts."""
        if not texts:
            return []
        ids = self._special.encode(texts, add_special_tokens=not self.chat)
        if self.chat:
            return [tuple(row) for row in ids]
        return [self._plain_ids(text, row) for text, row in zip(texts, ids, strict=True)]

    def encode_alone(self, text: str) -> list[int]:
        """Return the token ids of a piece of a rendered text, without special tokens that the tokenizer adds."""
        return self._special.encode([text], add_special_tokens=False)[0]

    def _plain_ids(self, text: str, ids: list[int]) -> tuple[int, ...]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if eos is not None and len(ids) > 1 and ids[-1] == eos and not text.endswith(str(self.tokenizer.eos_token)):
            ids = ids[:-1]
        return tuple(ids)
