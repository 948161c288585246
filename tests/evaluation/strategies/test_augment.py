from __future__ import annotations

import itertools
from statistics import fmean

import pytest

from alignlab.errors import ConfigError, DataError
from alignlab.evaluation.strategies.augment import augment, joined, read_templates, same_rows
from alignlab.evaluation.strategies.pool import Pool
from alignlab.evaluation.strategies.settings import Augment
from alignlab.evaluation.strategies.voting import weighted_value
from alignlab.types import Completion, Prompt, Rollout


def test_equally_many_samples_of_each_form_vote(problem):
    # Form one says answer 0 (right) twice, form two says 1 or 2: a pair is a tie, all four are won by answer 0.
    of_one = problem([0, 0, 1, 2], [1.0, 1.0, 0.0, 0.0])
    [two, four] = augment([of_one], 2, [1, 2, 3, 4], 0)
    assert (two.k, two.values, four.k, four.values) == (2, (0.5,), 4, (1.0,))


def test_subsets_are_drawn_within_each_form(problem):
    of_one = problem([0, 1, 0, 1, 1, 2], [1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    [figure] = augment([of_one], 2, [4], 0)
    truth = fmean(
        weighted_value(of_one, [*first, *second], [1.0] * 4)
        for first in itertools.combinations(range(3), 2) for second in itertools.combinations(range(3, 6), 2)
    )  # fmt: skip
    assert figure.error > 0 and abs(figure.accuracy - truth) < 4 * figure.error


def test_pools_of_forms_are_joined_problem_by_problem():
    prompts = [Prompt((row,), "?", row) for row in range(2)]
    pools = [Pool({}, tuple(Rollout(p, (Completion.of((1,), f"{form}{p.index}"),)) for p in prompts)) for form in "ab"]
    assert [[c.text for c in r.completions] for r in joined(pools).rollouts] == [["a0", "b0"], ["a1", "b1"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt}\n", "at least 2 different forms"),
        ("{prompt}\n{prompt}\n", "has 1 in 2 lines"),
        ("{prompt}\nq\n", "each line must contain {prompt}, and one is 'q'"),
        ("{prompt} 1\n{prompt} 2\n{prompt} 3\n{prompt} 4\n{prompt} 5\n", "--num-samples is 4, and must be at least"),
    ],
)
def test_wrong_forms_are_refused(tmp_path, text, message):
    (tmp_path / "forms.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_templates(Augment(templates=tmp_path / "forms.txt"), 4)


def test_forms_are_lines_and_a_missing_file_is_named(tmp_path):
    (tmp_path / "forms.txt").write_text("{prompt}\n\nQ: {prompt}\\nA:\n")
    assert read_templates(Augment(templates=tmp_path / "forms.txt"), 2) == ["{prompt}", "Q: {prompt}\nA:"]
    with pytest.raises(ConfigError, match=r"none\.txt cannot be read"):
        read_templates(Augment(templates=tmp_path / "none.txt"), 2)


def test_a_form_that_loses_a_problem_is_refused():
    prompts = [Prompt((row,), "?", row) for row in (2, 0, 1)]
    assert [p.index for p in same_rows(prompts, [prompts[1], prompts[0]], "{prompt}")] == [0, 2]
    with pytest.raises(DataError, match="leaves out row 1"):
        same_rows(prompts[:2], prompts, "{prompt}")
