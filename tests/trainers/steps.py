"""Parts of a trainer and of its step, for tests that look into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignlab.loop.algorithm import Credit, minibatch_slices
from alignlab.types import Experience, Rollout


def credit_of(trainer: Any, step: int, rollouts: Sequence[Rollout]) -> Credit:
    """Pack, score and credit rollouts as `OnlineTrainer.train_step` does."""
    packs = [trainer.algorithm.pack(rollouts[part]) for part in parts_of(trainer, rollouts)]
    return trainer.algorithm.credit(rollouts, [trainer.algorithm.with_logprobs(step, part) for part in packs])


def minibatches_of(trainer: Any, step: int, rollouts: Sequence[Rollout]) -> list[list[Experience]]:
    """Return the credited packs of each mini-batch."""
    return credit_of(trainer, step, rollouts).minibatches


def packs_of(trainer: Any, rows: Sequence[int]) -> list[Experience]:
    """Return the packs of some training examples of an offline trainer."""
    return trainer.algorithm.packs("train", trainer.train_examples, rows)


def parts_of(trainer: Any, rollouts: Sequence[Rollout]) -> list[slice]:
    """Return the slice of a step's rollouts in each mini-batch."""
    return minibatch_slices(len(rollouts), trainer.config.num_minibatches)


def credit_packs(
    trainer: Any, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]
) -> tuple[Tensor, list[list[Experience]]]:
    """Credit packs that a test has made; return the advantages of completions and the credited packs."""
    credit = trainer.algorithm.credit(rollouts, minibatches)
    return credit.advantages, credit.minibatches


def update_on(trainer: Any, packs: Sequence[Experience]) -> dict[str, float]:
    """Take an optimizer step of an offline trainer on packs."""
    weights = trainer.algorithm.loss_weights
    return trainer.learner.update(packs, trainer.algorithm.loss, weights, metric_weights=weights)


def weights_of(trainer: Any) -> dict[str, Tensor]:
    """Return all that is trained, whole, by learner and name; every rank calls this together."""
    return {
        f"{role}{name}": learner.weights.whole(name)
        for role, learner in trainer.learners.items()
        for name in learner.trained
    }
