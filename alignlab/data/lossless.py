"""The form of a chat in which a chat template writes all of it, or the error that says what is left out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from alignlab.config.render import RenderSettings
from alignlab.data.chat_forms import forms_of
from alignlab.data.content_check import (
    Fragment,
    fragments_of,
    fragments_of_documents,
    fragments_of_tools,
    missing,
    other_fields,
)
from alignlab.data.messages import BadRow
from alignlab.data.notices import Notices
from alignlab.data.thoughts import THOUGHT_FIELDS
from alignlab.errors import ConfigError
from alignlab.types import Message

Tools = Sequence[Mapping[str, Any]]


class Render(Protocol):
    """Renders messages by a chat template."""

    def __call__(self, messages: Sequence[Message], *, tools: Tools, generation: bool) -> str:
        """Return the text; with `generation`, up to where the assistant goes on.

        Raises:
            BadRow: the template refuses the messages.
        """
        ...


@dataclass(frozen=True)
class LossCheck:
    """Finds the form of a chat that a template writes whole, for the rows of one renderer.

    Attributes:
        settings: how rows are rendered.
        notices: what is logged once.
        render: by the template.
        tools, values: what the template is given beside the messages.
        needs_thoughts: refuse a taught turn without its thought; otherwise that is logged once.
        marks_thoughts: the template writes thoughts of a field in a way of its own, which tags in a content are not.
    """

    settings: RenderSettings
    notices: Notices
    render: Render
    tools: Tools
    values: Mapping[str, Any]
    needs_thoughts: bool
    marks_thoughts: bool

    def form_of(self, messages: Sequence[Message], *, taught: Collection[int] = ()) -> Sequence[Message]:
        """Return the messages in the form in which the template writes all of them.

        Args:
            messages: a chat, which is rendered as it is used: up to where the assistant goes on, or with taught turns.
            taught: indices of messages whose thoughts are looked for where they are taught, and not here.

        Raises:
            BadRow: the template refuses them in every form, or leaves something out in every form.
            ConfigError: the template does that with the settings' system prompt or tools alone.
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
        """Refuse a taught turn in which something of its message is not.

        Args:
            messages: the conversation, not in a template's form.
            index: of the message that is taught.
            turn: what is taught of it.

        Raises:
            BadRow: a text, a call or, with `needs_thoughts`, a thought is missing.
        """
        own = [fragment for fragment in fragments_of(messages[: index + 1]) if fragment.message == index]
        for one in missing(own, turn):
            if one.kind == "thought" and not self.needs_thoughts:
                self.notices.say("thoughts", "the chat template leaves out %s; it is not read", one.described)
                continue
            raise BadRow(
                "not_rendered",
                f"has {one.described}, and the chat template leaves it out of the turn that is taught; "
                f"{self._instead(one, messages)}",
            )

    def _unused_tools(self, form: Sequence[Message], *, generation: bool) -> list[Fragment]:
        """Return the tools where they change nothing: their names may stand in calls, and not in a list of tools."""
        if not self.tools or not self._is_same(form, form, without_tools=True, generation=generation):
            return []
        return fragments_of_tools(self.tools)

    def _is_same(
        self, form: Sequence[Message], other: Sequence[Message], *, generation: bool, without_tools: bool = False
    ) -> bool:
        """Return whether the template writes the same for another form, which it may refuse."""
        try:
            written = self.render(other, tools=() if without_tools else self.tools, generation=generation)
        except BadRow:  # of a template that needs what the other form lacks
            return False
        return written == self.render(form, tools=self.tools, generation=generation)

    def _say_unwritten(self, form: Sequence[Message], *, generation: bool) -> None:
        """Log once of each field beside a chat's own, such as `name`, that the template writes nothing of it."""
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
        """Return the first form of the fewest losses, and what is lost in it.

        The form is None where the template refuses the messages as they are, and no other form is without a loss but
        of thoughts.
        """
        wanted = [
            *fragments_of(messages), *fragments_of_tools(self.tools),
            *fragments_of_documents(self.values.get("documents")),
        ]  # fmt: skip
        best: Sequence[Message] | None = None
        least, refused = wanted, False
        for form in self._forms(messages):
            try:
                rendered = self.render(form, tools=self.tools, generation=generation)
            except BadRow:
                refused = refused or form == list(messages)
                continue
            lost = missing(wanted, rendered)
            if best is None or len(lost) < len(least):
                best, least = form, lost
            if self._is_enough(lost, wanted):
                break
        if refused and not all(map(_is_earlier_thought, least)):
            return None, least
        return best, least

    def _is_enough(self, lost: Sequence[Fragment], wanted: Sequence[Fragment]) -> bool:
        """Return whether no other form has to be tried: all is written or, of a template with its own marks for
        thoughts, all but those of earlier turns."""
        if not lost or not self.marks_thoughts:
            return not lost
        num_thoughts = sum(fragment.kind == "thought" for fragment in wanted)
        return all(map(_is_earlier_thought, lost)) and len(lost) < num_thoughts

    def _forms(self, messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
        return forms_of(messages, fields_first=self.marks_thoughts)

    def _refusal(self, messages: Sequence[Message], *, generation: bool) -> Exception:
        """Return the error of messages that the template takes in no form."""
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
        for one in lost:
            if one in earlier:
                continue
            if one.kind == "tool" and self.tools is self.settings.tools:
                raise ConfigError(
                    f"{self.settings.setting('tools')} has {one.described}, and the chat template does not write it; "
                    "use a tokenizer whose chat template takes tools, or remove the setting"
                )
            if one.message == 0 and self._has_set_system(messages):
                raise ConfigError(
                    f"{self.settings.setting('system_prompt')} is given, and the chat template leaves system messages "
                    f"out; {self._instead_of_system()}"
                )
            fix = self._instead(one, messages)
            raise BadRow("not_rendered", f"has {one.described}, and the chat template leaves it out; {fix}")

    def _has_set_system(self, messages: Sequence[Message]) -> bool:
        """Return whether the first message is the settings' system prompt."""
        first = messages[0]
        return first["role"] == "system" and first["content"] == self.settings.system_prompt

    def _instead(self, lost: Fragment, messages: Sequence[Message]) -> str:
        """Return what to do about a fragment that the template leaves out."""
        fix = "use a tokenizer whose chat template writes it, or remove it from the row"
        in_content = self._is_kept_in_content(lost, messages)
        return f"{fix}, or write it into the content, between <think> and </think>" if in_content else fix

    def _is_kept_in_content(self, lost: Fragment, messages: Sequence[Message]) -> bool:
        """Return whether the template would write a thought of a field if it stood in tags in the content."""
        message = messages[lost.message]
        if lost.kind != "thought" or not any(message.get(name) for name in THOUGHT_FIELDS):
            return False
        others = {key: held for key, held in message.items() if key not in THOUGHT_FIELDS}
        tagged = {**others, "content": f"<think>\n{lost.text}\n</think>\n\n{message['content']}"}
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
    """Return whether a fragment that is lost before a taught turn is a thought of the assistant's."""
    return fragment.kind == "thought" and fragment.role == "assistant"
