"""Run by torchrun: trainings of two ranks in which one fails. Usage: rank_keeping.py FOLDER STRATEGY

First a callback, an evaluation and a reward fail on one rank, and the run goes on in the same processes. Then a rank's
gradient is not finite, also when the step is done again, and the run goes on once it is. Last a rank fails in the
middle of a step, while the other one waits for it, and both end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from alignlab.config.rollout import SamplingSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import NumericsError
from alignlab.loop import rank_watchdog
from alignlab.models.hub.checkpoints import new_model
from alignlab.trainers.grpo import GRPOTrainer
from tests.settings import merged
from tests.trainers.conftest import DENSE, even_ids

RANK = int(os.environ["RANK"])
ROWS = [{"prompt": f"ab{i}", "answer": "a"} for i in range(8)]


def make_trainer(folder: Path, **changes: Any) -> GRPOTrainer:
    """Return a trainer of three steps of two mini-batches, with an evaluation after the second step."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    base: dict[str, Any] = {
        "output_dir": folder, "num_steps": 3, "num_prompts": 4, "group_size": 2, "num_minibatches": 2,
        "optim": {"learning_rate": 1e-2}, "sampling": SamplingSettings(max_new_tokens=4), "trackers": (),
        "eval_every_steps": 2, "sharding": {"strategy": sys.argv[2]},
    }
    return GRPOTrainer(
        model, even_ids, GRPOConfig(**merged(base, changes)), ROWS, eval_dataset=ROWS[:2], tokenizer=tokenizer,
        evaluation=EvaluationSettings(num_problems=2, num_samples=1),
    )


class Failure(Exception):
    """An error on one rank."""


def fail_in_callback(trainer: GRPOTrainer, rank: int) -> None:
    """Fail after the second step."""

    def callback(_: Any, step: int, metrics: Any) -> None:
        torch.rand(3)
        if step == 2 and rank == RANK:
            raise Failure("inbox")

    trainer.callbacks = (callback,)


def fail_in_evaluation(trainer: GRPOTrainer, rank: int) -> None:
    """Fail after the second step, before the evaluation."""
    evaluate = trainer.evaluate

    def failing() -> Any:
        if trainer.step == 2 and rank == RANK:
            raise Failure("scorer")
        return evaluate()

    trainer.evaluate = failing  # type: ignore[method-assign]


def fail_in_collecting(trainer: GRPOTrainer, rank: int) -> None:
    """Fail in the third step, before the update."""
    collect = trainer.source.collect

    def failing(step: int) -> Any:
        if step == 3 and rank == RANK:
            raise Failure("reward")
        return collect(step)

    trainer.source._prefetcher._collect = failing


def fail_in_second_minibatch(trainer: GRPOTrainer, rank: int) -> None:
    """Fail in the third step, after its first mini-batch has changed the weights."""
    update, calls = trainer.learner.update, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6 and rank == RANK:
            raise Failure("kernel")
        return update(*args, **options)

    trainer.learner.update = failing  # type: ignore[method-assign]


def spoil_gradient(trainer: GRPOTrainer, rank: int) -> None:
    """Make the gradient of the third step's updates not a number."""
    update = trainer.learner.update

    def spoilt(packs: Any, loss: Any, *args: Any, **options: Any) -> Any:
        factor = torch.nan if trainer.step == 2 and rank == RANK else 1.0

        def loss_of(output: Any, pack: Any) -> Any:
            losses, metrics = loss(output, pack)
            return losses * factor, metrics

        return update(packs, loss_of, *args, **options)

    trainer.learner.update = spoilt  # type: ignore[method-assign]


def main() -> None:
    rank_watchdog.BEAT_S = 0.2  # after a failure a rank waits for the first one's checkpoint by whole beats
    folder = Path(sys.argv[1])
    make_trainer(folder / "straight", checkpoints={"every_steps": 1, "keep": 9}).train()
    for fail, rank in ((fail_in_callback, 1), (fail_in_evaluation, 1), (fail_in_collecting, 0)):
        trainer = make_trainer(folder / fail.__name__)
        fail(trainer, rank)
        try:
            trainer.train()
        except Exception as error:
            (folder / f"{fail.__name__}.{RANK}").write_text(f"{type(error).__name__}: {error}")
        make_trainer(folder / fail.__name__).train(resume=True)
    for attempt in (1, 2):
        trainer = make_trainer(folder / "not_finite")
        spoil_gradient(trainer, rank=1)
        try:
            trainer.train(resume=attempt == 2)
        except NumericsError as error:
            (folder / f"not_finite.{RANK}.{attempt}").write_text(f"after step {trainer.step}: {error}")
    make_trainer(folder / "not_finite").train(resume=True)
    trainer = make_trainer(folder / "alone")
    fail_in_second_minibatch(trainer, rank=1)
    trainer.train()


if __name__ == "__main__":
    main()
