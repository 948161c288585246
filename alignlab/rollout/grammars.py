"""Completions that must match a regular expression or fit a JSON schema, by the library `llguidance`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from alignlab.errors import RolloutError
from alignlab.types import SamplingParams

_TOKENIZERS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Any, Any]] = WeakKeyDictionary()


class Grammar:
    """A compiled regular expression or JSON schema over the tokens of a model.

    Args:
        matcher: of llguidance, before the first token.
        vocab_size: logits of the model.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def begin(self) -> GrammarState:
        """Return the state of a completion without tokens."""
        return GrammarState(self._matcher, self._vocab_size)


class GrammarState:
    """The place of a completion in its grammar.

    Args:
        start: of llguidance, before the first token; it is copied.
        vocab_size: logits of the model.
    """

    def __init__(self, start: Any, vocab_size: int) -> None:
        self._start = start
        self._matcher = start.deep_copy()
        self._num_bytes = -(-vocab_size // 8)
        self._consumed: list[int] = []

    def allowed(self, token_ids: Sequence[int]) -> NDArray[np.uint8] | None:
        """Return packed bits of the tokens that may follow those of a completion, the lowest first.

        The tokens may be others than those of the last call: drafts that were not accepted are taken back.

        Returns:
            [vocabulary / 8 rounded up] uint8; None if the grammar does not hold the tokens.

        Raises:
            RolloutError: no token may follow.
        """
        bits = self._bits(token_ids)
        if bits is not None and not bits.any():
            raise RolloutError(
                f"after {len(token_ids)} tokens of a completion its regex or json_schema allows none of the model's "
                "tokens, which do not spell what must follow; change it"
            )
        return bits

    def leads_on(self, token_ids: Sequence[int]) -> bool:
        """Return whether the grammar holds the tokens of a completion and some token may follow them."""
        bits = self._bits(token_ids)
        return bits is not None and bool(bits.any())

    def _bits(self, token_ids: Sequence[int]) -> NDArray[np.uint8] | None:
        """Return what `allowed` does, without any bit where no token may follow."""
        known = len(self._consumed)
        if self._consumed != list(token_ids[:known]):
            known = next(i for i, token in enumerate(self._consumed) if token_ids[i : i + 1] != [token])
            self._matcher.rollback(len(self._consumed) - known)
        new = list(token_ids[known:])
        num_taken = self._matcher.try_consume_tokens(new)
        self._consumed = [*self._consumed[:known], *new[:num_taken]]
        if num_taken < len(new):
            return None
        bits: NDArray[np.uint8] = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: self._num_bytes]
        if not self._matcher.is_error():
            return bits
        # At a dead end llguidance allows the end token, though the text is not complete, and takes nothing back.
        self._matcher = self._start.deep_copy()
        self._matcher.try_consume_tokens(self._consumed)
        return np.zeros_like(bits)


def grammar_of(
    sampling: SamplingParams, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_token_ids: Collection[int]
) -> Grammar | None:
    """Return the compiled grammar of a request; None without one.

    Args:
        vocab_size: logits of the model.
        end_token_ids: tokens that end a completion, which the grammar allows once the text is complete.

    Raises:
        RolloutError: llguidance is missing, the model has no end token, the tokenizer cannot be read, or the grammar is
            wrong, impossible, or holds no text but the empty one.
    """
    if sampling.regex is None and sampling.json_schema is None:
        return None
    name = "regex" if sampling.json_schema is None else "json_schema"
    if not _is_installed():
        raise RolloutError(f"sampling.{name} needs llguidance, and it is missing; install alignlab[structured]")
    if not end_token_ids:
        raise RolloutError(f"sampling.{name} needs an end token, and the model has none; give stop_token_ids")
    from llguidance import LLMatcher

    tokens = _tokens(tokenizer, vocab_size, tuple(sorted(end_token_ids)))
    matcher = LLMatcher(tokens, _source(sampling), log_level=0)
    if matcher.is_error():
        raise RolloutError(_wrong(name, getattr(sampling, name), " ".join(matcher.get_error().split())))
    first = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    if not set(first.nonzero()[0].tolist()) - set(end_token_ids):
        raise RolloutError(_wrong(name, getattr(sampling, name), "it holds no text that has a token"))
    return Grammar(matcher, vocab_size)


def _source(sampling: SamplingParams) -> str:
    """Return the grammar as llguidance writes it.

    Raises:
        RolloutError: the schema is no JSON.
    """
    from llguidance import LLMatcher

    if sampling.json_schema is None:
        return str(LLMatcher.grammar_from_regex(sampling.regex or ""))
    try:
        return str(LLMatcher.grammar_from_json_schema(sampling.json_schema))
    except ValueError as error:
        raise RolloutError(_wrong("json_schema", sampling.json_schema, str(error))) from error


def _wrong(name: str, text: str, reason: str) -> str:
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    return f"sampling.{name} is {shown!r}, and no completion can follow it: {reason}; correct it"


@cache
def _is_installed() -> bool:
    return find_spec("llguidance") is not None


def _tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_token_ids: tuple[int, ...]) -> Any:
    """Return a tokenizer as llguidance reads it, which takes seconds, and is cached.

    Raises:
        RolloutError: it cannot be read.
    """
    from llguidance import hf

    cached = _TOKENIZERS.setdefault(tokenizer, {})
    source: Any = tokenizer
    key = (vocab_size, end_token_ids, len(tokenizer))
    if key not in cached:
        try:
            cached[key] = hf.from_tokenizer(source, n_vocab=vocab_size, eos_token=list(end_token_ids))
        except Exception as error:  # llguidance raises bare ones
            raise RolloutError(
                f"sampling.regex and json_schema need a fast tokenizer that llguidance can read, and this one is a "
                f"{type(tokenizer).__name__}: {error}; use another tokenizer, or remove the parameter"
            ) from error
    return cached[key]
