"""Prompts from a Hub dataset, a local file, Python rows or a task, rendered and tokenised once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.dataset import BadRows, Dataset
from alignlab.data.messages import check_text
from alignlab.data.rendering import PromptRenderer
from alignlab.data.rows import readable_rows
from alignlab.data.sources import load_rows
from alignlab.types import Message, Prompt, Text


def load_prompts(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset[Prompt]:
    """Return the prompts of a source.

    Raises:
        ConfigError: the settings contradict each other or the tokenizer.
        DataError: the source cannot be read, a row cannot be used (with its number), or no row can.
    """
    return prompts_from_rows(load_rows(settings), settings.rendering, tokenizer)


def prompts_from_rows(
    rows: Iterable[Mapping[str, Any]], settings: RenderSettings, tokenizer: PreTrainedTokenizerBase
) -> Dataset[Prompt]:
    """Render and tokenise rows: dicts, or a `datasets.Dataset`.

    A row has the column `settings.prompt_column`, a string or a list of chat messages; or the column `messages`. If
    the last of these messages is the assistant's, it is the answer and no part of the prompt: it becomes the column
    `answer`, unless the row has that column, and also the column `completion` if it holds more than a text, such as a
    thought. Rewards receive all other columns, and `tools` and `chat_template_kwargs`, which the chat template reads.

    Raises:
        ConfigError, DataError: as `load_prompts`.
    """
    renderer = PromptRenderer(settings, tokenizer)
    bad_rows = BadRows(settings)
    rendered: list[tuple[int, Text, dict[str, Any]]] = []
    texts: list[str] = []
    for index, raw_row in enumerate(readable_rows(rows, settings)):
        with bad_rows.at(index):
            row, renderer_of_row = renderer.read(raw_row, index)
            prompt, columns = split_row(row, settings.prompt_column)
            _say_begun(prompt, renderer_of_row)
            texts.append(renderer_of_row(prompt))
            rendered.append((index, prompt, columns))
    prompts: list[Prompt] = []
    # All prompts are encoded in one call: a tokenizer is much faster at that.
    for (index, prompt, columns), token_ids in zip(rendered, renderer.encode(texts), strict=True):
        with bad_rows.at(index):
            renderer.check_length(token_ids)
            prompts.append(Prompt(token_ids=token_ids, text=prompt, index=index, columns=columns))
    return bad_rows.dataset_of(prompts)


def column_names(prompts: Iterable[Prompt]) -> tuple[str, ...]:
    """Return the names of the columns that rewards receive."""
    return tuple(dict.fromkeys(name for prompt in prompts for name in prompt.columns))


def split_row(row: Mapping[str, Any], prompt_column: str) -> tuple[Text, dict[str, Any]]:
    """Return (prompt, other columns) of a row; see `prompts_from_rows`.

    Raises:
        BadRow: the prompt is missing, of another type, or empty.
    """
    columns = dict(row)
    if columns.get(prompt_column) is not None:
        return check_text(columns.pop(prompt_column), prompt_column), columns
    if columns.get("messages") is None:
        empty_columns = [name for name in (prompt_column, "messages") if name in columns]
        raise BadRow(
            "missing_column",
            f"has nothing in the column {empty_columns[0]!r}" if empty_columns else
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
        BadRow: the column holds no chat messages.
    """
    messages = check_text(value, column)
    if isinstance(messages, str):
        raise BadRow("wrong_type", f"has a string in the column {column!r}, which holds a list of chat messages")
    return list(messages)


def _say_begun(prompt: Text, render: PromptRenderer) -> None:
    """Log once that a prompt ends with the assistant's message, which may be a misplaced answer."""
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        render.notices.say(
            "begun",
            "the prompt ends with the assistant's message, which completions continue; if that is the answer, "
            "call the column messages",
        )
