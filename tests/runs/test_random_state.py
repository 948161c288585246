import json
import random

import numpy as np
import pytest
import torch

from alignlab.runs.random_state import RandomState, random_state, restore_random_state


def draw() -> tuple[list[float], list[float], list[float]]:
    return (
        [random.random(), random.gauss(0, 1), random.getrandbits(40)],
        [np.random.rand(), np.random.randn(), float(np.random.randint(1 << 30))],
        torch.cat([torch.rand(3), torch.randn(3)]).tolist(),
    )


def test_generators_continue_exactly_after_a_round_trip() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # an odd number of normal draws leaves a spare one inside Python's and numpy's generators
    saved = random_state()
    saved = RandomState(saved.tensors, json.loads(json.dumps(saved.state)))
    expected = draw()
    draw()
    restore_random_state(saved)
    assert draw() == expected


def test_a_saved_state_is_a_copy() -> None:
    torch.manual_seed(0)
    saved = random_state()
    first = torch.rand(4)
    restore_random_state(saved)
    assert torch.equal(torch.rand(4), first)
    assert not torch.equal(torch.rand(4), first)


@pytest.mark.gpu
def test_the_cuda_generator_continues_exactly() -> None:
    torch.cuda.manual_seed(0)
    torch.rand(1, device="cuda")
    saved = random_state()
    expected = torch.rand(4, device="cuda")
    restore_random_state(saved)
    assert torch.equal(torch.rand(4, device="cuda"), expected)
