"""Problems from reasoning_gym, in a training and an evaluation split that share no question."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from alignlab.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

DEFAULT_SIZE = 1000
_CHUNK = 500
_PATIENCE = 2000


def split_of(question: str, *, eval_frac: float) -> str:
    """The split that a question belongs to, decided by its text alone: "eval" or "train".

    The SHA-256 of the text, read as a fraction of 1, is below `eval_frac` or not. So no seed and no size can bring
    a question into both splits, and a question keeps its split for ever.
    """
    digest = hashlib.sha256(question.encode()).digest()
    return "eval" if int.from_bytes(digest[:8], "big") < eval_frac * 2**64 else "train"


def task_rows(
    task: str,
    *,
    options: Mapping[str, Any] | None = None,
    split: str = "train",
    size: int | None = None,
    eval_frac: float = 0.2,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Distinct problems of one split of a task, in the order in which the task's generator makes them.

    Args:
        task: a reasoning_gym task, such as "chain_sum".
        options: fields of the task's configuration, except `size` and `seed`.
        split: "train" or "eval".
        size: problems wanted; default 1000. Where the task has fewer distinct questions in this split, all that
            exist are returned and a warning says so.
        eval_frac: fraction of all distinct questions that belongs to "eval".
        seed: of the generator.

    Returns:
        Rows with `prompt` (the question), `answer`, `task`, `task_options` and `metadata`; the reward
        `reasoning_gym_answer` needs no more to score an answer.

    Raises:
        ConfigError: reasoning_gym is not installed, or the task, an option or the split does not exist.
        DataError: the split has no question at all.
    """
    options = dict(options or {})
    wanted = DEFAULT_SIZE if size is None else size
    if split not in ("train", "eval"):
        raise ConfigError(f'the split of a task is "train" or "eval", and data.split is {split!r}; use one of the two')
    _check_options(task, options)
    rows = _distinct(task, options, split, wanted, eval_frac, seed)
    if not rows:
        raise DataError(
            f"the split {split!r} of task {task!r} must hold at least one question, and it holds none "
            f"(eval_frac {eval_frac}); change eval_frac, or the task's options so that it has more questions"
        )
    if len(rows) < wanted:
        logger.log(
            logging.INFO if size is None else logging.WARNING,
            "task %s has only %d distinct questions in split %r, and %d were asked for: using all of them",
            task, len(rows), split, wanted,
        )  # fmt: skip
    return rows


def _distinct(
    task: str, options: Mapping[str, Any], split: str, wanted: int, eval_frac: float, seed: int
) -> list[dict[str, Any]]:
    """Up to `wanted` rows; stops early once a long run of draws has brought nothing new."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    draws_since_new = 0
    for entry in _draws(task, options, seed):
        if len(rows) >= wanted or draws_since_new >= max(_PATIENCE, 10 * len(seen)):
            break
        question = entry["question"]
        if question in seen:
            draws_since_new += 1
            continue
        draws_since_new = 0
        seen.add(question)
        if split_of(question, eval_frac=eval_frac) == split:
            rows.append(
                {
                    "prompt": question,
                    "answer": str(entry["answer"]),
                    "task": task,
                    "task_options": dict(options),
                    "metadata": entry["metadata"],
                }
            )
    return rows


def _draws(task: str, options: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """The generator's problems without an end. Problem i depends on seed + i, so chunks with moved seeds go on."""
    gym = _reasoning_gym()
    for chunk in itertools.count():
        try:
            problems = gym.create_dataset(task, **options, size=_CHUNK, seed=seed + chunk * _CHUNK)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(
                f"task {task!r} refuses its options {dict(options)}: {error}; correct data.task_options"
            ) from error
        for index in range(_CHUNK):
            yield problems[index]


def _check_options(task: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown task or option by name, with the nearest that exist."""
    from_factory = _reasoning_gym().factory.DATASETS
    if task not in from_factory:
        near = difflib.get_close_matches(task, from_factory, n=5, cutoff=0.4)
        raise ConfigError(
            f"data.task must be a reasoning_gym task, and {task!r} is none; "
            f"nearest: {', '.join(near) or 'none'} ({len(from_factory)} exist)"
        )
    known = {field.name for field in dataclasses.fields(from_factory[task][1])}
    for name in options:
        if name in ("size", "seed"):
            raise ConfigError(f"data.task_options must not hold {name!r}; set data.{name} instead")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            others = ", ".join(sorted(known - {"size", "seed"}))
            raise ConfigError(f"task {task!r} has no option {name!r}{hint} It has: {others}")


def _reasoning_gym() -> ModuleType:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            "data.task needs the package reasoning_gym, which is not installed; "
            "run: pip install 'alignlab[tasks]' (or: pip install reasoning-gym)"
        ) from error
    return reasoning_gym
