"""Problems from reasoning_gym, in a training and an evaluation split that share no question."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from alignlab.errors import ConfigError, DataError
from alignlab.files.digests import sha256_of

logger = logging.getLogger(__name__)

DEFAULT_SIZE = 1000
_CHUNK = 500
_PATIENCE = 2000


def split_of(question: str, *, eval_frac: float) -> str:
    """Return the split of a question, "eval" or "train", which depends on its text and `eval_frac` alone.

    A question is in "eval" if the SHA-256 of its text, read as a fraction of 1, is below `eval_frac`. So it is in the
    same split for every seed and size.
    """
    first_64_bits = int(sha256_of(question)[:16], 16)
    return "eval" if first_64_bits < eval_frac * 2**64 else "train"


def task_rows(
    task: str,
    *,
    options: Mapping[str, Any] | None = None,
    split: str = "train",
    size: int | None = None,
    eval_frac: float = 0.2,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return distinct problems of one split of a task, in the order of the task's generator.

    Args:
        task: a reasoning_gym task, such as "chain_sum".
        options: fields of the task's configuration, except `size` and `seed`.
        split: "train" or "eval".
        size: number of problems; default 1000. If the task has fewer distinct questions in this split, all of them
            are returned, with a warning.
        eval_frac: fraction of all distinct questions that belongs to "eval".
        seed: seed of the generator.

    Returns:
        Rows with `prompt` (the question), `answer`, `task`, `task_options` and `metadata`, from which the reward
        `reasoning_gym_answer` scores an answer.

    Raises:
        ConfigError: reasoning_gym is not installed, or the task, an option or the split does not exist.
        DataError: the split has no question at all.
    """
    options = dict(options or {})
    num_rows = DEFAULT_SIZE if size is None else size
    if split not in ("train", "eval"):
        raise ConfigError(f'the split of a task is "train" or "eval", and data.split is {split!r}; use one of the two')
    _check_options(task, options)
    rows = _distinct(task, options, split, num_rows, eval_frac, seed)
    if not rows:
        raise DataError(
            f"the split {split!r} of task {task!r} must hold at least one question, and it holds none "
            f"(eval_frac {eval_frac}); change eval_frac, or the task's options so that it has more questions"
        )
    if len(rows) < num_rows:
        logger.log(
            logging.INFO if size is None else logging.WARNING,
            "task %s has only %d distinct questions in split %r, and %d were asked for: using all of them",
            task, len(rows), split, num_rows,
        )  # fmt: skip
    return rows


def _distinct(
    task: str, options: Mapping[str, Any], split: str, num_rows: int, eval_frac: float, seed: int
) -> list[dict[str, Any]]:
    """Return up to `num_rows` rows; fewer once a long run of draws has produced no new question."""
    rows: list[dict[str, Any]] = []
    questions: set[str] = set()
    draws_since_new = 0
    for entry in _draws(task, options, seed):
        if len(rows) >= num_rows or draws_since_new >= max(_PATIENCE, 10 * len(questions)):
            break
        question = entry["question"]
        if question in questions:
            draws_since_new += 1
            continue
        draws_since_new = 0
        questions.add(question)
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
    """Yield endless problems. Problem i depends on seed + i, so a chunk with a shifted seed continues the last one."""
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
    option_names = {field.name for field in dataclasses.fields(from_factory[task][1])}
    for name in options:
        if name in ("size", "seed"):
            raise ConfigError(f"data.task_options must not hold {name!r}; set data.{name} instead")
        if name not in option_names:
            near = difflib.get_close_matches(name, option_names, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            available = ", ".join(sorted(option_names - {"size", "seed"}))
            raise ConfigError(f"task {task!r} has no option {name!r}{hint} It has: {available}")


def _reasoning_gym() -> ModuleType:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            "data.task needs the package reasoning_gym, which is not installed; "
            "run: pip install 'alignlab[tasks]' (or: pip install reasoning-gym)"
        ) from error
    return reasoning_gym
