import pytest
from alignlab_rewards.combine import combine


def sometimes(*, completions: list[str], **columns: object) -> list[float | None]:
    return [None if text == "skip" else 2.0 for text in completions]


def too_few(*, completions: list[str], **columns: object) -> list[float | None]:
    return []


def test_combine_sums_the_weighted_values_of_the_parts_that_apply() -> None:
    parts = {"exact_match": 1.0, "regex_format": {"weight": 0.5, "pattern": r"\d+"}, f"{__name__}:sometimes": -0.25}
    values = combine(parts=parts, prompts=["q"] * 3, completions=["4", "5", "skip"], answer=["4", "4", "4"])
    assert values == [1.0, 0.0, 0.0]


def test_combine_is_none_where_no_part_applies() -> None:
    parts = {"exact_match": 1.0, f"{__name__}:sometimes": {}}
    columns = {"prompts": ["q"] * 2, "completions": ["skip", "a"], "answer": [None, None]}
    assert combine(parts=parts, **columns) == [None, 2.0]


def test_an_unknown_part_and_a_wrong_count_of_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"'exact_mach' that is not installed; installed: .*exact_match"):
        combine(parts={"exact_mach": 1.0}, completions=["a"])
    with pytest.raises(ValueError, match="must return a list of 1 values"):
        combine(parts={f"{__name__}:too_few": 1.0}, completions=["a"])
