"""Weights broadcast to real servers: from whole and from spread weights, with servers that fail in the middle."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignlab.types import SamplingParams
from tests.rollout.conftest import flat, make_prompts
from tests.rollout.vllm.conftest import DENSE, make_model, wait_until_up
from tests.rollout.vllm.test_sync import shake

pytestmark = pytest.mark.vllm
SAMPLING = SamplingParams(n=4, max_new_tokens=20, ignore_eos=True, seed=3)


@pytest.fixture(scope="module")
def pair(serve: Callable[..., Any], make_client: Callable[..., Any]) -> tuple[Any, Any, Any, Any]:
    """Return (engine, model, settings, processes) of two servers that get weights by broadcast."""
    model = make_model(DENSE)
    settings, processes = serve(model, count=2, transfer="broadcast")
    return make_client(model, settings), model, settings, processes


def tokens(engine: Any) -> list[tuple[int, ...]]:
    return [c.token_ids for c in flat(engine.generate(make_prompts(5, 9, 30, 17), SAMPLING))]


def test_two_servers_get_the_weights_of_every_update_in_one_group(pair: Any) -> None:
    engine, model, _, _ = pair
    names = set()
    for _ in range(3):
        shake(model)
        engine.update_weights(engine.policy_version + 1)
        assert engine.last_sync.gap.largest < 5e-5
        names.add(engine._backend._broadcast._rendezvous.name)
    assert len(names) == 1 and engine.metrics()["servers/alive"] == 2
    assert engine.last_sync.transfer.num_bytes == sum(w.nbytes for w in model.state_dict().values())
    assert engine._backend._pool._delivery.sent.path is None
