import pytest
from alignlab_rewards.repetition import repetition


def test_repetition_is_minus_the_fraction_of_repeated_ngrams() -> None:
    completions = ["a b c d", "a b A b a", "a a a a a", "a", ""]
    assert repetition(completions=completions, ngram_size=2) == [0.0, -0.5, -0.75, 0.0, 0.0]


def test_ngram_size_counts_words() -> None:
    assert repetition(completions=["a a b b"], ngram_size=1) == [-0.5]
    assert repetition(completions=["a a b b"]) == [0.0]
    with pytest.raises(ValueError, match="ngram_size >= 1"):
        repetition(completions=["a"], ngram_size=0)
