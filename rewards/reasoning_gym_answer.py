"""Reward for an exactly right answer, by the scorer of its reasoning_gym task."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from alignlab_rewards.answers.columns import expected_answer, plain_number
from alignlab_rewards.answers.options import check_choice
from alignlab_rewards.answers.votes import reads_answers

from alignlab.types import Text, message_text

# A sign counts unless something that can be subtracted from stands right before it; a point needs a digit behind it.
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]])[-+−])?(?<![\w.])(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def read_answer(completion: str, *, extract: str = "last_number") -> str | None:
    """Return the extracted answer as votes count it, numbers by value: 7.0 is 7, and 1,000 is 1000."""
    answer = extract_answer(completion, extract)
    number = None if answer is None else plain_number(answer)
    return answer if number is None else str(number)


@reads_answers(read_answer)
def reasoning_gym_answer(
    *,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    answer: Sequence[Any],
    task: Sequence[str | None] | None = None,
    task_options: Sequence[Mapping[str, Any] | None] | None = None,
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    extract: Literal["last_number", "tagged", "whole"] = "last_number",
    **columns: Any,
) -> list[float | None]:
    """Return 1.0 where the extracted answer is exactly right, else 0.0; partial credit counts as 0.0.

    Args:
        prompts: the questions, strings or chat messages.
        completions: strings or chat messages.
        answer: the dataset's column. The value is None where it is None or NaN, which is logged once. Without a task,
            the answer of a text that ends with a line `#### 72`, as in GSM8K, is 72.
        task, task_options, metadata: the columns of a task's rows. With a `task`, its own `score_answer` must return
            exactly 1; without one, numbers are compared by value, and other answers as text.
        extract: the part of the completion that is the answer; see `extract_answer`.
        columns: unused.
    """
    check_choice("reasoning_gym_answer", "extract", extract, ("last_number", "tagged", "whole"))
    absent: list[None] = [None] * len(completions)
    rows = zip(prompts, completions, answer, task or absent, task_options or absent, metadata or absent, strict=True)
    values: list[float | None] = []
    for prompt, completion, expected, task_name, options, details in rows:
        gold = _expected(expected, task_name, extract)
        if gold is None:
            values.append(None)
            continue
        extracted = extract_answer(message_text(completion), extract)
        if extracted is not None and task_name is not None:
            entry = {"question": message_text(prompt), "answer": gold, "metadata": details or {}}
            values.append(float(_scores_one(extracted, task_name, options, entry)))
        else:
            values.append(float(extracted is not None and _same(extracted, gold)))
    return values


def _expected(value: Any, task: str | None, extract: str) -> str | None:
    """Return the expected answer's text; a task's is not changed, since its scorer compares with it."""
    if task is not None and isinstance(value, str):
        return value
    gold = expected_answer(value, reward="reasoning_gym_answer")
    if gold is not None and gold.several and extract == "last_number":
        raise ValueError(
            f"reasoning_gym_answer compares the last number with one expected answer, and a row holds {value!r:.100}; "
            "use the reward math_answer, or extract: whole"
        )
    return None if gold is None else gold.text


def extract_answer(text: str, extract: str = "last_number") -> str | None:
    """Return the answer in a completion's text; None where there is none.

    - "last_number": the last integer or decimal, without the commas between groups of three digits and without a period
      behind it. A sign belongs to it if it touches the first digit and nothing to subtract from stands right before it:
      -4 in "= -4", but 9 in "5-9". Digits inside a word are no number.
    - "tagged": the text between the last <answer> and </answer>.
    - "whole": the whole text, without the white space around it.

    Raises:
        ValueError: `extract` is none of these.
    """
    if extract == "last_number":
        numbers = _NUMBER.findall(text)
        return numbers[-1].replace(",", "").replace("−", "-") if numbers else None
    if extract == "tagged":
        tagged = _TAGGED.findall(text)
        return tagged[-1].strip() if tagged else None
    if extract == "whole":
        return text.strip()
    raise ValueError(f"extract must be last_number, tagged or whole, and is {extract!r}")


def _same(answer: str, expected: str) -> bool:
    number, expected_number = plain_number(answer), plain_number(expected)
    if number is not None and expected_number is not None:
        return number == expected_number
    return answer.strip() == expected.strip()


def _scores_one(answer: str, task: str, options: Mapping[str, Any] | None, entry: Mapping[str, Any]) -> bool:
    scorer = _scorer(task, json.dumps(options or {}, sort_keys=True))
    try:
        return bool(scorer.score_answer(answer, entry) == 1.0)
    except Exception:
        # If the scorer fails on the right answer too, the row is at fault and not the completion.
        scorer.score_answer(entry["answer"], entry)
        return False


@functools.lru_cache(maxsize=64)
def _scorer(task: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(options), size=1, seed=0)
