"""Drafts in caches that approximate: what a dropped draft left in a cache must not be read, nor have freed anything."""

from __future__ import annotations

from typing import Any

import pytest

from alignlab.types import SamplingParams
from tests.rollout.conftest import MakeEngine, flat
from tests.rollout.embedded.test_speculation import SCHEDULES, Oracle, assert_same, repetitive, with_drafts

CACHES: dict[str, dict[str, Any]] = {
    "int8": {"type": "int8"}, "fp8": {"type": "fp8"},
    "int4, no token exact": {"type": "int4", "group": 4, "recent": 0},
    "int4": {"type": "int4", "group": 4, "recent": 4},
    "window": {"type": "window", "tokens": 8, "sinks": 2}, "window of few": {"type": "window", "tokens": 2, "sinks": 1},
    "evict": {"type": "evict", "heavy": 5, "recent": 3, "sinks": 1, "interval": 4, "observed": 4},
    "top_k": {"type": "top_k", "tokens": 4, "recent": 2}, "low_rank": {"type": "low_rank", "rank": 4},
}


@pytest.mark.parametrize("schedule", ["as it is", "tiny cache"])
@pytest.mark.parametrize("spoil", [0, 2, None])
@pytest.mark.parametrize("cache", CACHES)
def test_drafts_change_nothing(
    cache: str, spoil: int | None, schedule: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model, prompts = request.getfixturevalue("dense"), repetitive(3)
    sampling = SamplingParams(n=2, seed=3, max_new_tokens=18, ignore_eos=True)
    options = {"block_size": 4, **SCHEDULES[schedule], "kv_cache": CACHES[cache]}
    expected = make_engine(model, **options).generate(prompts, sampling)
    engine = make_engine(model, **options, speculation={"type": "ngram", "num_drafts": 4})
    sequences = engine._sequences(prompts, [sampling] * 3)
    texts = {s.key: c.token_ids for s, c in zip(sequences, flat(expected), strict=True)}
    with_drafts(engine, Oracle(texts, spoil=spoil))
    assert_same(expected, engine.generate(prompts, sampling))
    assert engine._speculation.num_drafted > 60
