"""Spellings of special tokens in texts: found, and on request encoded as plain text.

A tokenizer turns the spelling of a special token into that token anywhere in a text. To keep a spelling in a row's text
as text, a mark is put into it before the chat template is applied. The tokens of the mark are dropped afterwards;
special tokens that the template writes have no mark, and are encoded as usual.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.data.bad_row import BadRow
from alignlab.errors import ConfigError

MARK = "\ufdd0"
"""A code point that Unicode reserves as a non-character, so that no text holds it."""
_MARK_IN_JSON = "\\ufdd0"


class SpecialText:
    """Finds, marks and encodes the spellings of a tokenizer's special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
        spellings = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self.spellings = tuple(spelling for spelling in spellings if spelling)
        self._spelled = re.compile("|".join(map(re.escape, spellings))) if spellings else None

    def spelled_in(self, text: str) -> str | None:
        """Return the first special token that a text spells; None if there is none."""
        match = self._spelled.search(text) if self._spelled is not None else None
        return match[0] if match else None

    def marked(self, value: Any) -> Any:
        """Return a text, or a structure of texts, with the mark in each spelling.

        Raises:
            BadRow: a text holds the mark already.
        """
        if isinstance(value, str):
            if MARK in value:
                raise BadRow("wrong_type", f"has the code point {MARK!r}, which is no character; remove it")
            while self.spelled_in(value) is not None:
                assert self._spelled is not None
                value = self._spelled.sub(lambda match: f"{match[0][0]}{MARK}{match[0][1:]}", value)
            return value
        if isinstance(value, Mapping):
            return {key: self.marked(held) for key, held in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(held) for held in value]
        return value

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of texts, without those of marks."""
        plain = [i for i, text in enumerate(texts) if MARK not in text]
        ids: list[list[int]] = [[] for _ in texts]
        if plain:
            encoded = self._tokenizer([texts[i] for i in plain], add_special_tokens=add_special_tokens)["input_ids"]
            for i, tokens in zip(plain, encoded, strict=True):
                ids[i] = list(tokens)
        for i, text in enumerate(texts):
            if MARK in text:
                ids[i] = self._encode_marked(text, add_special_tokens)
        return ids

    def _encode_marked(self, text: str, add_special_tokens: bool) -> list[int]:
        if not self._tokenizer.is_fast:
            raise ConfigError(
                "escape_special_tokens needs a fast tokenizer, which knows where in the text each token is, and this "
                "is a slow one; set escape_special_tokens to false, or use the model's fast tokenizer"
            )
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        ids = []
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            covered = text[start:end]
            if MARK not in covered:
                ids.append(int(token))
            elif covered.strip(MARK):
                raise ConfigError(
                    f"escape_special_tokens is true, and this tokenizer cannot write {unmarked(covered)!r} as text; "
                    "set escape_special_tokens to false"
                )
        return ids


def with_marks(text: str) -> str:
    """Return a template's text with marks in place of the JSON escapes that the template wrote for them."""
    return text.replace(_MARK_IN_JSON, MARK)


def unmarked(text: str) -> str:
    """Return a text without marks."""
    return text.replace(MARK, "")
