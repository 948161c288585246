"""A run with a reward in a separate process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignlab.config.rewards import RewardSettings
from alignlab.trainers.grpo import GRPOTrainer


def test_run_goes_on_after_a_reward_ends_its_process(
    make_model: Callable[..., Any], make_config: Callable[..., Any], rows: list[dict[str, Any]], tokenizer: Any,
    tmp_path: Path,
) -> None:
    (tmp_path / "calls").mkdir()
    options = {"folder": str(tmp_path / "calls")}
    reward = RewardSettings(name="tests.scoring.isolated_rewards.exits_once", run_in="process", options=options)
    trainer = GRPOTrainer(make_model(), reward, make_config(num_steps=3), rows, tokenizer=tokenizer)
    result = trainer.train()
    assert result.num_steps == 3
    assert trainer.source.rewards.failures == {("exits_once", "exited"): 1}
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward_failures"] for line in lines] == [0, 1, 1]
