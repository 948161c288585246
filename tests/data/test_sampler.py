import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data.sampler import IndexSampler
from alignlab.errors import CheckpointError, ConfigError

sizes = st.integers(1, 20)


@settings(deadline=None)
@given(sizes, st.integers(1, 7), st.integers(0, 5), st.integers(1, 4))
def test_every_item_once_an_epoch(num_items: int, batch_size: int, seed: int, epochs: int) -> None:
    sampler = IndexSampler(num_items, batch_size, seed)
    drawn: list[int] = []
    while len(drawn) < epochs * num_items:
        batch = sampler.next()
        assert len(batch) == batch_size
        drawn += batch
    for epoch in range(epochs):
        assert sorted(drawn[epoch * num_items : (epoch + 1) * num_items]) == list(range(num_items))


@settings(deadline=None)
@given(sizes, st.integers(1, 7), st.integers(0, 5), st.integers(0, 15))
def test_resumed_equals_uninterrupted(num_items: int, batch_size: int, seed: int, batches: int) -> None:
    whole = IndexSampler(num_items, batch_size, seed)
    for _ in range(batches):
        whole.next()
    resumed = IndexSampler(num_items, batch_size, seed)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert [resumed.next() for _ in range(9)] == [whole.next() for _ in range(9)]


def test_order_depends_on_seed_and_epoch() -> None:
    first = IndexSampler(50, 50, seed=0)
    epochs = [first.next(), first.next(), IndexSampler(50, 50, seed=1).next()]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])
    assert epochs[0] == IndexSampler(50, 50, seed=0).next()


def test_order_is_the_same_in_every_process() -> None:
    assert IndexSampler(8, 8, seed=0).next() == [0, 2, 1, 4, 6, 7, 3, 5]


def test_batches_continue_across_the_end_of_an_epoch() -> None:
    sampler = IndexSampler(3, 2, seed=0)
    assert len(sampler.take(7)) == 7
    assert sampler.state_dict() == {"num_items": 3, "seed": 0, "digest": "", "epoch": 2, "position": 1}


@pytest.mark.parametrize(("num_items", "seed", "named"), [(4, 0, "num_items was 3"), (3, 1, "seed was 0")])
def test_a_state_of_other_data_is_refused(num_items: int, seed: int, named: str) -> None:
    state = IndexSampler(3, 2, seed=0).state_dict()
    with pytest.raises(CheckpointError, match=named):
        IndexSampler(num_items, 2, seed=seed).load_state_dict(state)


def test_a_state_of_other_items_of_the_same_number_is_refused() -> None:
    state = IndexSampler(3, 2, seed=0, digest="a").state_dict()
    IndexSampler(3, 2, seed=0, digest="a").load_state_dict(state)
    with pytest.raises(CheckpointError, match="digest was a and is b"):
        IndexSampler(3, 2, seed=0, digest="b").load_state_dict(state)


def test_no_items_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one item"):
        IndexSampler(0, 2, seed=0)
