import pytest
from alignlab_rewards.length import length


def test_length_is_one_within_the_limits_and_falls_outside() -> None:
    ids = [[0] * count for count in (0, 1, 2, 3, 4, 5, 6, 8, 9)]
    values = length(completion_ids=ids, min_tokens=3, max_tokens=5, falloff_tokens=4)
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.75, 0.25, 0.0]


def test_length_without_an_upper_limit() -> None:
    assert length(completion_ids=[[0] * 999, []], min_tokens=1, falloff_tokens=1) == [1.0, 0.0]


@pytest.mark.parametrize("wrong", [{"min_tokens": -1}, {"min_tokens": 3, "max_tokens": 2}, {"falloff_tokens": 0}])
def test_impossible_limits_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="min_tokens <= max_tokens"):
        length(completion_ids=[[0]], **wrong)
