"""The search for a form of a chat from which the chat template leaves nothing out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from alignlab.config.data import RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.chat.content_check import (
    Fragment,
    fragments_of,
    fragments_of_documents,
    fragments_of_tools,
    missing,
    other_fields,
)
from alignlab.data.chat.forms import forms_of
from alignlab.data.chat.thoughts import THOUGHT_FIELDS
from alignlab.data.notices import Notices
from alignlab.errors import ConfigError
from alignlab.types import Message

Tools = Sequence[Mapping[str, Any]]


class Render(Protocol):
    """Renders messages through a chat template."""

    def __call__(self, messages: Sequence[Message], *, tools: Tools, generation: bool) -> str:
        """Return the text; with `generation`, up to the beginning of the assistant's answer.

        Raises:
            BadRow: the template refuses the messages.
        """
        ...


@dataclass(frozen=True)
class LossCheck:
    """Finds the form of a chat from which a template leaves nothing out, for the rows of one renderer.

    Attributes:
        settings: settings of the rendering.
        notices: warnings that are logged once.
        render: the template.
        tools, values: tools and variables for the template.
        needs_thoughts: refuse a taught turn without its thought; otherwise a missing thought is logged once.
        marks_thoughts: True if the template writes thoughts of a field with its own marks instead of the usual tags.
    """

    settings: RenderSettings
    notices: Notices
    render: Render
    tools: Tools
    values: Mapping[str, Any]
    needs_thoughts: bool
    marks_thoughts: bool

    def form_of(self, messages: Sequence[Message], *, taught: Collection[int] = ()) -> Sequence[Message]:
        """Return the messages in a form from which the template leaves nothing out.

        Args:
            messages: a chat, to be continued by the assistant or with taught turns.
            taught: indices of the taught messages, which `check_taught` checks instead of this method.

        Raises:
            BadRow: the template refuses the messages, or leaves a part out, in every form.
            ConfigError: the template refuses, or leaves out, the system prompt or the tools of the settings.
        """
        generation = not taught
        form, lost = self._best_form(messages, generation=generation)
        if form is None:
            raise self._refusal(messages, generation=generation)
        lost = [fragment for fragment in lost if fragment.message not in taught]
        self._refuse_lost([*lost, *self._unused_tools(form, generation=generation)], messages)
        self._say_unwritten(form, generation=generation)
        return form

    def check_taught(self, messages: Sequence[Message], index: int, turn: str) -> None:
        """Refuse a taught turn that leaves out a part of its message.

        Args:
            messages: the conversation, as the row has it.
            index: index of the taught message.
            turn: rendered text of the taught turn.

        Raises:
            BadRow: a text, a call or, with `needs_thoughts`, a thought is missing.
        """
        fragments = [fragment for fragment in fragments_of(messages[: index + 1]) if fragment.message == index]
        for fragment in missing(fragments, turn):
            if fragment.kind == "thought" and not self.needs_thoughts:
                self.notices.say("thoughts", "the chat template leaves out %s; it is not read", fragment.described)
                continue
            raise BadRow(
                "not_rendered",
                f"has {fragment.described}, and the chat template leaves it out of the turn that is taught; "
                f"{self._instead(fragment, messages)}",
            )

    def _unused_tools(self, form: Sequence[Message], *, generation: bool) -> list[Fragment]:
        """Return the tools if the template ignores them; their names may still occur, in calls."""
        if not self.tools or not self._is_same(form, form, without_tools=True, generation=generation):
            return []
        return fragments_of_tools(self.tools)

    def _is_same(
        self, form: Sequence[Message], changed: Sequence[Message], *, generation: bool, without_tools: bool = False
    ) -> bool:
        """Return True if the template writes the same text for changed messages or without tools."""
        try:
            text = self.render(changed, tools=() if without_tools else self.tools, generation=generation)
        except BadRow:  # the template needs the part that was taken out
            return False
        return text == self.render(form, tools=self.tools, generation=generation)

    def _say_unwritten(self, form: Sequence[Message], *, generation: bool) -> None:
        """Log once each further field of messages, such as `name`, that the template ignores."""
        for (role, name), index in other_fields(form).items():
            kind = f"field {name} of {role}"
            if self.notices.was_said(kind):
                continue
            without = [
                {key: held for key, held in message.items() if key != name or message["role"] != role}
                for message in form
            ]
            if self._is_same(form, without, generation=generation):
                self.notices.say(
                    kind,
                    "the field %r (%.60r) of message %d (%s) is not read, for the chat template writes nothing of it; "
                    "if the model has to know it, write it into the content",
                    name, form[index][name], index, role,
                )

    def _best_form(
        self, messages: Sequence[Message], *, generation: bool
    ) -> tuple[Sequence[Message] | None, list[Fragment]]:
        """Return the first form with the fewest lost fragments, and these fragments.

        The form is None if the template refuses the messages unchanged, and every other form loses more than thoughts
        of earlier turns.
        """
        fragments = [
            *fragments_of(messages), *fragments_of_tools(self.tools),
            *fragments_of_documents(self.values.get("documents")),
        ]  # fmt: skip
        best: Sequence[Message] | None = None
        least, refused = fragments, False
        for form in self._forms(messages):
            try:
                rendered = self.render(form, tools=self.tools, generation=generation)
            except BadRow:
                refused = refused or form == list(messages)
                continue
            lost = missing(fragments, rendered)
            if best is None or len(lost) < len(least):
                best, least = form, lost
            if self._is_enough(lost, fragments):
                break
        if refused and not all(map(_is_earlier_thought, least)):
            return None, least
        return best, least

    def _is_enough(self, lost: Sequence[Fragment], fragments: Sequence[Fragment]) -> bool:
        """Return True if no further form has to be tried.

        That is if nothing is lost or, for a template with its own marks for thoughts, only thoughts of earlier turns.
        """
        if not lost or not self.marks_thoughts:
            return not lost
        num_thoughts = sum(fragment.kind == "thought" for fragment in fragments)
        return all(map(_is_earlier_thought, lost)) and len(lost) < num_thoughts

    def _forms(self, messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
        return forms_of(messages, fields_first=self.marks_thoughts)

    def _refusal(self, messages: Sequence[Message], *, generation: bool) -> Exception:
        """Return the error of messages that the template refuses in every form."""
        try:
            self.render(messages, tools=self.tools, generation=generation)
        except BadRow as error:
            without = messages[1:] if self._has_set_system(messages) else ()
            if without and self._best_form(without, generation=generation)[0] is not None:
                return ConfigError(
                    f"{self.settings.setting('system_prompt')} is given, and the chat template takes no system message "
                    f"before these messages ({error}); {self._instead_of_system()}"
                )
            return error
        raise AssertionError("the messages as they are were one of the forms that were tried")

    def _refuse_lost(self, lost: Sequence[Fragment], messages: Sequence[Message]) -> None:
        earlier = list(filter(_is_earlier_thought, lost))
        if earlier:
            self.notices.say(
                "earlier thoughts",
                "the chat template leaves out what the assistant thought in an earlier turn, here %s; a model that is "
                "used by this template never reads it either",
                earlier[0].described,
            )
        for fragment in lost:
            if fragment in earlier:
                continue
            if fragment.kind == "tool" and self.tools is self.settings.tools:
                raise ConfigError(
                    f"{self.settings.setting('tools')} has {fragment.described}, and the chat template does not write "
                    "it; use a tokenizer whose chat template takes tools, or remove the setting"
                )
            if fragment.message == 0 and self._has_set_system(messages):
                raise ConfigError(
                    f"{self.settings.setting('system_prompt')} is given, and the chat template leaves system messages "
                    f"out; {self._instead_of_system()}"
                )
            fix = self._instead(fragment, messages)
            raise BadRow("not_rendered", f"has {fragment.described}, and the chat template leaves it out; {fix}")

    def _has_set_system(self, messages: Sequence[Message]) -> bool:
        """Return True if the first message is the system prompt of the settings."""
        first = messages[0]
        return first["role"] == "system" and first["content"] == self.settings.system_prompt

    def _instead(self, lost: Fragment, messages: Sequence[Message]) -> str:
        """Return the advice about a fragment that the template leaves out."""
        fix = "use a tokenizer whose chat template writes it, or remove it from the row"
        in_content = self._is_kept_in_content(lost, messages)
        return f"{fix}, or write it into the content, between <think> and </think>" if in_content else fix

    def _is_kept_in_content(self, lost: Fragment, messages: Sequence[Message]) -> bool:
        """Return True if the template would write a thought of a field once it were in tags in the content."""
        message = messages[lost.message]
        if lost.kind != "thought" or not any(message.get(name) for name in THOUGHT_FIELDS):
            return False
        without_thoughts = {key: field for key, field in message.items() if key not in THOUGHT_FIELDS}
        tagged = {**without_thoughts, "content": f"<think>\n{lost.text}\n</think>\n\n{message['content']}"}
        try:
            rendered = self.render([*messages[: lost.message], tagged], tools=self.tools, generation=False)
        except BadRow:
            return False
        return not missing([lost], rendered)

    def _instead_of_system(self) -> str:
        return (
            f"put the text into {self.settings.setting('prompt_template')}, which is put around plain prompts, or "
            "remove it"
        )


def _is_earlier_thought(fragment: Fragment) -> bool:
    """Return True if a lost fragment, which is in no taught turn, is a thought of the assistant."""
    return fragment.kind == "thought" and fragment.role == "assistant"
