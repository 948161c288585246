"""Columns that reward functions need, compared with those that the data have before anything is generated."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignlab.errors import ConfigError
from alignlab.training.reward_functions import LoadedReward, accepts_any, parameters, required
from alignlab.types import Prompt

logger = logging.getLogger(__name__)

GIVEN = ("prompts", "completions", "prompt_ids", "completion_ids")
"""Arguments that every call has, whatever the dataset."""
RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")
"""Columns that no reward receives: a call's own arguments have these names, or hold what they would."""
OF_TRL = ("trainer_state", "log_extra", "log_metric")
_SHIPPED = "alignlab_rewards"
_OF_PARTS = "combine"
_SINGLE = ("str", "int", "float", "bool", "dict", "Mapping", "Literal")


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
        ConfigError: a reward requires an argument that no row has, or, being one of ours, refuses its options.
    """
    columns = reward_columns(prompts)
    _say_reserved(prompts, data)
    for reward in rewards:
        known = parameters(reward.function)
        needed = [name for name in required(known or {}) if name not in GIVEN and name not in reward.options]
        for name in needed:
            if name not in columns and known is not None and _is_option(known[name]):
                raise ConfigError(_missing_option(reward.name, name))
            if name not in columns:
                raise ConfigError(missing_column(reward.name, name, columns, data))
            _refuse_empty(reward.name, name, prompts, data)
            _say_partial(reward.name, name, prompts, data)
        if _is_shipped(reward):
            _try_shipped(reward, columns, data)
            _refuse_inapplicable(reward, prompts, columns, data)


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


def _missing_option(reward: str, name: str) -> str:
    return (
        f"reward {reward!r} requires the option {name}, which is not given; add it, as options: {{{name}: ...}} or, in "
        f"Python, RewardSettings(name=..., options={{{name!r}: ...}}) or functools.partial(reward, {name}=...)"
    )


def _is_option(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter is annotated as one value or a mapping: a column is a list, one value a sample."""
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return text.partition("[")[0].partition(" |")[0].rpartition(".")[2] in _SINGLE


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


def _try_shipped(reward: LoadedReward, columns: Sequence[str], data: str) -> None:
    """Call one of the rewards that come with alignlab on no completion at all: each checks its options and columns
    first."""
    try:
        _called(reward, {name: [] for name in columns}, [], [])
    except Exception as error:  # a plug-in says what is wrong in any class of error
        raise ConfigError(
            f"reward {reward.name!r} cannot score {data}, whose columns are {', '.join(columns) or 'none'}: {error}; "
            "correct its options, or the data"
        ) from error


def _refuse_inapplicable(
    reward: LoadedReward, prompts: Sequence[Prompt], columns: Sequence[str], data: str
) -> None:
    """Raise if one of the rewards that come with alignlab applies to no row: nothing could be learnt from it.

    The rows are tried with an empty completion, up to the first that has a value.
    """
    if not prompts or reward.function.__name__ == _OF_PARTS:  # whose parts may be anybody's
        return
    failure: Exception | None = None
    for prompt in prompts:
        try:
            values = _called(reward, {name: [prompt.columns.get(name)] for name in columns}, [prompt.text], [""])
        except Exception as error:  # such as an expected answer that cannot be read
            failure = error
            continue
        if values[0] is not None:
            return
    why = "it gives None for each" if failure is None else f"it gives None or fails for each, as with: {failure}"
    raise ConfigError(
        f"reward {reward.name!r} applies to none of the {len(prompts)} rows of {data}: {why}; correct the column that "
        "it compares with, or leave the reward out"
    )


def _is_shipped(reward: LoadedReward) -> bool:
    """Return whether a reward comes with alignlab: another one is not called, for it may not expect an empty batch."""
    module = getattr(reward.function, "__module__", None)  # None, too, of a function that was made by exec
    return module is not None and module.partition(".")[0] == _SHIPPED


def _called(
    reward: LoadedReward, columns: Mapping[str, Any], prompts: Sequence[Any], completions: Sequence[str]
) -> Any:
    """Return what a reward gives to completions of no tokens."""
    known = parameters(reward.function) or {}
    given: dict[str, Any] = {**columns, "prompts": prompts, "completions": completions}
    given |= {"completion_ids": [[] for _ in completions], **reward.options}
    return reward.function(**(given if accepts_any(known) else {name: given[name] for name in known if name in given}))
