"""The text of a completion: whole, or while its tokens arrive, without half characters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from alignlab.errors import DataError
from alignlab.models.hub.template_limits import render_template

_UNFINISHED = "�"  # what a tokenizer decodes part of a character to


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], ends: Collection[int] = ()) -> str:
    """Return the text of a completion, with its spaces unchanged.

    Special tokens that end, begin or fill up texts and turns are left out; tags that are special tokens, such as
    <think>, are part of the text.

    Args:
        tokenizer: the model's tokenizer.
        token_ids: the tokens of the completion.
        ends: tokens that end the model's completions; they are left out if they are special.
    """
    special = special_ids(tokenizer)
    if special.tags.isdisjoint(token_ids):
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    hidden = special.structure.union(special.tags.intersection(ends))
    visible = [token for token in token_ids if token not in hidden]
    return str(tokenizer.decode(visible, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class SpecialIds:
    """A tokenizer's special tokens.

    Attributes:
        structure: tokens that begin, end or fill up a text or a turn of a chat, and are not part of the text.
        tags: all others, which a model writes as part of its text.
    """

    structure: frozenset[int]
    tags: frozenset[int]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Return a tokenizer's special tokens by purpose.

    Paired tokens, <x> and </x>, are tags. Of the others, those that the chat template writes around a user's message
    are structure.
    """
    state = (len(tokenizer), str(tokenizer.chat_template), tokenizer.all_special_tokens)
    cached = _CACHE.get(tokenizer)
    if cached is None or cached[0] != state:
        cached = _CACHE[tokenizer] = state, _special_ids(tokenizer)
    return cached[1]


_CACHE: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, SpecialIds]] = WeakKeyDictionary()
_NAMED = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    added = {token: str(added.content) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special = added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    named = {getattr(tokenizer, f"{name}_token_id") for name in _NAMED}
    spellings = set(special.values())
    paired = {token for token, text in special.items() if _counterpart(text) in spellings} - named
    structure = (named | _ids_of_turns(tokenizer)).intersection(special) - paired
    return SpecialIds(frozenset(structure), frozenset(special) - structure)


def _counterpart(tag: str) -> str:
    """Return the closing tag of an opening one, and the other way round."""
    return tag.replace("</", "<", 1) if tag.startswith("</") else tag.replace("<", "</", 1)


def _ids_of_turns(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokens that the chat template writes around a user's message."""
    if not tokenizer.chat_template:
        return set()
    try:
        text = render_template(tokenizer, [{"role": "user", "content": "."}], add_generation_prompt=True)
    except DataError:  # the template does not end
        raise
    except Exception:  # from a template that refuses this chat, nothing is learnt about its turns
        return set()
    return set(tokenizer(text, add_special_tokens=False)["input_ids"])


class Detokenizer:
    """Decodes tokens as they arrive, each with a few tokens before it: the cost does not grow with the text.

    Args:
        tokenizer, ends: see `decode`.

    Attributes:
        text: the text that no later token changes; a character whose last tokens are missing is not in it yet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._ends = ends
        self._token_ids: list[int] = []  # those before `_num_certain` give context to those after it
        self._num_certain = 0

    @property
    def whole(self) -> str:
        """The text, with a replacement for a character whose last tokens are missing."""
        return self.text + self._decoded(self._token_ids)[len(self._certain) :]

    @property
    def _certain(self) -> str:
        return self._decoded(self._token_ids[: self._num_certain])

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return decode(self._tokenizer, token_ids, self._ends)

    def push(self, token: int) -> None:
        """Add the next token."""
        self._token_ids.append(token)
        certain = self._certain
        text = self._decoded(self._token_ids)
        if len(text) > len(certain) and not text.endswith(_UNFINISHED):
            self.text += text[len(certain) :]
            self._token_ids = self._token_ids[self._num_certain :]
            self._num_certain = len(self._token_ids)
