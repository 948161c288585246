"""The reference's log-probs on disk: damaged ones are made again, and said."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.data.preferences import Preference
from alignlab.models.hub.checkpoints import new_model
from alignlab.runs.reference_cache import ReferenceCache

PAIRS = [Preference((1, 2), (3, 4, 5), (6, 7)), Preference((1,), (8,), (9, 10, 11))]
SCORES = [(-0.5, -1.5, -2.5, -0.25, -0.125), (-3.5, -0.75, -1.25, -2.25)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReferenceCache:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ReferenceCache(new_model(shape, vocab_size=16))


def test_every_flipped_bit_is_detected(cache: ReferenceCache, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def make(examples: Sequence[Any]) -> list[tuple[float, ...]]:
        asked.append(len(examples))
        return SCORES

    assert cache.get_or_make(PAIRS, make) == SCORES and cache.get_or_make(PAIRS, make) == SCORES
    assert asked == [2]
    path = cache.path(PAIRS)
    content = path.read_bytes()
    draw = random.Random(0)
    for position in {0, 7, 8, len(content) - 1, *draw.sample(range(len(content)), 40)}:
        caplog.clear()
        asked.clear()
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert cache.get_or_make(PAIRS, make) == SCORES, position
        assert bool(asked) == (f"{path} are damaged, and are made again" in caplog.text)
        path.write_bytes(content)


def test_a_pipe_in_place_of_a_cached_file_is_replaced(cache: ReferenceCache) -> None:
    cache.get_or_make(PAIRS, lambda examples: SCORES)
    cache.path(PAIRS).unlink()
    os.mkfifo(cache.path(PAIRS))
    assert cache.get_or_make(PAIRS, lambda examples: SCORES) == SCORES
    assert cache.path(PAIRS).is_file()


@pytest.mark.parametrize("change", [lambda content: b"", lambda content: content[:-4], lambda content: content * 2])
def test_a_cached_file_of_another_size_is_computed_again(cache: ReferenceCache, change: Any) -> None:
    cache.get_or_make(PAIRS, lambda examples: SCORES)
    path = cache.path(PAIRS)
    path.write_bytes(change(path.read_bytes()))
    assert cache.get_or_make(PAIRS, lambda examples: SCORES) == SCORES
