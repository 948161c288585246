"""Perplexity and calibration of a model on given texts, with intervals."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignlab.evaluation.likelihood.texts import ScoredText, Window
from alignlab.functional.calibration import Bin, error_interval, solve_temperature
from alignlab.functional.distillation import Head, log_distribution
from alignlab.functional.intervals import ratio_interval
from alignlab.functional.logprobs import default_chunk_tokens, head_logits
from alignlab.masked_tokens import masked_tokens
from alignlab.models.decoder import output_head
from alignlab.models.evaluation_mode import evaluation_mode
from alignlab.models.policy import Policy
from alignlab.types import Experience, Segments

DIGITS = 4
MIN_DOCUMENTS = 8
"""With fewer texts, windows are resampled instead of texts."""
NUM_BINS = 15
NUM_RESAMPLES = 500
MAX_CALIBRATION_TOKENS = 8192
TOKENS_AT_ONCE = 4096
_LARGEST_EXPONENT = math.log(sys.float_info.max)


class Interval(NamedTuple):
    """A figure and the bounds of its 95 % interval; nan where a single text or window says nothing about them."""

    value: float
    low: float
    high: float

    def map(self, function: Any) -> Interval:
        """Return the figures under an increasing function."""
        return Interval(*map(function, self))

    def to_json(self) -> dict[str, float | None]:
        """Return the rounded numbers, by name; None for those that are not finite."""
        rounded = {name: round(value, DIGITS) for name, value in self._asdict().items()}
        return {name: value if math.isfinite(value) else None for name, value in rounded.items()}


class TokenStatistics(NamedTuple):
    """Numbers of M tokens, under the model's own distribution and under one of another temperature; [M] each.

    Attributes:
        nats, tempered_nats: -log p of the token.
        confidence, tempered_confidence: probability of the likeliest token there.
        right: 1 where that is the token.
    """

    nats: Tensor
    confidence: Tensor
    right: Tensor
    tempered_nats: Tensor
    tempered_confidence: Tensor


@dataclass(frozen=True)
class Reliability:
    """An expected calibration error of the likeliest next token, its interval, and its bins."""

    error: Interval
    bins: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the error, and the bins that are not empty."""
        rows = [{name: round(value, DIGITS) for name, value in of_bin._asdict().items()} for of_bin in self.bins]
        return {**self.error.to_json(), "bins": [row for row in rows if row["size"]]}


