import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from alignlab.evaluation.comparison import (
    MeasuredPolicy,
    comparison_json,
    difference,
    disagreements,
    plot_comparison,
    show_comparison,
)
from alignlab.evaluation.results import EvaluatedProblem, EvaluationResult
from alignlab.functional.estimation import mcnemar_exact, mcnemar_interval, paired_bootstrap, sign_flip_test


def policy(name: str, greedy: str, num_correct: str, *, strict: float | None = 0.5) -> MeasuredPolicy:
    """`greedy` has a 1 for each problem answered right, `num_correct` a digit a problem: right samples of 4."""
    problems = tuple(
        EvaluatedProblem(f"problem {i}", str(i), f"{name} says {i}", right == "1", ("x",), int(count))
        for i, (right, count) in enumerate(zip(greedy, num_correct, strict=True))
    )
    n = len(problems)
    sampled = sum(problem.num_correct for problem in problems) / (4 * n)
    result = EvaluationResult(
        greedy.count("1") / n, sampled, strict, strict, {1: sampled, 4: 0.75}, n, 4, problems, 3.0, 2.5
    )
    return MeasuredPolicy(name, f"models/{name}", result, num_parameters=1_560_000, seconds=2.0)


FIRST = policy("first", "0000110000", "0000440000")
BETTER = policy("better", "1111101110", "4444424440")
SAME = policy("same", "0000110000", "0000330000")


def shown(policies: list[MeasuredPolicy], width: int = 120, num_shown: int = 0) -> str:
    stream = io.StringIO()
    show_comparison(Console(file=stream, width=width), policies, num_shown)
    return stream.getvalue()


def test_difference_by_hand() -> None:
    change = difference(FIRST.result, BETTER.result)
    assert (change.num_gained, change.num_lost) == (7, 1)
    assert change.greedy == (0.6, *mcnemar_interval(7, 1, 10), mcnemar_exact(7, 1))
    # Seven problems gain 4 of 4 samples, one loses 2 of 4.
    by_problem = [1.0] * 4 + [0.0, -0.5] + [1.0] * 3 + [0.0]
    assert change.sampled == pytest.approx((0.65, *paired_bootstrap(by_problem), sign_flip_test(by_problem)))
    back = difference(BETTER.result, FIRST.result)
    assert back.greedy[:3] == pytest.approx((-0.6, -change.greedy.high, -change.greedy.low))
    assert not change.greedy.exceeds_chance and change.sampled.exceeds_chance, "2 * 9 / 2^8 = 0.07; 0.03"


def test_equal_policies_do_not_differ() -> None:
    change = difference(FIRST.result, FIRST.result)
    assert change.greedy == (0.0, 0.0, 0.0, 1.0) and change.sampled == (0.0, 0.0, 0.0, 1.0)
    assert not change.greedy.exceeds_chance


def test_results_of_other_problems_are_not_compared() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        difference(FIRST.result, policy("short", "01", "04").result)


def test_json_has_every_number() -> None:
    first, better = json.loads(json.dumps(comparison_json([FIRST, BETTER])))
    assert first["difference"] is None and first["name"] == "first" and first["model"] == "models/first"
    assert (better["greedy"], better["sampled"], better["pass@4"], better["strict_greedy"]) == (0.8, 0.85, 0.75, 0.5)
    assert better["num_parameters"] == 1_560_000 and better["sampled_tokens"] == 2.5
    assert better["tokens_per_s"] == 10 * (3.0 + 4 * 2.5) / 2.0
    assert better["difference"]["greedy"]["value"] == 0.6 and better["difference"]["num_gained"] == 7
    assert better["difference"]["sampled"]["exceeds_chance"] is True


@pytest.mark.parametrize("width", [30, 80, 120])
def test_the_table_has_a_row_a_model_and_marks_differences_beyond_chance(width: int) -> None:
    text = shown([FIRST, BETTER, SAME], width)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["first"] == ["0.200", "0.200", "0.750", "0.500", "2.5", "1.56M"]
    assert rows["better"][:2] == ["0.800", "0.850"] and "+0.600" in rows, "0.07 is no less than 0.05"
    assert rows["+0.600"] == ["+0.650*"] and rows["+0.000"] == ["-0.050"]
    assert "10 problems, 4 samples each" in text and "difference from first" in " ".join(text.split())
    low, high = mcnemar_interval(7, 1, 10)
    assert f"{low:+.2f}..{high:+.2f}" in rows


def test_a_column_without_numbers_is_empty() -> None:
    text = shown([policy("a", "10", "40", strict=None), policy("[b]", "01", "04", strict=None)])
    assert "[b]" in text and "None" not in text


def test_problems_on_which_policies_disagree_are_shown_side_by_side() -> None:
    assert disagreements([FIRST, SAME]) == [] and disagreements([FIRST, BETTER, SAME]) == [0, 1, 2, 3, 5, 6, 7, 8]
    text = shown([FIRST, BETTER], num_shown=2)
    assert "2 of 8 problems" in text
    for said in ("wrong: first says 0", "right: better says 0", "right: first says 5", "wrong: better says 5"):
        assert said in text
    assert text.count("says") == 4 and "0 of 0 problems" in shown([FIRST, SAME], num_shown=2)


def test_plot(tmp_path: Path) -> None:
    plot_comparison([FIRST, BETTER, SAME], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
