"""Prompts from a Hub dataset, a local file, Python rows or a task, rendered and tokenised once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import DataSettings
from alignlab.config.render import RenderSettings
from alignlab.data.messages import BadRow, check_text
from alignlab.data.rendering import PromptRenderer
from alignlab.data.rows import readable_rows
from alignlab.data.sources import load_rows
from alignlab.errors import DataError
from alignlab.types import Message, Prompt, Text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptDataset(Sequence[Prompt]):
    """Prompts in the order of their rows.

    Attributes:
        prompts: those that can be used.
        skipped: rows left out, counted by reason: missing_column, wrong_type, empty, media,
            not_rendered, too_long.
        columns: names of the columns that rewards receive.
    """

    prompts: tuple[Prompt, ...]
    skipped: Counter[str] = field(default_factory=Counter)
    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptDataset: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptDataset:
        if isinstance(index, slice):
            return PromptDataset(self.prompts[index], self.skipped, self.columns)
        return self.prompts[index]


def load_prompts(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> PromptDataset:
    """The prompts that `settings` describes.

    Raises:
        ConfigError: the settings contradict each other or the tokenizer.
        DataError: the source cannot be read, a row cannot be used (with its number), or no row can.
    """
    return prompts_from_rows(load_rows(settings), settings, tokenizer)


def prompts_from_rows(
    rows: Iterable[Mapping[str, Any]], settings: RenderSettings, tokenizer: PreTrainedTokenizerBase
) -> PromptDataset:
    """Render and tokenise rows: dicts, or a `datasets.Dataset`.

    A row has the column `settings.prompt_column`, a string or a list of chat messages; or the column `messages`, whose
    last message, if it is the assistant's, is the answer and no part of the prompt: it becomes the column `answer`
    unless the row has one; with more than a text, such as a thought, it becomes the column `completion` too. All other
    columns are kept for the rewards, with `tools` and `chat_template_kwargs`, which the chat template is given.

    Raises:
        ConfigError, DataError: as `load_prompts`.
    """
    whole = PromptRenderer(settings, tokenizer)
    usable: list[tuple[int, Text, str, dict[str, Any]]] = []
    skipped: Counter[str] = Counter()
    for index, given in enumerate(readable_rows(rows, settings)):
        try:
            row, render = whole.read(given, index)
            text, columns = split_row(row, settings.prompt_column)
            _say_begun(text, render)
            usable.append((index, text, render(text), columns))
        except BadRow as error:
            count_or_raise(skipped, error, index, settings)
    encoded = whole.encode([rendered for _, _, rendered, _ in usable])
    prompts = []
    for (index, text, _, columns), token_ids in zip(usable, encoded, strict=True):
        try:
            whole.check_length(token_ids)
            prompts.append(Prompt(token_ids=token_ids, text=text, index=index, columns=columns))
        except BadRow as error:
            count_or_raise(skipped, error, index, settings)
    report(len(prompts), skipped, settings)
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return PromptDataset(tuple(prompts), skipped, tuple(names))


def split_row(row: Mapping[str, Any], prompt_column: str) -> tuple[Text, dict[str, Any]]:
    """(prompt, other columns) of a row; see `prompts_from_rows`.

    Raises:
        BadRow: the prompt is missing, of another type, or empty.
    """
    columns = dict(row)
    if columns.get(prompt_column) is not None:
        return check_text(columns.pop(prompt_column), prompt_column), columns
    if columns.get("messages") is None:
        nothing = [name for name in (prompt_column, "messages") if name in columns]
        raise BadRow(
            "missing_column",
            f"has nothing in the column {nothing[0]!r}" if nothing else
            f"has no column {prompt_column!r} and no column 'messages', but {sorted(columns)}; set prompt_column",
        )
    columns.pop(prompt_column, None)
    messages = chat_of(columns.pop("messages"))
    if messages[-1]["role"] == "assistant":
        answer, messages = messages[-1], messages[:-1]
        if answer["content"].strip():
            columns.setdefault("answer", answer["content"])
        if set(answer) > {"role", "content"}:
            columns.setdefault("completion", [answer])
    if not messages:
        raise BadRow("empty", "has only the assistant's message in its column 'messages', and no prompt before it")
    return messages, columns


def chat_of(value: Any, column: str = "messages") -> list[Message]:
    """Return the messages of a column that holds chats.

    Raises:
        BadRow: they cannot be read.
    """
    messages = check_text(value, column)
    if isinstance(messages, str):
        raise BadRow("wrong_type", f"has a string in the column {column!r}, which holds a list of chat messages")
    return list(messages)


def _say_begun(prompt: Text, render: PromptRenderer) -> None:
    """Log once that a prompt ends with the assistant's message, which may be an answer that was not to be shown."""
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        render.notices.say(
            "begun",
            "the prompt ends with the assistant's message, which completions go on with; where that is the answer, "
            "call the column messages",
        )


def count_or_raise(skipped: Counter[str], error: BadRow, index: int, settings: RenderSettings) -> None:
    """Do with a bad row what `settings.on_bad_row` says."""
    if settings.on_bad_row == "error":
        raise DataError(
            f"{settings.source}: row {index} (the first is 0) {error}; "
            f"correct the row, or set {settings.setting('on_bad_row', 'skip')} to leave such rows out"
        ) from error
    skipped[error.reason] += 1


def report(num_usable: int, skipped: Counter[str], settings: RenderSettings) -> None:
    """Say how many rows were left out; refuse a dataset of which nothing remains."""
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
    if not num_usable:
        fix = f"check the rows and {settings.setting('prompt_column')}"
        if skipped["too_long"]:
            fix += f", and raise {settings.setting('max_prompt_tokens')}, which is {settings.max_prompt_tokens}"
        raise DataError(
            f"{settings.source}: a dataset must hold at least one usable row, and this has none "
            f"(skipped: {counts or 'no rows at all'}); {fix}"
        )
    if skipped:
        logger.warning("%s: skipped %d rows (%s)", settings.source, skipped.total(), counts)