@dataclass(frozen=True)
class TextLikelihood:
    """The likelihood of texts.

    Attributes:
        token, word, byte: perplexity by unit: exp of the nats of all tokens over the number of units; infinity beyond
            the largest floating-point number.
        bits_per_byte: log2 of the one by byte.
        num_texts, num_tokens, num_words, num_bytes: sizes.
        resampled: what the intervals are over, texts or windows.
        reliability: of the likeliest next token.
        temperature: fitted on other texts; None without any.
        tempered, tempered_token: reliability and perplexity by token with that temperature.
        units: nats, tokens and bytes of each text or window that is resampled.
    """

    token: Interval
    word: Interval
    byte: Interval
    bits_per_byte: Interval
    num_texts: int
    num_tokens: int
    num_words: int
    num_bytes: int
    resampled: str
    reliability: Reliability
    temperature: float | None = None
    tempered: Reliability | None = None
    tempered_token: Interval | None = None
    units: tuple[tuple[float, float, float], ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        entries: dict[str, Interval | Reliability | None] = {
            "token_perplexity": self.token, "word_perplexity": self.word, "byte_perplexity": self.byte,
            "bits_per_byte": self.bits_per_byte, "token_perplexity_tempered": self.tempered_token,
            "calibration": self.reliability, "calibration_tempered": self.tempered,
        }  # fmt: skip
        sizes = {name: getattr(self, name) for name in ("num_texts", "num_tokens", "num_words", "num_bytes")}
        numbers = {name: value.to_json() for name, value in entries.items() if value is not None}
        temperature = {} if self.temperature is None else {"temperature": round(self.temperature, DIGITS)}
        return {**sizes, "resampled": self.resampled, **temperature, **numbers}


class LikelihoodMeter:
    """Measures texts under a model.

    Args:
        model: a causal language model, with or without an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._policy = Policy(model)
        self._head = Head(*output_head(model))
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def fit_temperature(self, windows: Sequence[Window]) -> tuple[float, int]:
        """Return the temperature that makes texts likeliest, and the number of tokens that it is fitted on.

        At most `MAX_CALIBRATION_TOKENS`, from the first window on.

        Reference: Guo et al. (2017), arXiv:1706.04599, Sec. 4.2.
        """
        states, targets, count = [], [], 0
        for _, hidden, ids in self._states(windows):
            states.append(hidden)
            targets.append(ids)
            count += len(ids)
            if count >= MAX_CALIBRATION_TOKENS:
                break
        hidden, ids = torch.cat(states)[:MAX_CALIBRATION_TOKENS], torch.cat(targets)[:MAX_CALIBRATION_TOKENS]

        def slope(inverse: float) -> float:
            return float(sum(self._slope(hidden[chunk], ids[chunk], inverse) for chunk in _chunks(hidden)))

        return solve_temperature(slope), len(ids)

    def _slope(self, hidden: Tensor, ids: Tensor, inverse: float) -> Tensor:
        """Return the slope of the loss by the inverse temperature: sum of the mean logit less the token's."""
        logits = head_logits(hidden, self._head.weight, bias=self._head.bias, softcap=self._head.softcap).float()
        mean = (torch.softmax(logits * inverse, dim=-1) * logits).sum(-1)
        return (mean - logits.gather(1, ids[:, None])[:, 0]).double().sum()

    @torch.no_grad()
    def measure(
        self, texts: Sequence[ScoredText], windows: Sequence[Window], *, temperature: float | None = None, seed: int = 0
    ) -> TextLikelihood:
        """Return the likelihood of texts.

        Args:
            texts: at least one.
            windows: of the texts, see `windows_of`.
            temperature: fitted on other texts, if any.
            seed: of the bootstrap.
        """
        by_text = len(texts) >= MIN_DOCUMENTS
        units = _Units(len(texts) if by_text else len(windows))
        for numbers, hidden, ids in self._states(windows):
            statistics = self._statistics(hidden, ids, temperature or 1.0)
            places = torch.tensor([windows[number].text if by_text else number for number in numbers])
            units.add(places, statistics)
        return units.likelihood(texts, "texts" if by_text else "windows", temperature, seed)

    def _states(self, windows: Sequence[Window]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield, for packs of windows, of each token that counts: its window, the state that predicts it, its id."""
        with evaluation_mode(self._policy.modules()):
            for pack in _packs(windows):
                lengths = tuple(len(windows[number].token_ids) for number in pack)
                order = tuple(range(len(pack)))
                segments = Segments(lengths, (-1,) * len(pack), order, order)
                ids = torch.tensor([i for number in pack for i in windows[number].token_ids])
                scored = torch.tensor([s for number in pack for s in windows[number].scored])
                moved = Experience(ids, segments, scored).to(self._device)
                hidden, _ = self._policy.predicting_states(moved.tokens, moved.segments, moved.completion_mask)
                places = masked_tokens(moved.completion_mask, moved.segments.predecessors).indices
                yield [number for number in pack for s in windows[number].scored if s], hidden, moved.tokens[places]

    def _statistics(self, hidden: Tensor, ids: Tensor, temperature: float) -> TokenStatistics:
        parts = []
        for chunk in _chunks(hidden):
            log_p = log_distribution(hidden[chunk], self._head, width=len(self._head.weight), temperature=1.0).float()
            best, likeliest = log_p.max(-1)
            tempered = log_p if temperature == 1.0 else (log_p / temperature).log_softmax(-1)
            place = ids[chunk, None]
            parts.append(
                TokenStatistics(
                    -log_p.gather(1, place)[:, 0], best.exp(), (likeliest == ids[chunk]).float(),
                    -tempered.gather(1, place)[:, 0], tempered.amax(-1).exp(),
                )
            )
        columns = torch.stack([torch.cat(columns).double() for columns in zip(*parts, strict=True)])
        return TokenStatistics(*columns.cpu())


class _Units:
    """Sums over the tokens of each unit: a text or a window."""

    def __init__(self, count: int) -> None:
        self.nats, self.tempered_nats, self.tokens = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
        # Sums of [ones, confidence, right] of each unit and bin.
        self.bins, self.tempered_bins = (torch.zeros(count, NUM_BINS, 3, dtype=torch.float64) for _ in range(2))

    def add(self, places: Tensor, statistics: TokenStatistics) -> None:
        """Add tokens, each at the place of its unit."""
        ones = torch.ones_like(statistics.nats)
        self.tokens.index_add_(0, places, ones)
        self.nats.index_add_(0, places, statistics.nats)
        self.tempered_nats.index_add_(0, places, statistics.tempered_nats)
        for bins, confidence in (
            (self.bins, statistics.confidence), (self.tempered_bins, statistics.tempered_confidence)
        ):
            numbers = (confidence * NUM_BINS).long().clamp(0, NUM_BINS - 1)
            rows = torch.stack([ones, confidence, statistics.right], dim=1)
            bins.view(-1, 3).index_add_(0, places * NUM_BINS + numbers, rows)

    def likelihood(
        self, texts: Sequence[ScoredText], resampled: str, temperature: float | None, seed: int
    ) -> TextLikelihood:
        """Return the figures."""
        num_tokens = int(self.tokens.sum())
        num_words, num_bytes = sum(text.num_words for text in texts), sum(text.num_bytes for text in texts)
        by_text = resampled == "texts"
        words = torch.tensor([float(t.num_words) for t in texts]) if by_text else self.tokens * num_words / num_tokens
        sizes = torch.tensor([float(t.num_bytes) for t in texts]) if by_text else self.tokens * num_bytes / num_tokens
        by_byte = _ratio(self.nats, sizes, seed)
        return TextLikelihood(
            token=_ratio(self.nats, self.tokens, seed).map(_exp), word=_ratio(self.nats, words, seed).map(_exp),
            byte=by_byte.map(_exp), bits_per_byte=by_byte.map(lambda nats: nats / math.log(2)),
            num_texts=len(texts), num_tokens=num_tokens, num_words=num_words, num_bytes=num_bytes, resampled=resampled,
            reliability=_reliability(self.bins, seed), temperature=temperature,
            tempered=None if temperature is None else _reliability(self.tempered_bins, seed),
            tempered_token=None if temperature is None else _ratio(self.tempered_nats, self.tokens, seed).map(_exp),
            units=tuple(zip(self.nats.tolist(), self.tokens.tolist(), sizes.tolist(), strict=True)),
        )


def difference(first: TextLikelihood, second: TextLikelihood) -> Interval | None:
    """Return how many bits a byte the second model needs more than the first, with the paired bootstrap's interval.

    None for the first itself, and where the two read other units: windows of different tokenizers.
    """
    pairs = list(zip(first.units, second.units, strict=False))
    is_same = len(first.units) == len(second.units) > 1 and first.resampled == second.resampled
    if first is second or not is_same or (first.resampled == "windows" and any(a[1] != b[1] for a, b in pairs)):
        return None
    nats = [b[0] - a[0] for a, b in pairs]
    sizes = [a[2] for a, _ in pairs]
    if sum(sizes) == 0:
        return None
    low, high = ratio_interval(nats, sizes)
    return Interval(sum(nats) / sum(sizes), low, high).map(lambda value: value / math.log(2))


def _ratio(nats: Tensor, sizes: Tensor, seed: int) -> Interval:
    """Return nats a unit of size; infinity where the texts have nothing of that size, such as no word."""
    total = float(sizes.sum())
    if total == 0:
        return Interval(math.inf, math.inf, math.inf)
    value = float(nats.sum()) / total
    if len(nats) == 1:
        return Interval(value, math.nan, math.nan)
    return Interval(value, *ratio_interval(nats.tolist(), sizes.tolist(), seed=seed))


def _reliability(sums: Tensor, seed: int) -> Reliability:
    """Return the calibration error of units' sums [U, bins, 3], with its bootstrap interval over the units."""
    generator = torch.Generator().manual_seed(seed)
    errors = [
        _error(sums[torch.randint(len(sums), (len(sums),), generator=generator)].sum(0)) for _ in range(NUM_RESAMPLES)
    ]
    bins = tuple(
        Bin(i / NUM_BINS, (i + 1) / NUM_BINS, int(size), confidence / max(1.0, size), right / max(1.0, size))
        for i, (size, confidence, right) in enumerate(sums.sum(0).tolist())
    )
    error = _error(sums.sum(0))
    bounds = error_interval(error, errors) if len(sums) > 1 else (math.nan, math.nan)
    return Reliability(Interval(error, *bounds), bins)


def _error(sums: Tensor) -> float:
    """Return the expected calibration error of sums [bins, 3] of ones, confidences and rights."""
    return float((sums[:, 2] - sums[:, 1]).abs().sum() / sums[:, 0].sum())


def _exp(nats: float) -> float:
    return math.inf if nats >= _LARGEST_EXPONENT else math.exp(nats)


def _chunks(hidden: Tensor) -> Iterator[slice]:
    size = default_chunk_tokens(hidden.device.type)
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def _packs(windows: Sequence[Window]) -> Iterator[list[int]]:
    """Yield the numbers of the windows that are computed together."""
    pack: list[int] = []
    size = 0
    for number, window in enumerate(windows):
        if pack and size + len(window.token_ids) > TOKENS_AT_ONCE:
            yield pack
            pack, size = [], 0
        pack.append(number)
        size += len(window.token_ids)
    if pack:
        yield pack
