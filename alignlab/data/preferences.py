"""Preferences: a prompt and two completions, of which one is better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.data.bad_row import BadRow, without_value
from alignlab.data.common_prompt import common_prompt
from alignlab.data.dataset import Dataset, dataset_from_rows
from alignlab.data.examples import completion_example
from alignlab.data.messages import check_text
from alignlab.data.rendering import PromptRenderer
from alignlab.data.rows import as_number
from alignlab.data.sources import load_rows
from alignlab.errors import ConfigError
from alignlab.types import Completion, Prompt, Rollout, Text, TokenSequences, Writer


class CompletionGroup(Protocol):
    """A prompt and completions whose log-probs under a reference are computed end to end."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all completions."""
        ...

    def as_group(self, logprobs: Sequence[float] | None = None) -> Rollout:
        """Return the completions as a group to be packed; see `group_of`."""
        ...


Mask = tuple[bool, ...] | None
"""True for each token of a completion that the assistant wrote; None if it wrote all."""


def group_of(
    prompt: tuple[int, ...],
    completions: Sequence[tuple[int, ...]],
    masks: Sequence[Mask],
    logprobs: Sequence[float] | None = None,
) -> Rollout:
    """Return completions of a prompt as a group, to be packed; `logprobs` of all, end to end, are 0 by default."""
    remaining = iter(itertools.repeat(0.0) if logprobs is None else logprobs)
    group = [
        Completion.of(ids, logprobs=tuple(itertools.islice(remaining, len(ids))), writers=writers_of(mask))
        for ids, mask in zip(completions, masks, strict=True)
    ]
    return Rollout(Prompt(prompt, ""), tuple(group))


def writers_of(mask: Mask) -> tuple[Writer, ...] | None:
    """Return the writers of a dataset's completion: the policy in place of the assistant, the user for the others."""
    return None if mask is None else tuple("policy" if by_assistant else "user" for by_assistant in mask)


@dataclass(frozen=True)
class Preference:
    """Token ids of a prompt and of two completions, the end token included.

    Attributes:
        prompt: at least one token.
        chosen: the better completion, at least one token.
        rejected: the other.
        margin: by how much the chosen completion is better, >= 0; 0 if that is not known.
        probability: a judge's probability that the chosen completion is better, in [0.5, 1]; 1 without a judge.
        chosen_mask, rejected_mask: True for each token that the assistant wrote, False for a tool's; None for all.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float = 0.0
    probability: float = 1.0
    chosen_mask: Mask = None
    rejected_mask: Mask = None

    @property
    def num_tokens(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def sequences(self) -> TokenSequences:
        """The prompt with each of the two completions."""
        return self.prompt + self.chosen, self.prompt + self.rejected

    @property
    def labels(self) -> tuple[float, ...]:
        """Margin and probability; and the masks, if the assistant did not write all tokens."""
        masks = (self.chosen_mask, self.rejected_mask)
        written = [mask or (True,) * len(ids) for mask, ids in zip(masks, (self.chosen, self.rejected), strict=True)]
        mask_labels = () if masks == (None, None) else itertools.chain.from_iterable(written)
        return self.margin, self.probability, *map(float, mask_labels)

    def as_group(self, logprobs: Sequence[float] | None = None) -> Rollout:
        """Return the pair as a group of two completions, to be packed; see `group_of`."""
        return group_of(
            self.prompt, (self.chosen, self.rejected), (self.chosen_mask, self.rejected_mask), logprobs
        )


def load_preferences(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, margin_column: str | None = None,
    probability_column: str | None = None,
) -> Dataset[Preference]:
    """Return the preferences of a source; see `preferences_from_rows`.

    For a task, whose rows have an answer, the right answer is preferred to the answer of another question.
    """
    return preferences_from_rows(
        preference_rows(settings), settings.rendering, tokenizer, margin_column=margin_column,
        probability_column=probability_column,
    )


def preference_rows(settings: DataSettings) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a source; for a task, with right answers as `chosen` and other rows' as `rejected`."""
    rows = load_rows(settings)
    return rows if settings.task is None else right_and_wrong(rows)


def right_and_wrong(rows: Iterable[Mapping[str, Any]], *, num_wrong: int = 1) -> Iterator[dict[str, Any]]:
    """Yield each row with its answer as `chosen` and the answer of a later row as `rejected`.

    Args:
        num_wrong: number of pairs of each row, with different wrong answers; fewer if there are not so many.
    """
    rows = list(rows)
    answers = [str(row["answer"]) for row in rows]
    for i, row in enumerate(rows):
        wrong_answers = dict.fromkeys(answer for answer in answers[i + 1 :] + answers[:i] if answer != answers[i])
        # Without a wrong answer the pair is identical, which `preference_from_row` refuses with the reason.
        for wrong in itertools.islice(wrong_answers, num_wrong) if wrong_answers else (answers[i],):
            yield dict(row) | {"chosen": answers[i], "rejected": wrong}


