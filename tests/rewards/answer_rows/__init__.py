"""A table of (expected answer, completion, value) as chat and thinking models write, by category.

Every category has right and wrong answers. The rows say what a careful human marker would decide; where conventions
differ, `math_answer`'s docstring says which one it follows.
"""

from tests.rewards.answer_rows.asides import ASIDES
from tests.rewards.answer_rows.endings import ENDINGS
from tests.rewards.answer_rows.held_out import HELD_OUT
from tests.rewards.answer_rows.near_misses import NEAR_MISSES
from tests.rewards.answer_rows.notations import NOTATIONS
from tests.rewards.answer_rows.numbers import NUMBERS
from tests.rewards.answer_rows.places import PLACES
from tests.rewards.answer_rows.second_reading import SECOND_READING
from tests.rewards.answer_rows.soundness import SOUNDNESS
from tests.rewards.answer_rows.structures import STRUCTURES

Row = tuple[str, str, float]
ROWS: dict[str, list[Row]] = {
    **PLACES, **NUMBERS, **STRUCTURES, **HELD_OUT, **SOUNDNESS, **ENDINGS, **NEAR_MISSES, **SECOND_READING,
    **ASIDES, **NOTATIONS,
}  # fmt: skip
