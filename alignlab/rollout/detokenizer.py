"""Text of a completion while its tokens arrive, without half characters."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "�"  # what a tokenizer decodes part of a character to


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of a completion, without special tokens and with the spaces it was written with."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Detokenizer:
    """Decodes tokens as they come, each with a few before it, at a cost that does not grow with the text.

    Attributes:
        text: what is certain so far. A character that the newest tokens leave unfinished is not in it yet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []  # those before `_num_certain` give context to those after it
        self._num_certain = 0

    @property
    def whole(self) -> str:
        """The text with what the newest tokens leave unfinished, as it stands."""
        return self.text + decode(self._tokenizer, self._token_ids)[len(self._certain) :]

    @property
    def _certain(self) -> str:
        return decode(self._tokenizer, self._token_ids[: self._num_certain])

    def push(self, token: int) -> None:
        """Take the next token."""
        self._token_ids.append(token)
        certain = self._certain
        text = decode(self._tokenizer, self._token_ids)
        if len(text) > len(certain) and not text.endswith(_UNFINISHED):
            self.text += text[len(certain) :]
            self._token_ids = self._token_ids[self._num_certain :]
            self._num_certain = len(self._token_ids)
