"""Items of training data, made of rows: the items, the number of rows left out by reason, and a digest."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, overload

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.rendering import PromptRenderer
from alignlab.data.rows import readable_rows
from alignlab.errors import DataError
from alignlab.files.digests import fast_digest
from alignlab.types import TokenSequences

logger = logging.getLogger(__name__)


class HasSequences(Protocol):
    """An item of training data: one or more sequences of token ids that a model reads whole."""

    @property
    def sequences(self) -> TokenSequences:
        """Token ids of each sequence, its prompt included."""
        ...

    @property
    def labels(self) -> tuple[float, ...]:
        """Numbers that training uses beside the tokens, such as a mask or a margin."""
        ...


Item = TypeVar("Item", bound=HasSequences)
Item_co = TypeVar("Item_co", bound=HasSequences, covariant=True)


@dataclass(frozen=True)
class Dataset(Sequence[Item_co], Generic[Item_co]):
    """Items in the order of the rows that they were made of.

    Attributes:
        items: one or more for each row that can be used.
        skipped: number of rows that were left out, by the reason of their `BadRow`, such as too_long.
    """

    items: tuple[Item_co, ...]
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Item_co: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset[Item_co]: ...
    def __getitem__(self, index: int | slice) -> Item_co | Dataset[Item_co]:
        if isinstance(index, slice):
            return Dataset(self.items[index], self.skipped)
        return self.items[index]


def keep(items: Sequence[Item], is_kept: Sequence[bool], reason: str) -> Dataset[Item]:
    """Return some of the items, with the others counted as skipped.

    Args:
        is_kept: of each item.
        reason: why the others are left out, such as "no_room".
    """
    skipped = items.skipped if isinstance(items, Dataset) else Counter[str]()
    kept = tuple(item for item, stays in zip(items, is_kept, strict=True) if stays)
    return Dataset(kept, skipped + Counter({reason: len(items) - len(kept)}))


class BadRows:
    """Rows that cannot be used: counted or refused, as `settings.on_bad_row` says.

    Attributes:
        counts: number of rows that were left out, by reason.
    """

    def __init__(self, settings: RenderSettings) -> None:
        self._settings = settings
        self.counts: Counter[str] = Counter()

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Leave the row of this number out if the context raises `BadRow`.

        Raises:
            DataError: `BadRow` was raised, and `on_bad_row` is "error".
        """
        try:
            yield
        except BadRow as error:
            if self._settings.on_bad_row == "error":
                raise DataError(
                    f"{self._settings.source}: row {index} (the first is 0) {error}; correct the row, or set "
                    f"{self._settings.setting('on_bad_row', 'skip')} to leave such rows out"
                ) from error
            self.counts[error.reason] += 1

    def dataset_of(self, items: Sequence[Item]) -> Dataset[Item]:
        """Return the items of the other rows as a dataset; see `report`."""
        self.report(len(items))
        return Dataset(tuple(items), self.counts)

    def report(self, num_items: int) -> None:
        """Log how many rows were left out.

        Args:
            num_items: that were made of the other rows.

        Raises:
            DataError: `num_items` is 0.
        """
        settings = self._settings
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.counts.items()))
        if not num_items:
            fix = f"check the rows and {settings.setting('prompt_column')}"
            if self.counts["too_long"]:
                fix += f", and raise {settings.setting('max_prompt_tokens')}, which is {settings.max_prompt_tokens}"
            raise DataError(
                f"{settings.source}: a dataset must hold at least one usable row, and this has none "
                f"(skipped: {counts or 'no rows at all'}); {fix}"
            )
        if self.counts:
            logger.warning("%s: skipped %d rows (%s)", settings.source, self.counts.total(), counts)


def dataset_from_rows(
    rows: Iterable[Mapping[str, Any]],
    settings: RenderSettings,
    tokenizer: PreTrainedTokenizerBase,
    make_items: Callable[[Mapping[str, Any], PromptRenderer], Iterable[Item]],
) -> Dataset[Item]:
    """Return the items that `make_items` makes of each row and the row's renderer.

    Raises:
        ConfigError: the settings contradict each other or the tokenizer.
        DataError: a row cannot be used (with its number), or no row can.
    """
    renderer = PromptRenderer(settings, tokenizer)
    bad_rows = BadRows(settings)
    items: list[Item] = []
    for index, row in enumerate(readable_rows(rows, settings)):
        with bad_rows.at(index):
            items += make_items(*renderer.read(row, index))
    return bad_rows.dataset_of(items)


def digest_of(items: Iterable[HasSequences]) -> str:
    """Return 128 hexadecimal bits that differ for items of other tokens or labels, or in another order."""
    return fast_digest(part for item in items for part in _as_bytes(item.sequences, item.labels))


def _as_bytes(sequences: TokenSequences, labels: tuple[float, ...]) -> Iterator[bytes]:
    # Lengths first, so that equal tokens which are divided otherwise differ.
    yield array("q", [len(sequences), *map(len, sequences), len(labels)]).tobytes()
    for token_ids in sequences:
        yield array("q", token_ids).tobytes()
    yield array("d", labels).tobytes()


def fitting(
    items: Sequence[Item], positions: Mapping[str, float], *, skip: bool, advice: str = "data.on_bad_row=skip"
) -> Sequence[Item]:
    """Return the items whose sequences have no more tokens than there are positions.

    Args:
        positions: number of positions of each model, by its name in messages, such as "the model".
        skip: leave the other items out, and log how many.
        advice: the setting that turns `skip` on, for the message.

    Raises:
        DataError: an item does not fit and `skip` is False, or no item fits.
    """
    model, limit = min(positions.items(), key=lambda named: named[1])
    lengths = [max(map(len, item.sequences)) for item in items]
    too_long = [index for index, length in enumerate(lengths) if length > limit]
    if not too_long:
        return items
    if not skip:
        first = too_long[0]
        raise DataError(
            f"example {first} (the first is 0) has {lengths[first]} tokens, and must fit {model}'s {limit:g} "
            f"positions; shorten it, or set {advice} to leave such rows out"
        )
    if len(too_long) == len(items):
        raise DataError(
            f"all {len(items)} examples have more tokens than {model}'s {limit:g} positions, the shortest "
            f"{min(lengths)}; give shorter rows, or a model of more positions"
        )
    logger.warning(
        "skipped %d of %d examples: more tokens than %s's %g positions", len(too_long), len(items), model, limit
    )
    return keep(items, [length <= limit for length in lengths], "no_room")
