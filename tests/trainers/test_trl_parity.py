"""The same pairs through TRL's trainers: one loss, one gradient, in float32.

Without a counterpart: `ipo` of summed log-ratios, as TRL's IPO is of means. ORPO's likelihood is another: TRL's is the
mean over all tokens of the batch's prompts and chosen completions but each prompt's first; ours, as DPO's family has
it, the mean over pairs of the mean over the chosen completion. They coincide where prompts are of one token and chosen
completions equally long.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignlab.config.trainers import DPOConfig
from alignlab.data.preferences import Preference
from alignlab.models.hub.checkpoints import load_model
from alignlab.trainers.dpo import DPOTrainer
from tests.trainers.tiny import pairs
from tests.trainers.trl_batches import (
    SETTINGS,
    Step,
    as_trl_warns,
    assert_same,
    move,
    save_llama,
    step_of_ours,
    step_of_trl,
)

trl = pytest.importorskip("trl")
# Ours -> TRL's name and settings.
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "hinge": ({}, {"loss_type": ["hinge"]}),
    "ipo_mean": ({}, {"loss_type": ["ipo"]}),
    "robust": ({"label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
}


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Any) -> str:
    return save_llama(tmp_path / "llama", tokenizer)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def rows_of_text() -> Any:
    """Return the arguments that a TRL trainer needs; it does not train on them."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)


def of_ours(
    checkpoint: str, tokenizer: Any, folder: Path, data: Sequence[Preference], **settings: Any
) -> Step:
    config = DPOConfig(
        output_dir=folder / "ours", num_pairs=len(data), trackers=(), memory={"tokens_per_microbatch": 40},
        precompute_reference=False, **settings,
    )
    trainer = DPOTrainer(load_model(checkpoint, dtype=torch.float32), config, data, tokenizer=tokenizer)
    move(trainer.learner.model)
    return step_of_ours(trainer, range(len(data)))


def dpo_of_trl(checkpoint: str, tokenizer: Any, folder: Path, settings: dict[str, Any]) -> Step:
    data = [
        {"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in pairs(6)
    ]
    with as_trl_warns():
        policy, reference = (AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) for _ in range(2))
        config = trl.DPOConfig(output_dir=str(folder / "trl"), beta=0.1, disable_dropout=True, **SETTINGS, **settings)
        trainer = trl.DPOTrainer(
            policy, reference, config, train_dataset=rows_of_text(), processing_class=tokenizer
        )
        move(trainer.model)
        return step_of_trl(
            trainer.model, lambda: trainer._compute_loss(trainer.model, trainer.data_collator(data), False)
        )


def without_reference(checkpoint: str, tokenizer: Any, folder: Path, name: str, **settings: Any) -> Any:
    """TRL's ORPO or CPO trainer."""
    with as_trl_warns():
        if name == "orpo":
            from trl.experimental.orpo import ORPOConfig as Config
            from trl.experimental.orpo import ORPOTrainer as Trainer
        else:
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Trainer
        policy = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        config = Config(output_dir=str(folder / "trl"), **SETTINGS, **settings)
        trainer = Trainer(policy, config, train_dataset=rows_of_text(), processing_class=tokenizer)
    move(trainer.model)
    return trainer


def batch_of(trainer: Any, data: Sequence[Preference]) -> Any:
    """Return the batch of TRL's collator."""
    rows = []
    for pair in data:
        row: dict[str, Any] = {}
        for name, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids = [*pair.prompt, *completion]
            labels = [-100] * len(pair.prompt) + list(completion)
            row |= {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}
        rows.append(row)
    return trainer.data_collator(rows)


@pytest.mark.parametrize("loss", LOSSES)
def test_dpo(loss: str, checkpoint: str, tokenizer: Any, tmp_path: Path) -> None:
    ours, theirs = LOSSES[loss]
    assert_same(
        of_ours(checkpoint, tokenizer, tmp_path, pairs(6), loss=loss, beta=0.1, **ours),
        dpo_of_trl(checkpoint, tokenizer, tmp_path, theirs),
    )


def test_simpo(checkpoint: str, tokenizer: Any, tmp_path: Path) -> None:
    trainer = without_reference(
        checkpoint, tokenizer, tmp_path, "cpo", loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=0.7
    )
    batch = batch_of(trainer, pairs(6))
    assert_same(
        of_ours(checkpoint, tokenizer, tmp_path, pairs(6), loss="simpo", beta=2.5, simpo_gamma=0.7),
        step_of_trl(trainer.model, lambda: trainer.compute_loss(trainer.model, batch)),
    )


def test_orpo_where_both_likelihoods_are_the_same(checkpoint: str, tokenizer: Any, tmp_path: Path) -> None:
    data = [Preference(p.prompt[:1], (*p.chosen, 5, 6, 7)[:4], p.rejected) for p in pairs(6)]
    trainer = without_reference(checkpoint, tokenizer, tmp_path, "orpo", beta=0.3)
    batch = batch_of(trainer, data)
    assert_same(
        of_ours(checkpoint, tokenizer, tmp_path, data, loss="orpo", beta=0.3),
        step_of_trl(trainer.model, lambda: trainer.compute_loss(trainer.model, batch)),
    )


def test_orpo_with_trl_s_odds_and_our_likelihood(checkpoint: str, tokenizer: Any, tmp_path: Path) -> None:
    trainer = without_reference(checkpoint, tokenizer, tmp_path, "orpo", beta=0.3)
    batch = batch_of(trainer, pairs(6))

    def loss() -> torch.Tensor:
        chosen, rejected = trainer.concatenated_forward(trainer.model, batch)[:2]
        return -trainer.odds_ratio_loss(chosen, rejected)[0].mean() - chosen.mean()

    ours = of_ours(checkpoint, tokenizer, tmp_path, pairs(6), loss="orpo", beta=0.3)
    assert_same(ours, step_of_trl(trainer.model, loss))
    assert ours[0] != pytest.approx(float(trainer.compute_loss(trainer.model, batch).detach()), rel=1e-3)
