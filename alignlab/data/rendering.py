"""Text and messages as the string and the tokens that a model is fed, with the proof that nothing was left out."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.render import RenderSettings
from alignlab.data.chat_forms import forms_of
from alignlab.data.chat_template import RESERVED_NAMES, ChatTemplate
from alignlab.data.content_check import (
    Fragment,
    fragments_of,
    fragments_of_documents,
    fragments_of_tools,
    missing,
)
from alignlab.data.messages import BadRow, check_media, check_text, template_values_of, tools_of
from alignlab.data.notices import Notices
from alignlab.data.special_text import SpecialText, unmarked, with_marks
from alignlab.errors import ConfigError
from alignlab.types import Message, Text

_SYSTEM_FIX = "give it as a message of the role system, or for all rows as the setting system_prompt"
_MASK_FIX = "what is taught are the assistant's messages, but for those whose field weight is 0"
_UNREAD_COLUMNS = {
    "system": _SYSTEM_FIX, "system_prompt": _SYSTEM_FIX,
    "completion_mask": _MASK_FIX, "assistant_masks": _MASK_FIX,
}  # fmt: skip
"""Columns that other programs' data have for the chat, and what to do instead."""


class PromptRenderer:
    """Text or messages to the string and the token ids that a model is fed, by one group of settings.

    A chat goes through the tokenizer's template, which writes the special tokens itself, so none is added to it. A
    plain prompt gets those that the tokenizer adds: one at the beginning at most, and none at the end.

    All that a row holds is in what is rendered, or the row is refused; what the settings hold likewise, or a
    `ConfigError` says so. What a template leaves out by design, such as thoughts of earlier turns, is logged once.

    Args:
        settings: how rows are rendered.
        tokenizer: the model's, with its chat template.
        needs_thoughts: refuse a taught turn without its thought; otherwise that is logged once.
        notices: what is logged once; default: notices of its own.
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
        self._tools: Sequence[Mapping[str, Any]] = settings.tools
        self._template = ChatTemplate(tokenizer, settings.template_date, self.notices) if self.chat else None
        self._values: dict[str, Any] = dict(settings.chat_template_kwargs)
        if self._template is not None:
            self._template.check_values(self._values, settings.setting("chat_template_kwargs"))

    def _check_settings(self, has_template: bool) -> None:
        settings = self.settings
        if self.chat and not has_template:
            raise ConfigError(
                f"{settings.setting('chat')} is true, and the tokenizer has no chat template; set "
                f"{settings.setting('chat', False)}"
            )
        if settings.system_prompt is not None and not self.chat:
            raise ConfigError(
                f"{settings.setting('system_prompt')} needs a chat template, and prompts are plain here; "
                f"put the text into {settings.setting('prompt_template')} instead"
            )
        for name in ("tools", "chat_template_kwargs"):
            if getattr(settings, name) and not self.chat:
                raise ConfigError(
                    f"{settings.setting(name)} needs a chat template, and prompts are plain here; remove it, or use a "
                    "tokenizer with a chat template"
                )
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

    def of_row(self, columns: Mapping[str, Any], index: int) -> PromptRenderer:
        """Return the renderer of one row, with the tools and the template's variables that its columns hold.

        Raises:
            BadRow: they cannot be read; or the row has an image, a film or a sound.
        """
        if not isinstance(columns, Mapping):
            return self
        check_media(columns)
        own = copy.copy(self)
        own.notices = self.notices.of_row(index)
        own._say_unread(columns)
        tools, values = (columns.get(name) for name in ("tools", "chat_template_kwargs"))
        if self._template is None:
            if tools or values:
                self.notices.of_row(index).say(
                    "plain", "the column %r is for a chat template, and prompts are plain here: it is not rendered",
                    "tools" if tools else "chat_template_kwargs",
                )
            return own
        own._template = self._template.with_notices(own.notices)
        if tools is not None:
            own._tools = tools_of(tools)
        if values is not None:
            given = template_values_of(values)
            reserved = RESERVED_NAMES.intersection(given)
            if reserved:
                raise BadRow("wrong_type", f"has {min(reserved)!r} in 'chat_template_kwargs', which is given otherwise")
            own._values = self._values | given
            own._template.check_values(given, "the column 'chat_template_kwargs'")
        return own

    def _say_unread(self, columns: Mapping[str, Any]) -> None:
        """Log once that a column which others' data have for the chat is not read."""
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
        """What the chat template is given beside messages, as columns of a row that is read without these settings."""
        given = {"tools": [dict(tool) for tool in self._tools], "chat_template_kwargs": self._values}
        return {name: value for name, value in given.items() if value}

    def __call__(self, text: Text) -> str:
        """Return the string that the model reads before it writes its completion.

        A last message of the assistant's is left open, so that the completion continues it.
        """
        if not self.chat:
            return self._plain(text)
        messages = self.lossless(self.messages(text))
        return self.render_chat(messages)

    def messages(self, text: Text) -> list[Message]:
        """Return the prompt as chat messages, with `system_prompt` first unless it has a system message of its own."""
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
        """Return the messages in the form in which the chat template writes all of them.

        Args:
            messages: a chat, which is rendered as it is used: up to where the assistant goes on, or with taught turns.
            taught: indices of messages whose thoughts are looked for where they are taught, and not here.

        Raises:
            BadRow: the template refuses them in every form, or leaves something out in every form.
            ConfigError: the template does that with the settings' system prompt or tools alone.
        """
        self._say_special(messages)
        form, lost = self._best_form(messages, generation=not taught)
        if form is None:
            raise self._refusal(messages, generation=not taught)
        lost = [fragment for fragment in lost if fragment.message not in taught]
        self._refuse_lost([*lost, *self._unused_tools(form, generation=not taught)], messages)
        return form

    def _unused_tools(self, form: Sequence[Message], *, generation: bool) -> list[Fragment]:
        """Return the tools where they change nothing: their names may stand in calls, and not in a list of tools."""
        if not self._tools:
            return []
        without = copy.copy(self)
        without._tools = ()
        try:
            same = without.render_chat(form, generation=generation) == self.render_chat(form, generation=generation)
        except BadRow:  # of a template that needs tools
            same = False
        return fragments_of_tools(self._tools) if same else []

    def _best_form(
        self, messages: Sequence[Message], *, generation: bool
    ) -> tuple[Sequence[Message] | None, list[Fragment]]:
        """Return the first form of the fewest losses, and what is lost in it.

        The form is None where the template refuses the messages as they are, and no other form is without a loss but
        of thoughts.
        """
        wanted = [
            *fragments_of(messages),
            *fragments_of_tools(self._tools),
            *fragments_of_documents(self._values.get("documents")),
        ]
        best: Sequence[Message] | None = None
        least, refused = wanted, False
        for form in forms_of(messages):
            try:
                rendered = unmarked(self.render_chat(form, generation=generation))
            except BadRow:
                refused = refused or form == list(messages)
                continue
            lost = missing(wanted, rendered)
            if best is None or len(lost) < len(least):
                best, least = form, lost
            if not lost:
                break
        if refused and not all(map(_is_earlier_thought, least)):
            return None, least
        return best, least

    def _refusal(self, messages: Sequence[Message], *, generation: bool) -> Exception:
        """Return the error of messages that the template takes in no form."""
        try:
            self.render_chat(messages, generation=generation)
        except BadRow as error:
            without = messages[1:] if self._has_set_system(messages) else ()
            if without and self._best_form(without, generation=generation)[0] is not None:
                return ConfigError(
                    f"{self.settings.setting('system_prompt')} is given, and the chat template takes no system message "
                    f"before these messages ({error}); {self._instead_of_system()}"
                )
            return error
        raise AssertionError("the messages as they are were the first form to be tried")

    def _refuse_lost(self, lost: Sequence[Fragment], messages: Sequence[Message]) -> None:
        earlier = list(filter(_is_earlier_thought, lost))
        if earlier:
            self.notices.say(
                "earlier thoughts",
                "the chat template leaves out what the assistant thought in an earlier turn, here %s; a model that is "
                "used by this template never reads it either",
                earlier[0].described,
            )
        for one in lost:
            if one in earlier:
                continue
            if one.kind == "tool" and self._tools is self.settings.tools:
                raise ConfigError(
                    f"{self.settings.setting('tools')} has {one.described}, and the chat template does not write it; "
                    "use a tokenizer whose chat template takes tools, or remove the setting"
                )
            if one.message == 0 and self._has_set_system(messages):
                raise ConfigError(
                    f"{self.settings.setting('system_prompt')} is given, and the chat template leaves system messages "
                    f"out; {self._instead_of_system()}"
                )
            raise BadRow(
                "not_rendered",
                f"has {one.described}, and the chat template leaves it out; use a tokenizer whose chat template writes "
                "it, or remove it from the row",
            )

    def check_taught(self, messages: Sequence[Message], index: int, turn: str) -> None:
        """Refuse a taught turn in which something of its message is not.

        Args:
            messages: the conversation, not in a template's form.
            index: of the message that is taught.
            turn: what is taught of it.

        Raises:
            BadRow: a text, a call or, with `needs_thoughts`, a thought is missing.
        """
        own = [fragment for fragment in fragments_of(messages[: index + 1]) if fragment.message == index]
        for one in missing(own, unmarked(turn)):
            if one.kind == "thought" and not self.needs_thoughts:
                self.notices.say("thoughts", "the chat template leaves out %s; it is not read", one.described)
                continue
            raise BadRow(
                "not_rendered",
                f"has {one.described}, and the chat template leaves it out of the turn that is taught; use a tokenizer "
                "whose chat template writes it, or remove it from the row",
            )

    def _has_set_system(self, messages: Sequence[Message]) -> bool:
        """Whether the first message is the settings' system prompt."""
        first = messages[0]
        return first["role"] == "system" and first["content"] == self.settings.system_prompt

    def _instead_of_system(self) -> str:
        return (
            f"put the text into {self.settings.setting('prompt_template')}, which is put around plain prompts, or "
            "remove it"
        )

    def render_chat(self, messages: Sequence[Message], *, generation: bool = True, continue_last: bool = True) -> str:
        """Return the template's text of the messages; with `generation`, up to where the assistant goes on.

        Args:
            messages: the chat, at least one message, in a form that `lossless` gave.
            generation: add what begins the assistant's turn.
            continue_last: where the last message is the assistant's, go on with it instead of beginning another turn.
        """
        assert self._template is not None
        open_ended = generation and continue_last and messages[-1]["role"] == "assistant"
        tools: Any = list(self._tools)
        given: Any = [dict(message) for message in messages]
        if self.settings.escape_special_tokens:
            given, tools = self._special.marked(given), self._special.marked(tools)
        text = self._template.render(
            given, tools=tools, values=self._values, generation=generation and not open_ended, open_ended=open_ended
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
        """Return a completion of a plain prompt, to be encoded."""
        return self._checked_plain(text, text.removesuffix(str(self.tokenizer.eos_token)))

    def _plain(self, text: Text) -> str:
        if not isinstance(text, str):
            raise ConfigError(self._not_chat())
        return self._around(self._checked_plain(text, text.removeprefix(str(self.tokenizer.bos_token))))

    def _checked_plain(self, text: str, looked_at: str) -> str:
        """Return a plain text, with marks where special tokens in it are to be text."""
        if self.settings.escape_special_tokens:
            return str(self._special.marked(text))
        self._say_special([{"role": "user", "content": looked_at}])
        return text

    def _around(self, text: str) -> str:
        template = self.settings.prompt_template
        return text if template is None else template.replace("{prompt}", text)

    def _say_special(self, messages: Sequence[Message]) -> None:
        """Log once that a row's texts spell special tokens, and become them."""
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
        """Return the token ids of a piece of a rendered text, without any that the tokenizer adds."""
        return self._special.encode([text], add_special_tokens=False)[0]

    def _plain_ids(self, text: str, ids: list[int]) -> tuple[int, ...]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if eos is not None and len(ids) > 1 and ids[-1] == eos and not text.endswith(str(self.tokenizer.eos_token)):
            ids = ids[:-1]
        return tuple(ids)


def _is_earlier_thought(fragment: Fragment) -> bool:
    """Whether a fragment that is lost before a taught turn is a thought of the assistant's."""
    return fragment.kind == "thought" and fragment.role == "assistant"
