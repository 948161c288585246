"""1 where the answer in the completion is exactly right, by the scorer of its reasoning_gym task."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from alignlab_rewards.answers.columns import expected_answer, plain_number
from alignlab_rewards.answers.options import check_choice

from alignlab.types import Text, message_text

# A sign counts unless something that can be subtracted from stands right before it; a point needs a digit behind it.
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]])[-+−])?(?<![\w.])(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


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
    """1.0 where the extracted answer is exactly right, else 0.0; partial credit counts as 0.0.

    Args:
        prompts: the questions, strings or chat messages.
        completions: strings or chat messages.
        answer: the dataset's column; the reward does not apply where it is None or NaN, which the log says once.
            Without a task, a text that ends with a line `#### 72`, as in GSM8K, is the 72.
        task, task_options, metadata: the columns of a task's rows. With `task` given, the task's own `score_answer`
            must return exactly 1; without it, numbers are compared by value, and other answers as text.
        extract: how the answer is taken from the completion; see `extract_answer`.
        columns: unused.
    """
    check_choice("reasoning_gym_answer", "extract", extract, ("last_number", "tagged", "whole"))
    nothing: list[None] = [None] * len(completions)
    rows = zip(prompts, completions, answer, task or nothing, task_options or nothing, metadata or nothing, strict=True)
    values: list[float | None] = []
    for prompt, completion, expected, name, options, details in rows:
        gold = _expected(expected, name, extract)
        if gold is None:
            values.append(None)
            continue
        given = extract_answer(message_text(completion), extract)
        entry = {"question": message_text(prompt), "answer": gold, "metadata": details or {}}
        right = given is not None and (_same(given, gold) if name is None else _scored(given, name, options, entry))
        values.append(float(right))
    return values


def _expected(value: Any, task: str | None, extract: str) -> str | None:
    """Return the expected answer's text: of a task's row as it stands, since its scorer compares with that."""
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
    """The answer in a completion's text; None where there is none.

    - "last_number": the last integer or decimal. A sign belongs to it when it touches the first digit and nothing that
      it could be subtracted from stands right before it: -4 in "= -4", 9 in "5-9". Commas between groups of three
      digits are left out, a period after the number is no part of it, and digits inside a word are no number.
    - "tagged": what stands between the last <answer> and </answer>.
    - "whole": the whole text, without the white space around it.
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


def _same(given: str, expected: str) -> bool:
    numbers = plain_number(given), plain_number(expected)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    return given.strip() == expected.strip()


def _scored(found: str, task: str, options: Mapping[str, Any] | None, entry: Mapping[str, Any]) -> bool:
    score = _scorer(task, json.dumps(options or {}, sort_keys=True))
    try:
        return bool(score.score_answer(found, entry) == 1.0)
    except Exception:
        # Where the scorer fails on the right answer too, the row is at fault and not the completion.
        score.score_answer(entry["answer"], entry)
        return False


@functools.lru_cache(maxsize=64)
def _scorer(task: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(options), size=1, seed=0)
