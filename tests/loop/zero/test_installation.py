"""DeepSpeed that is missing, or of a version that was not tested, is named before anything is loaded."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest

from alignlab.config.trainer import ShardingSettings
from alignlab.config.trainers import SFTConfig
from alignlab.errors import ConfigError
from alignlab.loop.accelerator import make_accelerator
from alignlab.loop.ranks import Ranks
from alignlab.loop.sharding import check_sharding, shard_weights
from alignlab.models.policy import Policy


@pytest.mark.parametrize(("found", "message"), [(None, "is not installed"), ("0.19.7", "is 0.19.7"), ("0.20", "0.20;")])
def test_a_version_that_was_not_tested_is_named(
    found: str | None, message: str, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    config = SFTConfig(sharding={"strategy": "zero2"})
    with pytest.raises(ConfigError, match=message) as caught:
        shard_weights(Policy(make_model()), config, Ranks(make_accelerator(60.0)))
    assert "setup_env.sh deepspeed" in str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "message"), [("zero3", 1, "has one rank"), ("none", 2, "would train for themselves")]
)
def test_a_strategy_fits_the_number_of_ranks(strategy: str, num_ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sharding(ShardingSettings(strategy=strategy), num_ranks)
