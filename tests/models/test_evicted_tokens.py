"""A budget of tokens: by hand, and against a slow twin that looks at one query of one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignlab.models.kv_approximation.evicted_tokens import EvictedTokens
from alignlab.models.kv_approximation.eviction_record import NEVER, record_of_evictions, recorded_drops
from alignlab.models.kv_approximation.heavy_hitters import ScoreOptions, attention_received, kept_places
from alignlab.models.sink_window import KeptTokens
from alignlab.types import Segments
from tests.models.attention_twins import assert_equals_twin, inputs
from tests.models.conftest import make_segments

OPTIONS = {"scaling": 0.4, "sliding_window": None, "softcap": 1.5}


def test_boundaries_by_hand() -> None:
    """A prompt of 7, then every 3 tokens: boundaries 7, 10, 13, after each of which 5 tokens are left."""
    kept = KeptTokens(heavy=2, recent=2, sinks=1, interval=3, observed=4)
    assert kept.budget == 5 and kept.query_window == 5
    assert [kept.num_dropped(position, 7) for position in (0, 6, 7, 9, 10, 12, 13)] == [0, 0, 2, 2, 5, 5, 8]
    assert [kept.next_boundary(position, 7) for position in (0, 6, 7, 9, 10)] == [7, 7, 10, 10, 13]
    assert kept.num_dropped(6, 3) == 1 and kept.num_dropped(5, 3) == 0  # boundaries 3, with nothing to drop, and 6
    assert kept.most_kept(100, 7) == 8 and kept.most_kept(6, 4) == 6
    once = kept._replace(interval=None)
    assert [once.num_dropped(position, 7) for position in (6, 7, 90)] == [0, 2, 2]
    assert (once.next_boundary(3, 7), once.next_boundary(7, 7), once.most_kept(100, 7)) == (7, None, 98)


def test_received_attention_by_hand() -> None:
    """One kv head with two query heads; two queries at positions 1 and 2, three keys. The first query sees two keys."""
    query = torch.tensor([[[1.0], [0.0]], [[2.0], [0.0]]])
    key = torch.tensor([[[0.0], [1.0], [2.0]]]) * torch.log(torch.tensor(2.0))
    received = attention_received(query, key, torch.tensor([1, 2]), torch.tensor([[0, 1, 2]]), ScoreOptions(1.0))
    # softmax over 2^(q k): 1:2, and 1:4:16; heads of zeros share equally.
    expected = torch.tensor([[1 / 3 + 1 / 2 + 1 / 21 + 1 / 3, 2 / 3 + 1 / 2 + 4 / 21 + 1 / 3, 16 / 21 + 1 / 3]])
    torch.testing.assert_close(received, expected)
    sinks = torch.tensor([0.0, -torch.inf])  # one more key of the first head: 1:2:1, and 1:4:16:1
    received = attention_received(
        query, key, torch.tensor([1, 2]), torch.tensor([[0, 1, 2]]), ScoreOptions(1.0, None, sinks)
    )
    torch.testing.assert_close(received[0, 2], torch.tensor(16 / 22 + 1 / 3))


def test_kept_places_by_hand() -> None:
    """The first token and the two last ones stay whatever they received, and the two largest of the others."""
    received = torch.tensor([[0.0, 3.0, 1.0, 2.0, 9.0, 0.0, 0.0], [0.0, 0.1, 0.4, 0.3, 0.2, 5.0, 5.0]])
    places = kept_places(received, KeptTokens(heavy=2, recent=2, sinks=1, interval=3, observed=4))
    assert places.tolist() == [[0, 1, 4, 5, 6], [0, 2, 3, 5, 6]]


def twin(query: Tensor, key: Tensor, value: Tensor, segments: Segments, evicted: EvictedTokens) -> Tensor:
    """Return [1,H,N,V], one query at a time; what a sequence has is a set of positions for each kv head."""
    output = torch.zeros_like(query)
    kept, heads = evicted.kept, range(key.shape[1])
    shared = query.shape[1] // key.shape[1]
    for index, prefix in enumerate(segments.prefixes):
        start, length = segments.starts[index], segments.lengths[index]
        tokens = list(range(start, start + length))
        num_prompt = segments.lengths[prefix] if prefix >= 0 else length
        if prefix >= 0:
            tokens = [*range(segments.starts[prefix], segments.starts[prefix] + num_prompt), *tokens]
        there = {head: [] for head in heads}
        total = {head: {} for head in heads}

        def weights(head: int, query_head: int, position: int, seen: list[int], tokens: list[int] = tokens) -> Tensor:
            scores = key[0, head, [tokens[j] for j in seen]] @ query[0, query_head, tokens[position]] * 0.4
            return (1.5 * torch.tanh(scores / 1.5)).softmax(0)

        for position, token in enumerate(tokens):
            past = position - num_prompt
            if past == 0 or (past > 0 and kept.interval is not None and past % kept.interval == 0):
                for head in heads:
                    if len(there[head]) <= kept.budget:
                        continue
                    received = dict.fromkeys(there[head], 0.0)
                    for i in range(max(0, position - kept.observed), position):
                        seen = [j for j in there[head] if j <= i]
                        for query_head in range(head * shared, (head + 1) * shared):
                            for j, weight in zip(seen, weights(head, query_head, i, seen).tolist(), strict=True):
                                received[j] += weight
                    if evicted.accumulate:
                        received = {j: number + total[head].get(j, 0.0) for j, number in received.items()}
                    middle = there[head][kept.sinks : len(there[head]) - kept.recent]
                    heavy = set(sorted(middle, key=lambda j, received=received: -received[j])[: kept.heavy])
                    there[head] = [j for j in there[head] if j not in middle or j in heavy]
                    total[head] = {j: received[j] for j in there[head]}
            for head in heads:
                there[head].append(position)
                if token >= start:
                    values = value[0, head, [tokens[j] for j in there[head]]]
                    for query_head in range(head * shared, (head + 1) * shared):
                        output[0, query_head, token] = weights(head, query_head, position, there[head]) @ values
    return output


@pytest.mark.parametrize(("sinks", "interval", "accumulate"), [
    (0, None, True), (2, 1, True), (1, 3, True), (1, 3, False),
])  # fmt: skip
def test_what_is_dropped_is_not_seen_again(sinks: int, interval: int | None, accumulate: bool) -> None:
    """Values, and gradients, which go through the tokens that are seen alone."""
    segments = make_segments([(5, [3, 7]), (6, []), (1, [8]), (9, [1, 4])])
    evicted = EvictedTokens(KeptTokens(2, 1, sinks, interval, observed=3), accumulate)
    ours, twins = (inputs(segments.num_tokens) for _ in range(2))
    output = evicted.attend(*ours, segments, sinks=None, **OPTIONS).transpose(1, 2)
    expected = twin(*twins, segments, evicted)
    assert_equals_twin(output, ours, expected, twins)


def test_a_layer_with_a_window_keeps_it() -> None:
    segments, evicted = make_segments([(6, [5])]), EvictedTokens(KeptTokens(1, 1, 0, 2, 2), True)
    query, key, value = inputs(11)
    windowed = evicted.attend(query, key, value, segments, sinks=None, **(OPTIONS | {"sliding_window": 4}))
    own = EvictedTokens(KeptTokens(99, 1, 0, 2, 2), True)
    torch.testing.assert_close(
        windowed, own.attend(query, key, value, segments, sinks=None, **(OPTIONS | {"sliding_window": 4}))
    )


@pytest.mark.parametrize("interval", [None, 2, 3])
def test_a_record_gives_back_what_was_dropped_and_when(interval: int | None) -> None:
    """Of two layers of three, with other numbers of heads, from the places that an engine keeps."""
    kept = KeptTokens(heavy=2, recent=1, sinks=1, interval=interval, observed=3)
    evicted, num_prompt, count = EvictedTokens(kept, True), 9, 20
    query, key, _ = (x.detach()[0] for x in inputs(count))
    expected = {0: evicted.drops(query, key, num_prompt, ScoreOptions(0.4))}
    expected[2] = evicted.drops(query[:2], key[:1].clone(), num_prompt, ScoreOptions(0.7))
    evictions: dict[int, dict[int, Tensor]] = {}
    for layer_idx, drops in expected.items():
        there = torch.arange(num_prompt).expand(len(drops), -1)
        boundary = num_prompt
        while boundary is not None and boundary < count:
            if there.shape[1] > kept.budget:
                is_kept = drops.gather(1, there) > boundary
                places = is_kept.nonzero()[:, 1].view(len(drops), -1)
                evictions.setdefault(boundary, {})[layer_idx] = places
                there = there.gather(1, places)
            following = kept.next_boundary(boundary, num_prompt)
            if following is not None:
                there = torch.cat((there, torch.arange(boundary, following).expand(len(drops), -1)), dim=1)
            boundary = following
    record = record_of_evictions(evictions, kept, {0: 2, 2: 1}, count, num_prompt)
    assert record.shape == (count, 3, 1 + 4 * 2) and not record[:, 1].any()
    for layer_idx, drops in expected.items():
        found = recorded_drops(record[:num_prompt, layer_idx], record[num_prompt:, layer_idx], len(drops), kept)
        assert torch.equal(found, drops)
        assert (drops == NEVER).sum(1).min() >= kept.budget


def test_a_record_of_one_token_is_read() -> None:
    """Of a prompt of one token, and of a completion of one, in the layout that they have in a pack."""
    kept = KeptTokens(heavy=1, recent=1, sinks=0, interval=1, observed=1)
    record = torch.zeros(4, 3, 1 + 4 * 2, dtype=torch.uint8)
    record[:3, 1:2] = record_of_evictions({2: {0: torch.tensor([[1], [0]])}}, kept, {0: 2}, 3, 1)
    of_layer = record[:, 1]
    assert recorded_drops(of_layer[:1], of_layer[1:3], 2, kept).tolist() == [[2, NEVER, NEVER], [NEVER, 2, NEVER]]
    assert recorded_drops(of_layer[:1], of_layer[3:], 2, kept).tolist() == [[NEVER, NEVER]] * 2


def test_the_record_decides_and_not_the_trainers_own_numbers() -> None:
    """A record that keeps the token at position 1, which received least."""
    kept = KeptTokens(heavy=1, recent=1, sinks=0, interval=None, observed=2)
    evicted, segments = EvictedTokens(kept, True), make_segments([(4, [2])])
    query, key, value = inputs(6)
    own = evicted.drops(query[0], key[0], 4, ScoreOptions(0.4))
    other = next(j for j in range(3) if bool((own[:, j] != NEVER).all()))
    places = torch.tensor([[other, 3]] * 2)
    record = torch.zeros(6, 9, dtype=torch.uint8)
    record[:5] = record_of_evictions({4: {0: places}}, kept, {0: 2}, 5, 4)[:, 0]
    output = evicted.attend(query, key, value, segments, record, sinks=None, **OPTIONS)
    scores = key[0, :, [other, 3, 4]] @ query[0, [0, 2], 4, :, None] * 0.4  # of a head of each kv head
    weights = (1.5 * torch.tanh(scores / 1.5)).softmax(1)
    torch.testing.assert_close(output[0, 4, [0, 2]], (weights * value[0, :, [other, 3, 4]]).sum(1))
