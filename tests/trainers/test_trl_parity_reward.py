"""The same pairs through TRL's reward trainer: one loss, one gradient, in float32, with margins and centring.

TRL's model is the one that ours writes, so the reward of a sequence is that of `transformers`' classification models.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from alignlab.config.trainers import RewardConfig
from alignlab.models.hub.checkpoints import load_model
from alignlab.trainers.reward import RewardTrainer
from tests.trainers.tiny import pairs
from tests.trainers.trl_batches import SETTINGS, as_trl_warns, assert_same, save_llama, step_of_ours, step_of_trl

trl = pytest.importorskip("trl")


def make_trl(model: Any, tokenizer: Any, folder: Path, centring: float) -> Any:
    from datasets import Dataset

    rows = Dataset.from_list([{"chosen": "ab", "rejected": "ac"}] * 2)
    config = trl.RewardConfig(
        output_dir=str(folder / "trl"), center_rewards_coefficient=centring or None, disable_dropout=True, **SETTINGS
    )
    return trl.RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("centring", [0.0, 0.3])
def test_reward(centring: float, margins: bool, tokenizer: Any, tmp_path: Path) -> None:
    data = [replace(pair, margin=0.25 * (i % 4) if margins else 0.0) for i, pair in enumerate(pairs(6))]
    config = RewardConfig(
        output_dir=tmp_path / "ours", num_pairs=6, centring_coef=centring, trackers=(),
        memory={"tokens_per_microbatch": 40}
    )
    base = load_model(save_llama(tmp_path / "llama", tokenizer), dtype=torch.float32)
    ours = RewardTrainer(base, config, data, tokenizer=tokenizer)
    ours.write_model(tmp_path / "reward")
    rows = [
        {"chosen_ids": [*x.prompt, *x.chosen], "rejected_ids": [*x.prompt, *x.rejected]}
        | ({"margin": x.margin} if margins else {})
        for x in data
    ]
    value, gradient = step_of_ours(ours, range(6))
    with as_trl_warns():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32)
        assert isinstance(model, LlamaForSequenceClassification)
        theirs = make_trl(model, tokenizer, tmp_path, centring)
        batch = theirs.data_collator(rows)
        other = step_of_trl(theirs.model, lambda: theirs.compute_loss(theirs.model, batch))
    assert_same((value, gradient), other)
