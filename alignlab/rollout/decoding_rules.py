"""Rules of the decoding controls of a request, and the tokens of banned words; the same for every engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.errors import RolloutError
from alignlab.types import SamplingParams

_GRAMMARS = ("regex", "json_schema")
# With a grammar these could leave no token that may follow, by name with the value that leaves all as they are.
_NOT_WITH_GRAMMAR: dict[str, Any] = {
    "forced_tokens": (), "banned_token_ids": (), "banned_words": (), "min_new_tokens": 0, "ignore_eos": False,
}  # fmt: skip


def check_controls(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise if the decoding controls of a request contradict each other or the vocabulary.

    Raises:
        RolloutError: with the rule, the value and the fix.
    """
    for name, value, rule in _broken_rules(sampling, vocab_size):
        raise RolloutError(f"sampling.{name} holds {value}, and {rule}")
    grammars = [name for name in _GRAMMARS if getattr(sampling, name) is not None]
    if len(grammars) == 2:
        raise RolloutError("sampling.regex and sampling.json_schema are given, and one must be None; remove one")
    for name in grammars:
        for other, off in _NOT_WITH_GRAMMAR.items():
            if getattr(sampling, other) != off:
                raise RolloutError(
                    f"sampling.{other} is {getattr(sampling, other)!r}, and must be {off!r} with sampling.{name}, "
                    "which may then leave no token that can follow; remove one of both"
                )


_Broken = Iterator[tuple[str, Any, str]]
"""Name, value and rule of each rule that is broken, with the fix."""


def _broken_rules(sampling: SamplingParams, vocab_size: int) -> _Broken:
    """Yield the rules that are broken."""
    yield from _unknown_tokens(sampling, vocab_size)
    yield from _broken_by_biases(sampling)
    yield from _broken_by_bans(sampling, vocab_size)
    yield from _broken_by_forced_tokens(sampling)


def _unknown_tokens(sampling: SamplingParams, vocab_size: int) -> _Broken:
    known = f"each token must be from 0 to {vocab_size - 1}; use the model's own tokenizer"
    ids = {
        "logit_bias": [token for token, _ in sampling.logit_bias],
        "banned_token_ids": sampling.banned_token_ids,
        "forced_tokens": [token for _, token in sampling.forced_tokens],
    }
    for name, tokens in ids.items():
        yield from ((name, f"token {token}", known) for token in tokens if not 0 <= token < vocab_size)


def _broken_by_biases(sampling: SamplingParams) -> _Broken:
    for token, bias in sampling.logit_bias:
        if not isfinite(bias):
            yield "logit_bias", f"{bias} for token {token}", "each must be finite; use banned_token_ids to ban a token"
    if len({token for token, _ in sampling.logit_bias}) < len(sampling.logit_bias):
        yield "logit_bias", "a token twice", "each token must stand once; add the numbers up"


def _broken_by_bans(sampling: SamplingParams, vocab_size: int) -> _Broken:
    if len(set(sampling.banned_token_ids)) == vocab_size:
        yield "banned_token_ids", f"all {vocab_size} tokens", "one must be left; ban fewer"
    if any(not word.strip() for word in sampling.banned_words):
        yield "banned_words", "a blank text", "each must be a word; remove it"


def _broken_by_forced_tokens(sampling: SamplingParams) -> _Broken:
    positions = [position for position, _ in sampling.forced_tokens]
    for position in positions:
        if not 0 <= position < sampling.max_new_tokens:
            limit = f"each must be from 0 to {sampling.max_new_tokens - 1}; raise max_new_tokens, or remove it"
            yield "forced_tokens", f"the position {position}", limit
    if len(set(positions)) < len(positions):
        yield "forced_tokens", "a position twice", "each position must stand once; remove one"
    for _, token in sampling.forced_tokens:
        if token in sampling.banned_token_ids:
            yield "forced_tokens", f"token {token}", "banned_token_ids bans it; remove it from one of both"


def banned_phrases(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each word, as it is written at the beginning of a text and after a space.

    Raises:
        RolloutError: a word has no tokens.
    """
    phrases: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            if not ids:
                raise RolloutError(f"sampling.banned_words holds {word!r}, which has no tokens; remove it")
            phrases[ids] = None
    return tuple(phrases)