def preferences_from_rows(
    rows: Iterable[Mapping[str, Any]], settings: RenderSettings, tokenizer: PreTrainedTokenizerBase,
    *, margin_column: str | None = None, probability_column: str | None = None,
) -> Dataset[Preference]:
    """Render and tokenise rows with the columns `chosen` and `rejected`, strings or chat messages (TRL's forms).

    With a prompt column, the two are completions of it; tokens in them that the assistant did not write, such as a
    tool's, are read and not trained on. Without one, both hold the prompt and the completion, and the prompt is their
    common beginning. The end-of-sequence token closes each completion, once.

    Args:
        margin_column: column of numbers by how much the chosen completion is better.
        probability_column: column of probabilities that the chosen completion is better.

    Raises:
        ConfigError: the settings contradict each other or the tokenizer.
        DataError: a row cannot be used (with its number), or no row can.
    """

    def make_pair(row: Mapping[str, Any], render: PromptRenderer) -> list[Preference]:
        pair = preference_from_row(row, render)
        if margin_column is not None:
            pair = replace(pair, margin=_margin(row, margin_column))
        if probability_column is not None:
            pair = replace(pair, probability=_probability(row, probability_column))
        return [pair]

    check_pair_settings(settings, tokenizer)
    return dataset_from_rows(rows, settings, tokenizer, make_pair)


def check_pair_settings(settings: RenderSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse settings that completions to compare cannot be rendered by.

    Raises:
        ConfigError: the tokenizer has no end-of-sequence token, or `taught_turns` is set.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("preferences end with the tokenizer's eos token, and it has none; set eos_token")
    if settings.taught_turns != "together":
        raise ConfigError(
            f"{settings.setting('taught_turns')} is {settings.taught_turns}, and is for supervised data alone; put the "
            "turns that are not compared into the prompt, and remove it"
        )


def preference_from_row(row: Mapping[str, Any], render: PromptRenderer) -> Preference:
    """Return the pair in a row with `chosen` and `rejected`.

    Raises:
        BadRow: the row cannot be used.
    """
    prompt, chosen, rejected = _columns(row, render)
    (prompt_ids, good, good_mask), (prompt_ids_of_rejected, bad, bad_mask) = (
        completion_tokens(prompt, text, render) for text in (chosen, rejected)
    )
    if prompt_ids != prompt_ids_of_rejected:
        raise BadRow("other_prompt", "is tokenised with another prompt before 'chosen' than before 'rejected'")
    if good == bad:
        raise BadRow("identical", "has the same completion in 'chosen' and 'rejected'")
    return Preference(prompt_ids, good, bad, chosen_mask=good_mask, rejected_mask=bad_mask)


def _probability(row: Mapping[str, Any], column: str) -> float:
    value = _number(row, column)
    if not 0.5 <= value <= 1:
        raise BadRow(
            "bad_probability",
            f"has probability {value} in the column {column!r}, and it must be from 0.5, where nobody knows, to 1; "
            "below, the rejected completion is the chosen one",
        )
    return value


def _number(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    if value is None:
        raise without_value(row, column)
    return as_number(value, column)


def _margin(row: Mapping[str, Any], column: str) -> float:
    value = _number(row, column)
    if not 0 <= value < math.inf:
        raise BadRow("bad_margin", f"has margin {value} in the column {column!r}, and it must be finite and at least 0")
    return value


def _columns(row: Mapping[str, Any], render: PromptRenderer) -> tuple[Text, Text, Text]:
    """Return (prompt, chosen, rejected) of a row."""
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise without_value(row, missing[0])
    chosen, rejected = (check_text(row[name], name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong_type", "has a string in one of 'chosen' and 'rejected', and messages in the other")
    name = render.settings.prompt_column
    if row.get(name) is not None:
        return check_text(row[name], name), chosen, rejected
    if render.chat and isinstance(chosen, str):
        raise BadRow(
            "missing_column",
            f"has no column {name!r}, and where one speaker ends and the other begins in the texts of 'chosen' and "
            f"'rejected' is not known; give a prompt, chat messages, or {render.settings.setting('chat', False)}",
        )
    return common_prompt(chosen, rejected, render.special_texts)


def completion_tokens(
    prompt: Text, completion: Text, render: PromptRenderer
) -> tuple[tuple[int, ...], tuple[int, ...], Mask]:
    """Return the token ids of a prompt, those of its completion with the end token, and the completion's mask.

    Raises:
        BadRow: the two cannot be rendered.
    """
    example = completion_example(prompt, completion, render)
    first = example.completion_mask.index(True)
    mask = example.completion_mask[first:]
    return example.token_ids[:first], example.token_ids[first:], None if all(mask) else mask
