import pytest
import torch

from alignlab.functional import shaping
from tests.reference import functional as twin


def test_penalty_by_hand():
    lengths = torch.tensor([0, 80, 81, 90, 100, 120])
    penalty = shaping.overlong_penalty(lengths, max_tokens=100, buffer_tokens=20, factor=0.5)
    torch.testing.assert_close(penalty, torch.tensor([0.0, 0.0, -0.025, -0.25, -0.5, -0.5]))


def test_penalty_equals_the_slow_twin():
    lengths = torch.arange(60)
    penalty = shaping.overlong_penalty(lengths, max_tokens=50, buffer_tokens=13, factor=2.0)
    expected = torch.tensor([twin.overlong_penalty(length, 50, 13, 2.0) for length in lengths.tolist()])
    torch.testing.assert_close(penalty, expected)


@pytest.mark.parametrize("buffer_tokens", [0, 101])
def test_a_buffer_outside_the_limit_is_refused(buffer_tokens):
    with pytest.raises(ValueError, match=r"between 1 and max_tokens \(100\)"):
        shaping.overlong_penalty(torch.tensor([1]), max_tokens=100, buffer_tokens=buffer_tokens, factor=1.0)
