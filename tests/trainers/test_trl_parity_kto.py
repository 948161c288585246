"""The same completions through TRL's KTO trainer: one reference point, one loss, one gradient, in float32.

Given the same mismatched completions, both have one definition: the reference point is the mean log-ratio of these,
at least 0, and the loss the mean over desirable and undesirable completions together, each times its weight. What
differs is where they come from. TRL shifts the completions of a batch by one row, whatever their prompts, and averages
over one micro-batch of all ranks; ours are of other prompts, fixed for a run, and averaged over the whole step. So one
micro-batch of TRL's is compared with one step of ours, which is cut into several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignlab.config.trainers import KTOConfig
from alignlab.data.unpaired import mismatch
from alignlab.models.hub.checkpoints import load_model
from alignlab.trainers.kto import KTOTrainer
from tests.trainers.tiny import labelled
from tests.trainers.trl_batches import SETTINGS, as_trl_warns, assert_same, move, save_llama, step_of_ours, step_of_trl

trl = pytest.importorskip("trl")
WEIGHTS = {"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.3}
DATA = mismatch(labelled(6))


def make_ours(checkpoint: str, tokenizer: Any, folder: Path) -> KTOTrainer:
    config = KTOConfig(
        output_dir=folder / "ours", num_sequences=6, trackers=(), memory={"tokens_per_microbatch": 20},
        precompute_reference=False,
        **WEIGHTS,
    )
    return KTOTrainer(load_model(checkpoint, dtype=torch.float32), config, DATA, tokenizer=tokenizer)


def make_trl(checkpoint: str, tokenizer: Any, folder: Path) -> Any:
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "label": i > 0} for i in range(2)])
    policy, reference = (AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) for _ in range(2))
    config = trl.KTOConfig(
        output_dir=str(folder / "trl"), disable_dropout=True, per_device_train_batch_size=2, **SETTINGS, **WEIGHTS
    )
    return trl.KTOTrainer(policy, reference, config, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize(("by", "clamped"), [(2.0, False), (1.0, True)])
def test_kto(by: float, clamped: bool, tokenizer: Any, tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path / "llama", tokenizer)
    ours = make_ours(checkpoint, tokenizer, tmp_path)
    rows = [
        {
            "prompt_ids": list(x.prompt), "completion_ids": list(x.completion), "label": x.desirable,
            "KL_completion_ids": list(x.mismatched),
        }
        for x in ours.train_examples
    ]
    move(ours.learner.model, by)
    mine = step_of_ours(ours, range(6))
    with as_trl_warns():
        theirs = make_trl(checkpoint, tokenizer, tmp_path)
        move(theirs.model.train(), by)
        batch = theirs.data_collator(rows)
        other = step_of_trl(theirs.model, lambda: theirs._compute_loss(theirs.model, batch, False))
    assert float(ours.algorithm.reference_point) == pytest.approx(theirs._metrics["train"]["kl"][-1], rel=1e-5, abs=0)
    assert (float(ours.algorithm.reference_point) == 0) == clamped
    assert_same(mine, other)
