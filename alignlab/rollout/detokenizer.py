"""Text of a completion while its tokens arrive, without half characters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from alignlab.errors import DataError
from alignlab.models.template_limits import render_template

_UNFINISHED = "�"  # what a tokenizer decodes part of a character to


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], ends: Collection[int] = ()) -> str:
    """Return the text of a completion, with the spaces it was written with.

    Special tokens that end, begin or fill up texts and turns are left out; tags that are special tokens, such as
    <think>, are part of the text.

    Args:
        ends: tokens that end the model's completions, to be left out where they are special.
    """
    special = special_ids(tokenizer)
    if special.tags.isdisjoint(token_ids):
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    unsaid = special.structure.union(special.tags.intersection(ends))
    said = [token for token in token_ids if token not in unsaid]
    return str(tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class SpecialIds:
    """A tokenizer's special tokens.

    Attributes:
        structure: those that are no part of a text: they begin, end or fill up a text or a turn of a chat.
        tags: the others, which a model writes as a part of its text.
    """

    structure: frozenset[int]
    tags: frozenset[int]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Return a tokenizer's special tokens by what they are for.

    A tag in a pair, <x> and </x>, is one wherever the template writes it; any other token that the chat template writes
    around a user's message belongs to turns.
    """
    state = (len(tokenizer), str(tokenizer.chat_template), tokenizer.all_special_tokens)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        known = _KNOWN[tokenizer] = state, _special_ids(tokenizer)
    return known[1]


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, SpecialIds]] = WeakKeyDictionary()
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
    """The tag that closes one, or opens it."""
    return tag.replace("</", "<", 1) if tag.startswith("</") else tag.replace("<", "</", 1)


def _ids_of_turns(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What the chat template writes around a user's message."""
    if not tokenizer.chat_template:
        return set()
    try:
        text = render_template(tokenizer, [{"role": "user", "content": "."}], add_generation_prompt=True)
    except DataError:  # the template does not end
        raise
    except Exception:  # a template that takes no such chat says nothing about its turns
        return set()
    return set(tokenizer(text, add_special_tokens=False)["input_ids"])


class Detokenizer:
    """Decodes tokens as they come, each with a few before it, at a cost that does not grow with the text.

    Args:
        ends: see `decode`.

    Attributes:
        text: what is certain so far. A character that the newest tokens leave unfinished is not in it yet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._ends = ends
        self._token_ids: list[int] = []  # those before `_num_certain` give context to those after it
        self._num_certain = 0

    @property
    def whole(self) -> str:
        """The text with what the newest tokens leave unfinished, as it stands."""
        return self.text + self._decoded(self._token_ids)[len(self._certain) :]

    @property
    def _certain(self) -> str:
        return self._decoded(self._token_ids[: self._num_certain])

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return decode(self._tokenizer, token_ids, self._ends)

    def push(self, token: int) -> None:
        """Take the next token."""
        self._token_ids.append(token)
        certain = self._certain
        text = self._decoded(self._token_ids)
        if len(text) > len(certain) and not text.endswith(_UNFINISHED):
            self.text += text[len(certain) :]
            self._token_ids = self._token_ids[self._num_certain :]
            self._num_certain = len(self._token_ids)
