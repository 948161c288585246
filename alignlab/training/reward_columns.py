"""Columns that reward functions need, compared with those that the data have before anything is generated."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from alignlab.errors import ConfigError
from alignlab.training.reward_functions import LoadedReward
from alignlab.training.reward_lookup import accepts_any, parameters, required
from alignlab.training.reward_process import IsolatedReward, json_problem, unsendable
from alignlab.types import Prompt

logger = logging.getLogger(__name__)

GIVEN = ("prompts", "completions", "prompt_ids", "completion_ids")
"""Arguments that every call has, whatever the dataset."""
RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")
"""Columns that no reward receives: a call's own arguments have these names, or hold what they would."""
OF_TRL = ("trainer_state", "log_extra", "log_metric")
_SHIPPED = "alignlab_rewards"


def reward_columns(prompts: Iterable[Prompt]) -> tuple[str, ...]:
    """Return the names of the columns that rewards receive of these prompts, in order of appearance."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return tuple(name for name in names if name not in RESERVED)


def check_columns(rewards: Sequence[LoadedReward], prompts: Sequence[Prompt], *, data: str) -> None:
    """Refuse a reward that needs what neither the data nor its options have; it could never work.

    A column that only some rows have is said in the log: the reward receives None for the others.

    Args:
        data: how the prompts are called in a message, such as "the training data".

    Raises:
        ConfigError: a reward requires an argument that no row has, or, being one of ours, refuses its options; or it
            runs in a process of its own, and a column that it takes is no JSON.
    """
    columns = reward_columns(prompts)
    _say_reserved(prompts, data)
    for reward in rewards:
        known = parameters(reward.function)
        needed = [name for name in required(known or {}) if name not in GIVEN and name not in reward.options]
        for name in needed:
            if name not in columns:
                raise ConfigError(missing_column(reward.name, name, columns, data))
            _refuse_empty(reward.name, name, prompts, data)
            _say_partial(reward.name, name, prompts, data)
        if isinstance(reward.function, IsolatedReward):
            _refuse_unsendable(reward, prompts)
        _try_shipped(reward, columns, data)


def missing_column(reward: str, name: str, columns: Sequence[str], data: str) -> str:
    """Return the message for a required argument that nothing gives."""
    if name in OF_TRL:
        return f"reward {reward!r} requires {name}, which TRL passes and alignlab does not; give it a default"
    near = difflib.get_close_matches(name, [*columns, *GIVEN], n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? Rename it, add" if near else "add"
    return (
        f"reward {reward!r} requires {name}, and {data} has only {', '.join(columns) or 'no columns'}; {hint} "
        "the column, or give the reward a default or an option of that name"
    )


def _say_reserved(prompts: Sequence[Prompt], data: str) -> None:
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name in GIVEN)
    if names:
        logger.warning(
            "the columns %s of %s do not reach the rewards, whose calls have arguments of these names; rename them",
            ", ".join(names), data,
        )  # fmt: skip


def _refuse_empty(reward: str, name: str, prompts: Sequence[Prompt], data: str) -> None:
    """Raise if a column that a reward requires holds nothing in any row: it could not apply to one of them."""
    if prompts and all(prompt.columns.get(name) is None for prompt in prompts):
        raise ConfigError(
            f"reward {reward!r} requires {name}, and this column holds nothing in all {len(prompts)} rows of {data}; "
            "fill it, or leave the reward out"
        )


def _say_partial(reward: str, name: str, prompts: Sequence[Prompt], data: str) -> None:
    without = [prompt.index for prompt in prompts if name not in prompt.columns]
    if without:
        logger.warning(
            "reward %r requires the column %r, which %d of %d rows of %s do not have, first row %d: it receives None "
            "there", reward, name, len(without), len(prompts), data, without[0],
        )  # fmt: skip


def _refuse_unsendable(reward: LoadedReward, prompts: Sequence[Prompt]) -> None:
    """Raise if a column that a reward takes cannot be sent to the process in which it runs."""
    known = parameters(reward.function)
    takes_all = known is None or accepts_any(known)
    for prompt in prompts:
        for name, value in prompt.columns.items():
            if name in RESERVED or name in reward.options or not (takes_all or name in (known or {})):
                continue
            problem = json_problem(value)
            if problem is not None:
                raise ConfigError(unsendable(reward.name, f"the column {name!r} of row {prompt.index}", problem))


def _try_shipped(reward: LoadedReward, columns: Sequence[str], data: str) -> None:
    """Call one of the rewards that come with alignlab on no completion at all: each checks its options and columns
    first. Another function is not called, for it may not expect an empty batch."""
    module = getattr(reward.function, "__module__", None)  # None, too, of a function that was made by exec
    if module is None or module.partition(".")[0] != _SHIPPED:
        return
    known = parameters(reward.function) or {}
    given: dict[str, Any] = {name: [] for name in (*columns, *GIVEN[:2], GIVEN[3])} | dict(reward.options)
    arguments = given if accepts_any(known) else {name: given[name] for name in known if name in given}
    try:
        reward.function(**arguments)
    except Exception as error:  # a plug-in says what is wrong in any class of error
        raise ConfigError(
            f"reward {reward.name!r} cannot score {data}, whose columns are {', '.join(columns) or 'none'}: {error}; "
            "correct its options, or the data"
        ) from error
