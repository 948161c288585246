"""Settings of test-time strategies, and their form on the command line: NAME or NAME:key=value,key=value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen, at_home
from alignlab.config.error_messages import BrokenRule
from alignlab.errors import ConfigError
from alignlab.files.input_files import parse_yaml

LOGPROB = "logprob"
"""In place of a reward's name: the mean log-prob of a completion's tokens under the model."""
JUDGE = "judge"
"""In place of a reward's name: the judge of the config's trainer."""
_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")


class _Strategy(Frozen):
    """A way to spend samples on a problem."""

    counts_votes: ClassVar[bool] = False
    """True if answers are read and compared."""

    @property
    def reward_name(self) -> str | None:
        """Name of the reward that the strategy chooses or weighs by; None where it uses none."""
        return None


class Majority(_Strategy):
    """The answer that most of k samples give."""

    counts_votes = True


class BestOfN(_Strategy):
    """The best of k samples by a reward."""

    reward: str = Field(min_length=1)
    """A reward plug-in, `file.py:function`, a reward model's folder, `judge` or `logprob`."""

    @property
    def reward_name(self) -> str | None:
        """Name of the reward."""
        return self.reward


class Weighted(_Strategy):
    """The answer with the largest sum of its samples' weights."""

    counts_votes = True
    weight: str = Field(LOGPROB, min_length=1)
    """As `reward` of best_of_n; `logprob` counts as exp(mean log-prob)."""
    link: Literal["value", "sigmoid"] = "value"
    """From a reward to a weight: its value, which must then be at least 0; or its sigmoid, for the score of a reward
    model, whose zero is arbitrary."""

    @property
    def reward_name(self) -> str | None:
        """Name of the reward."""
        return self.weight


class Confidence(_Strategy):
    """Votes weighted by confidence, with early stop: of samples that become unsure, and of sampling (DeepConf)."""

    counts_votes = True
    window: int = Field(16, ge=1)
    """Tokens of the sliding window whose mean log-prob is the confidence of a group of tokens."""
    keep_frac: float = Field(0.5, gt=0, le=1)
    """Of the first samples, the fraction whose least sure window is above the threshold; later samples are stopped at
    the first window below the threshold."""
    warmup: int = Field(4, ge=1)
    """First samples of a problem, which are drawn whole and set the threshold."""
    consensus: float = Field(0.95, gt=0.5, le=1)
    """Sampling stops once one answer has this share of the weights."""


class Budget(_Strategy):
    """Budget forcing: thinking is cut at a number of tokens, or drawn out by "Wait"; then the answer is asked for."""

    budgets: tuple[int, ...] = Field(min_length=1)
    """Tokens of thinking, one figure each."""
    waits: int = Field(0, ge=0)
    """How often an end of thinking before the budget is replaced by `wait`."""
    wait: str = Field("Wait", min_length=1)
    end: str | None = Field(None, min_length=1)
    """Text that ends the thinking, such as </think>; default: the model's end token."""
    cue: str = Field("\nFinal answer:", min_length=1)
    """Text that is put behind the thinking, and `end`, before the answer."""
    answer_tokens: int = Field(16, ge=1)
    """Largest length of the answer."""
    samples: int = Field(1, ge=1)
    """Traces a problem."""

    @field_validator("budgets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _check_budgets(self) -> Self:
        for budget in self.budgets:
            if budget < 1:
                must = "hold numbers of thinking tokens, each at least 1"
                raise BrokenRule("budgets", list(self.budgets), must, "for no thinking at all use --strategy majority")
        if len(set(self.budgets)) < len(self.budgets):
            raise BrokenRule("budgets", list(self.budgets), "hold each number once", "take the second one out")
        return self


class Adaptive(_Strategy):
    """Majority votes with more samples for harder problems: how many, is learnt on other problems."""

    counts_votes = True
    start: int = Field(4, ge=2)
    """First samples of a problem; the votes of their leading answer say how hard it is."""
    shuffles: int = Field(32, ge=1)
    """Random orders of the pool that the figures are the means of."""


class Calibrated(_Strategy):
    """The share of votes as a confidence, with a temperature fitted on held-out problems; error before and after."""

    counts_votes = True
    held_out_frac: float = Field(0.5, gt=0, lt=1)
    """Fraction of the problems that the temperature is fitted on; the error is measured on the others."""
    bins: int = Field(10, ge=1)


class Augment(_Strategy):
    """Majority votes over samples of several forms of the prompt."""

    counts_votes = True
    templates: Path
    """Text file with a form a line, each with {prompt} in it; \\n in a line is a line break."""

    _at_home = field_validator("templates", mode="before")(at_home)


Strategy = Majority | BestOfN | Weighted | Confidence | Budget | Adaptive | Calibrated | Augment
STRATEGIES: Mapping[str, type[Strategy]] = MappingProxyType(
    {
        "majority": Majority, "best_of_n": BestOfN, "weighted": Weighted, "confidence": Confidence, "budget": Budget,
        "adaptive": Adaptive, "calibrated": Calibrated, "augment": Augment,
    }
)  # fmt: skip


def name_of(strategy: Strategy) -> str:
    """Return the name of a strategy's kind."""
    return next(name for name, kind in STRATEGIES.items() if isinstance(strategy, kind))


def parse_strategy(word: str) -> Strategy:
    """Return the strategy of a word on the command line, such as `best_of_n:reward=length`.

    Raises:
        ConfigError: there is no such strategy, or a setting is unknown, missing or out of range.
    """
    name, _, rest = word.partition(":")
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        fix = f"did you mean {near[0]}" if near else "choose one of them"
        raise ConfigError(f"--strategy is {name!r}, and must be one of {', '.join(STRATEGIES)}; {fix}")
    settings: dict[str, Any] = {}
    for pair in filter(None, _OUTSIDE_BRACKETS.split(rest)):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--strategy {word}: {pair!r} must be key=value; write --strategy {name}:key=value,key=value"
            )
        settings[key.strip()] = parse_yaml(value, f"--strategy {word}")
    try:
        return STRATEGIES[name](**settings)
    except ConfigError as error:
        raise ConfigError(f"--strategy {word}: {error}") from None
