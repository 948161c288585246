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
from alignlab.data.rows import BadRow as BadRow
from alignlab.data.rows import check_characters, plain_row, readable_rows
from alignlab.data.sources import load_rows
from alignlab.errors import ConfigError, DataError
from alignlab.types import Message, Prompt, Text

logger = logging.getLogger(__name__)

_NOT_CHAT = (
    "a row's prompt is a list of chat messages, and prompts are plain here (chat is false, or the tokenizer has "
    "no chat template); use a tokenizer with one, or plain prompts"
)


@dataclass(frozen=True)
class PromptDataset(Sequence[Prompt]):
    """Prompts in the order of their rows.

    Attributes:
        prompts: those that can be used.
        skipped: rows left out, counted by reason: missing_column, wrong_type, empty, too_long.
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
    unless the row has one. All other columns are kept for the rewards.

    Raises:
        ConfigError, DataError: as `load_prompts`.
    """
    render = PromptRenderer(settings, tokenizer)
    usable: list[tuple[int, Text, str, dict[str, Any]]] = []
    skipped: Counter[str] = Counter()
    for index, row in enumerate(readable_rows(rows, settings)):
        try:
            text, columns = split_row(plain_row(row), settings.prompt_column)
            usable.append((index, text, render(text), columns))
        except BadRow as error:
            count_or_raise(skipped, error, index, settings)
    encoded = render.encode([rendered for _, _, rendered, _ in usable])
    prompts = []
    for (index, text, _, columns), token_ids in zip(usable, encoded, strict=True):
        try:
            render.check_length(token_ids)
            prompts.append(Prompt(token_ids=token_ids, text=text, index=index, columns=columns))
        except BadRow as error:
            count_or_raise(skipped, error, index, settings)
    report(len(prompts), skipped, settings)
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return PromptDataset(tuple(prompts), skipped, tuple(names))


class PromptRenderer:
    """Text or messages to the string and the token ids that a model is fed, by one group of settings.

    A chat goes through the tokenizer's template, which writes the special tokens itself, so none is added to it. A
    plain prompt gets those that the tokenizer adds: one at the beginning at most, and none at the end.
    """

    def __init__(self, settings: RenderSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self.chat = has_template if settings.chat is None else settings.chat
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

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the tokenizer's special tokens."""
        added = (str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return tuple(dict.fromkeys(text for text in (*added, *self.tokenizer.all_special_tokens) if text))

    def __call__(self, text: Text) -> str:
        """The string that the model reads before it writes its completion.

        A last message of the assistant's is left open, so that the completion continues it.
        """
        return self.render_chat(self.messages(text)) if self.chat else self._plain(text)

    def messages(self, text: Text) -> list[Message]:
        """The prompt as chat messages, with `system_prompt` first unless it has a system message of its own."""
        if not self.chat:
            raise ConfigError(_NOT_CHAT)
        if isinstance(text, str):
            text = [{"role": "user", "content": self._plain(text)}]
        elif self.settings.prompt_template is not None:
            raise ConfigError(
                f"{self.settings.setting('prompt_template')} is put around plain prompts, and a row's prompt is a list "
                "of messages; remove it"
            )
        if self.settings.system_prompt is None or text[0]["role"] == "system":
            return list(text)
        return [{"role": "system", "content": self.settings.system_prompt}, *text]

    def render_chat(self, messages: Sequence[Message], *, generation: bool = True, continue_last: bool = True) -> str:
        """The template's text of the messages; with `generation`, up to where the assistant goes on.

        Args:
            messages: the chat, at least one message.
            generation: add what begins the assistant's turn.
            continue_last: where the last message is the assistant's, go on with it instead of beginning another turn.
        """
        open_ended = generation and continue_last and messages[-1]["role"] == "assistant"
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=generation and not open_ended,
                    continue_final_message=open_ended,
                )
            )
        except Exception as error:  # templates raise what they like
            raise BadRow("wrong_type", f"has messages that the chat template refuses: {error}") from error

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

    def _plain(self, text: Text) -> str:
        if not isinstance(text, str):
            raise ConfigError(_NOT_CHAT)
        template = self.settings.prompt_template
        return text if template is None else template.replace("{prompt}", text)

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of rendered prompts."""
        if not texts:
            return []
        ids = self.tokenizer(list(texts), add_special_tokens=not self.chat)["input_ids"]
        if self.chat:
            return [tuple(row) for row in ids]
        return [self._plain_ids(text, row) for text, row in zip(texts, ids, strict=True)]

    def _plain_ids(self, text: str, ids: list[int]) -> tuple[int, ...]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if eos is not None and len(ids) > 1 and ids[-1] == eos and not text.endswith(str(self.tokenizer.eos_token)):
            ids = ids[:-1]
        return tuple(ids)


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
    messages = check_text(columns.pop("messages"), "messages")
    if isinstance(messages, str):
        raise BadRow("wrong_type", "has a string in the column 'messages', which holds a list of chat messages")
    if messages[-1]["role"] == "assistant":
        columns.setdefault("answer", messages[-1]["content"])
        messages = messages[:-1]
    if not messages:
        raise BadRow("empty", "has only the assistant's message in its column 'messages', and no prompt before it")
    return messages, columns


def check_text(value: Any, column: str) -> Text:
    """A non-empty string, or chat messages, each with a role and a content; fields that are None are left out.

    Raises:
        BadRow: anything else.
    """
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty", f"has an empty string in the column {column!r}")
        check_characters(value, column)
        return value
    if getattr(value, "ndim", None) == 1:
        value = value.tolist()  # pandas reads lists as arrays
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray | memoryview):
        raise BadRow(
            "wrong_type",
            f"has {type(value).__name__} in the column {column!r}, which holds a string or a list of chat messages",
        )
    if not value:
        raise BadRow("empty", f"has an empty list in the column {column!r}")
    messages = []
    for message in value:
        whole = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not whole or message.get("content") is None:
            raise BadRow(
                "wrong_type",
                f"has {message!r:.80} in the column {column!r}, where each chat message is a dict of role and content",
            )
        messages.append({key: part for key, part in message.items() if part is not None})
    check_characters(messages, column)
    return messages


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
        raise DataError(
            f"{settings.source}: a dataset must hold at least one usable row, and this has none "
            f"(skipped: {counts or 'no rows at all'}); check the rows and {settings.setting('prompt_column')}"
        )
    if skipped:
        logger.warning("%s: skipped %d rows (%s)", settings.source, skipped.total(), counts)
