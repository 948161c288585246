"""Checks, before anything is generated, that the data have the columns that reward functions need."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignlab.errors import ConfigError
from alignlab.scoring.isolated.reward import IsolatedReward, json_problem, not_json_message
from alignlab.scoring.loading import LoadedReward
from alignlab.scoring.plugins import CALL_ARGUMENTS, accepted_arguments, accepts_any, parameters, required
from alignlab.types import Prompt

logger = logging.getLogger(__name__)

RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")
"""Columns that no reward receives: arguments of every call have these names, or hold the same content."""
TRL_ARGUMENTS = ("trainer_state", "log_extra", "log_metric")
_SHIPPED_PACKAGE = "alignlab_rewards"
_COMBINING = "combine"
"""The shipped reward that sums other rewards, which may be anybody's."""
_SINGLE_VALUE_TYPES = ("str", "int", "float", "bool", "dict", "Mapping", "Literal")


def reward_columns(prompts: Iterable[Prompt]) -> tuple[str, ...]:
    """Return the names of the columns that rewards receive of these prompts, in order of appearance."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return tuple(name for name in names if name not in RESERVED)


def check_columns(rewards: Sequence[LoadedReward], prompts: Sequence[Prompt], *, data: str) -> None:
    """Raise if a reward could never work on the data; warn of a required column that only some rows have.

    Args:
        rewards: the reward functions.
        prompts: prompts with the columns of their rows.
        data: name of the prompts in a message, such as "the training data".

    Raises:
        ConfigError: a reward requires an argument that no row has; a shipped reward refuses its options or applies to
            no row; or an isolated reward takes a column that is not JSON.
    """
    columns = reward_columns(prompts)
    _warn_of_shadowed_columns(prompts, data)
    for reward in rewards:
        signature = parameters(reward.function) or {}
        for name in required(signature):
            if name not in CALL_ARGUMENTS and name not in reward.options:
                _check_required(reward.name, signature[name], columns, prompts, data)
        if isinstance(reward.function, IsolatedReward):
            _check_json(reward, prompts)
        if _is_shipped(reward):
            _check_options(reward, columns, data)
            _check_applies(reward, prompts, columns, data)


def _check_required(
    reward: str, parameter: inspect.Parameter, columns: Sequence[str], prompts: Sequence[Prompt], data: str
) -> None:
    """Raise if no row has a column that a reward requires, and warn if only some rows have it."""
    name = parameter.name
    if name not in columns:
        is_option = _is_option(parameter)
        raise ConfigError(_missing_option(reward, name) if is_option else missing_column(reward, name, columns, data))
    if all(prompt.columns.get(name) is None for prompt in prompts):
        raise ConfigError(
            f"reward {reward!r} requires {name}, and this column holds nothing in all {len(prompts)} rows of {data}; "
            "fill it, or leave the reward out"
        )
    without = [prompt.index for prompt in prompts if name not in prompt.columns]
    if without:
        logger.warning(
            "reward %r requires the column %r, which %d of %d rows of %s do not have, first row %d: it receives None "
            "there", reward, name, len(without), len(prompts), data, without[0],
        )  # fmt: skip


def missing_column(reward: str, name: str, columns: Sequence[str], data: str) -> str:
    """Return the message for a required argument that neither the data nor the options have."""
    if name in TRL_ARGUMENTS:
        return f"reward {reward!r} requires {name}, which TRL passes and alignlab does not; give it a default"
    near = difflib.get_close_matches(name, [*columns, *CALL_ARGUMENTS], n=1, cutoff=0.6)
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
    return text.partition("[")[0].partition(" |")[0].rpartition(".")[2] in _SINGLE_VALUE_TYPES


def _warn_of_shadowed_columns(prompts: Sequence[Prompt], data: str) -> None:
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name in CALL_ARGUMENTS)
    if names:
        logger.warning(
            "the columns %s of %s do not reach the rewards, whose calls have arguments of these names; rename them",
            ", ".join(names), data,
        )  # fmt: skip


def _check_json(reward: LoadedReward, prompts: Sequence[Prompt]) -> None:
    """Raise if a column that an isolated reward takes cannot be sent to its process."""
    signature = parameters(reward.function)
    takes_all = signature is None or accepts_any(signature)
    for prompt in prompts:
        for name, value in prompt.columns.items():
            if name in RESERVED or name in reward.options or not (takes_all or name in (signature or {})):
                continue
            problem = json_problem(value)
            if problem is not None:
                column = f"the column {name!r} of row {prompt.index}"
                raise ConfigError(not_json_message(reward.name, column, problem))


def _check_options(reward: LoadedReward, columns: Sequence[str], data: str) -> None:
    """Raise if a shipped reward refuses its options or columns, which it checks first: call it on no completion."""
    try:
        _call(reward, {name: [] for name in columns}, [], [])
    except Exception as error:  # a plug-in may report what is wrong in an error of any class
        raise ConfigError(
            f"reward {reward.name!r} cannot score {data}, whose columns are {', '.join(columns) or 'none'}: {error}; "
            "correct its options, or the data"
        ) from error


def _check_applies(reward: LoadedReward, prompts: Sequence[Prompt], columns: Sequence[str], data: str) -> None:
    """Raise if a shipped reward applies to no row: call it on an empty completion of each until one has a value."""
    if not prompts or reward.function.__name__ == _COMBINING:
        return
    failure: Exception | None = None
    for prompt in prompts:
        try:
            values = _call(reward, {name: [prompt.columns.get(name)] for name in columns}, [prompt.text], [""])
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
    """Return whether a reward comes with alignlab; others may not expect an empty batch, and are not tried."""
    module = getattr(reward.function, "__module__", None)  # a function made by exec has a module of None
    return module is not None and module.partition(".")[0] == _SHIPPED_PACKAGE


def _call(
    reward: LoadedReward, columns: Mapping[str, Any], prompts: Sequence[Any], completions: Sequence[str]
) -> Any:
    """Return what a shipped reward returns for completions without tokens."""
    available: dict[str, Any] = {**columns, "prompts": prompts, "completions": completions}
    available |= {"completion_ids": [[] for _ in completions], **reward.options}
    return reward.function(**accepted_arguments(parameters(reward.function), available))
