"""Strategies as they are written on the command line."""

import pytest

from alignlab.errors import ConfigError
from alignlab.evaluation.strategies.settings import STRATEGIES, Budget, Weighted, name_of, parse_strategy


def test_a_name_alone_has_the_defaults():
    strategy = parse_strategy("weighted")
    assert isinstance(strategy, Weighted) and strategy.reward_name == "logprob"
    assert name_of(strategy) == "weighted"


def test_values_are_read_as_in_a_config():
    strategy = parse_strategy("budget:budgets=[16,32],waits=1,end=</think>,answer_tokens=8")
    assert isinstance(strategy, Budget)
    assert (strategy.budgets, strategy.waits, strategy.end, strategy.answer_tokens) == ((16, 32), 1, "</think>", 8)
    assert parse_strategy("budget:budgets=16") == Budget(budgets=(16,))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("majorty", "must be one of majority, best_of_n.*did you mean majority"),
        ("best_of_n", "reward is missing"),
        ("augment", "templates is missing"),
        ("budget", "budgets is missing"),
        ("budget:budgets=0", r"budgets is \[0\], and must hold numbers of thinking tokens, each at least 1"),
        ("budget:budgets=[8,8]", "hold each number once"),
        ("confidence:window=0", "window is 0, and must be at least 1"),
        ("confidence:consensus=0.4", "must be greater than 0.5"),
        ("weighted:by=x", "by is not a setting"),
        ("majority:x", "'x' must be key=value"),
        ("calibrated:held_out_frac=1", "must be less than 1"),
    ],
)
def test_a_wrong_word_is_refused_with_the_rule(word, message):
    with pytest.raises(ConfigError, match=f"--strategy.*{message}"):
        parse_strategy(word)


def test_every_strategy_that_counts_votes_says_so():
    assert {name for name, kind in STRATEGIES.items() if not kind.counts_votes} == {"best_of_n", "budget"}
