"""A user's DeepSpeed file stands within the settings that follow from the trainer's config, and never against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.config.trainer import ShardingSettings
from alignlab.errors import ConfigError
from alignlab.loop.zero.engine_config import engine_config


def made(tmp_path: Path, theirs: dict[str, Any], **settings: Any) -> dict[str, Any]:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(theirs))
    sharding = ShardingSettings(**{"strategy": "zero3", "deepspeed": path} | settings)
    return engine_config(sharding, max_grad_norm=0.5, largest=5 * 2**20)


def test_settings_follow_from_the_config() -> None:
    settings = engine_config(ShardingSettings(strategy="zero2"), max_grad_norm=0.5, largest=5 * 2**20)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"], zero["reduce_bucket_size"]) == (2, {"device": "none"}, 5 * 2**20)
    assert (settings["gradient_clipping"], settings["gradient_accumulation_steps"]) == (0.5, 1)
    on_host = engine_config(ShardingSettings(strategy="zero3", offload="all"), max_grad_norm=0.5, largest=1)
    zero = on_host["zero_optimization"]
    assert (zero["offload_param"], zero["offload_optimizer"]) == ({"device": "cpu"}, {"device": "cpu"})
    assert zero["reduce_bucket_size"] == 2**20, "a bucket of a tiny model is not tiny"


def test_a_user_s_settings_are_taken_over(tmp_path: Path) -> None:
    theirs = {
        "gradient_clipping": "auto", "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "reduce_bucket_size": 7, "allgather_bucket_size": "auto",
        },
    }  # fmt: skip
    settings = made(tmp_path, theirs)
    zero = settings["zero_optimization"]
    assert (zero["overlap_comm"], zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (True, 7, 5 * 2**20)
    assert settings["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "stage: 2, and trainer.sharding.strategy makes it 3"),
        ({"gradient_clipping": 1.0}, "trainer.optim.max_grad_norm makes it 0.5"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: true, and model.dtype makes it false"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, 'trainer.sharding.offload makes it "none"'),
        ({"gradient_accumulation_steps": 4}, "trainer.memory.tokens_per_microbatch makes it 1"),
        ({"train_batch_size": 8}, "the trainer's own settings decides it"),
        ({"optimizer": {"type": "Adam"}}, "has optimizer, and trainer.optim makes AdamW"),
        ({"scheduler": {"type": "WarmupLR"}}, "trainer.optim.schedule"),
    ],
)
def test_a_contradiction_is_named(theirs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        made(tmp_path, theirs)
    assert "deepspeed.json" in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{", "", None])
def test_a_file_that_is_no_object_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"settings\.json"):
        engine_config(ShardingSettings(strategy="zero3", deepspeed=path), max_grad_norm=1.0, largest=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "fsdp2", "offload": "all"}, "offload is 'all', and must be none with strategy fsdp2"),
        ({"strategy": "zero2", "offload": "all"}, "use strategy: zero3"),
        ({"strategy": "ddp", "offload": "optimizer"}, "use strategy: zero1 or zero2 or zero3"),
        ({"strategy": "fsdp2", "deepspeed": "x.json"}, "which DeepSpeed has no part in"),
    ],
)
def test_settings_that_a_strategy_lacks_are_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardingSettings(**settings)
