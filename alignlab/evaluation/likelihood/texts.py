"""Texts whose likelihood is measured: a text file, rows with a text, or rows with a prompt and a completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import DataSettings, SettingNames
from alignlab.data.examples import examples_from_rows
from alignlab.data.files import READERS, file_kind
from alignlab.data.rows import readable_rows
from alignlab.data.sources import load_rows
from alignlab.errors import ConfigError, DataError
from alignlab.files.input_files import read_limited

TEXT_COLUMN = "text"
MAX_TEXT_BYTES = 2**28
_MAX_TOKENS = 2**31


@dataclass(frozen=True)
class ScoredText:
    """A text as the model reads it.

    Attributes:
        token_ids: of the text and what stands before it.
        scored: True on the tokens whose log-probs count; never the first.
        num_bytes, num_words: of the text that counts: UTF-8 bytes, and words between white space.
    """

    token_ids: tuple[int, ...]
    scored: tuple[bool, ...]
    num_bytes: int
    num_words: int


def read_texts(path: str, tokenizer: PreTrainedTokenizerBase) -> list[ScoredText]:
    """Return the texts of a file.

    - Any other file than those of rows is one text.
    - Rows with the column `text`: a text each.
    - Other rows are supervised data (see `data.examples`): of a prompt and a completion, rendered by the chat template
      if there is one, the completion counts, with the token that ends it.

    A text begins with the tokenizer's beginning-of-text token, or its end token if there is none, so that all of its
    own tokens count.

    Raises:
        ConfigError: the tokenizer has neither.
        DataError: the file cannot be read, is empty, or a row cannot be used.
    """
    if file_kind(path) in READERS:
        return _texts_of_rows(path, tokenizer)
    text = read_limited(Path(path), MAX_TEXT_BYTES, DataError)
    return [_plain(text, tokenizer, path)]


def _texts_of_rows(path: str, tokenizer: PreTrainedTokenizerBase) -> list[ScoredText]:
    names = SettingNames(path, lambda name, value: name if value is None else f"{name}={value}")
    settings = DataSettings(path=path, max_prompt_tokens=_MAX_TOKENS).named(names)
    rows = [row for row in readable_rows(load_rows(settings), settings.rendering)]
    if not rows:
        raise DataError(f"{path} must hold a row to measure, and has none; give another file")
    if isinstance(rows[0], Mapping) and rows[0].get(TEXT_COLUMN) is not None:
        return [_plain(_text_of(row, path, index), tokenizer, f"{path}: row {index}") for index, row in enumerate(rows)]
    examples = examples_from_rows(rows, settings.rendering, tokenizer)
    return [_completion(example.token_ids, example.completion_mask, tokenizer) for example in examples]


def _text_of(row: Any, path: str, index: int) -> str:
    text = row.get(TEXT_COLUMN) if isinstance(row, Mapping) else None
    if not isinstance(text, str):
        raise DataError(
            f"{path}: row {index} (the first is 0) must have a string in its column {TEXT_COLUMN!r}, as the first row "
            f"has, and has {type(text).__name__}; correct it, or remove the row"
        )
    return text


def _plain(text: str, tokenizer: PreTrainedTokenizerBase, name: str) -> ScoredText:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ConfigError(
            "the tokenizer must have a beginning-of-text token or an end token to put before a text, and has neither; "
            "set bos_token"
        )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # windows are for texts of any length
    if not ids:
        raise DataError(f"{name} must have a token to measure, and is empty; fill it, or remove it")
    return ScoredText((first, *ids), (False, *(True for _ in ids)), len(text.encode()), len(text.split()))


def _completion(
    token_ids: Sequence[int], scored: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> ScoredText:
    text = str(tokenizer.decode(list(compress(token_ids, scored)), skip_special_tokens=True))
    return ScoredText(tuple(token_ids), tuple(scored), len(text.encode()), len(text.split()))


@dataclass(frozen=True)
class Window:
    """A part of a text that the model reads by itself.

    Attributes:
        text: index of the text.
        token_ids: of the part.
        scored: True on the tokens that count here; each token of a text counts in one window.
    """

    text: int
    token_ids: tuple[int, ...]
    scored: tuple[bool, ...]


def windows_of(texts: Sequence[ScoredText], *, width: int, stride: int) -> Iterator[Window]:
    """Yield the windows of texts that hold a token that counts.

    The first window of a text counts all of its tokens. Each later one begins `stride` tokens later and counts the
    tokens that are new, so that each has at least width - stride tokens before it; the last one ends with the text.

    Args:
        width: tokens of a window, >= 2.
        stride: from the beginning of a window to that of the next, 1 up to width - 1.
    """
    for number, text in enumerate(texts):
        counted = 0
        for start in range(0, len(text.token_ids), stride):
            end = min(start + width, len(text.token_ids))
            scored = tuple(text.scored[i] and i >= counted for i in range(start, end))
            if any(scored):
                yield Window(number, text.token_ids[start:end], scored)
            counted = end
            if end == len(text.token_ids):
                break


def check_windows(width: int, stride: int, num_positions: float) -> None:
    """Raise if windows cannot be read, or leave a token without one before it.

    Raises:
        ConfigError: with the value that can be.
    """
    if not 2 <= width <= num_positions:
        raise ConfigError(
            f"--window is {width}, and must be from 2 to the model's {num_positions:g} positions; use "
            f"{min(1024, num_positions):g}"
        )
    if not 1 <= stride < width:
        raise ConfigError(
            f"--stride is {stride}, and must be from 1 to {width - 1}, below --window, so that each token has one "
            f"before it; use {max(1, width // 2)}"
        )
