"""Checks that token ids have rows in embedding tables.

Models pad their tables, so more rows than tokens are usual. The other way round, a tokenizer with added tokens gives
ids for which a model has no row unless it was resized. That is harmless if no text holds these tokens (Gemma 3's text
models are published so), and refused if one does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from alignlab.errors import ConfigError

logger = logging.getLogger(__name__)


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of rows that an embedding table needs: the tokenizer's largest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def check_ids(
    items: Iterable[Sequence[Sequence[int]]], rows: Mapping[str, int], tokenizer: PreTrainedTokenizerBase | None,
    *, what: str,
) -> None:
    """Raise if an item holds a token id without a row in an embedding table.

    Args:
        items: the token ids of each item's sequences.
        rows: number of rows of each embedding table, by its model's name in messages, such as "the model".
        tokenizer: for the token's text in the message.
        what: name of an item in the message, such as "example".

    Raises:
        ConfigError: with the number of the item, the id and the table.
    """
    whose, limit = min(rows.items(), key=lambda named: named[1])
    for number, sequences in enumerate(items):
        largest = max((max(ids) for ids in sequences if len(ids)), default=0)
        if largest >= limit:
            token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
            raise ConfigError(
                f"{what} {number} (the first is 0) holds token id {largest}{token}, and {whose} has {limit} rows of "
                f"embeddings (ids 0 to {limit - 1}): the tokenizer's vocabulary has tokens that {whose} was not "
                "resized for; use the tokenizer that belongs to it, or resize it before training "
                "(model.resize_token_embeddings(len(tokenizer))) and save it"
            )


def check_end_token(tokenizer: PreTrainedTokenizerBase, rows: int, model_ends: Iterable[int]) -> None:
    """Raise if the end token has no embedding; warn if the model's configs name another end token.

    Args:
        rows: number of rows of the model's embedding table.
        model_ends: end tokens by the model's config and its generation defaults.

    Raises:
        ConfigError: the end token has no row.
    """
    end, ends = tokenizer.eos_token_id, sorted(set(model_ends))
    if end is not None and end >= rows:
        raise ConfigError(
            f"the tokenizer ends texts with token id {end} ({tokenizer.eos_token!r}), and the model has {rows} rows of "
            "embeddings; use the tokenizer that belongs to it, or resize it before training "
            "(model.resize_token_embeddings(len(tokenizer))) and save it"
        )
    if end is not None and ends and end not in ends:
        logger.warning(
            "the tokenizer ends texts with token id %d (%r), and the model's configs name %s: the trained model is "
            "saved with those; set generation_config.eos_token_id, so that other programs stop where this one did",
            end, tokenizer.eos_token, ", ".join(map(str, ends)),
        )  # fmt: skip
    missing = num_token_ids(tokenizer) - rows
    if missing > 0:
        logger.warning(
            "the tokenizer has ids up to %d, and the model %d rows of embeddings: text that holds one of the last %d "
            "tokens is refused", rows + missing - 1, rows, missing,
        )  # fmt: skip
