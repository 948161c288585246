"""Stages of a run, the facts that they share, and the progress that one hands on to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.config.judge import Constitution
from alignlab.config.model import LoraSettings
from alignlab.config.trainers import RLAIFConfig
from alignlab.evaluation.tables import show_table
from alignlab.loop.run_description import RunDescription
from alignlab.loop.training_loop import Callback, TrainingLoop, TrainResult
from alignlab.runs.folder import holds_run
from alignlab.scoring.judges.judge import Judge, PromptedJudge
from alignlab.scoring.judges.make_judge import chat_model
from alignlab.types import Prompt


@dataclass(frozen=True)
class Progress:
    """Products of the stages so far.

    Attributes:
        policy: the model that later stages start from; after the last stage, the trained one.
        base_model: name or path of the model that an adapter of a later stage belongs on; None where it is the run's.
        preferences: labelled pairs, as rows.
        reward_model: folder of the trained reward model; None where no stage trains one.
        result: result of the last training; None before the first.
    """

    policy: Any
    base_model: str | None = None
    preferences: Sequence[Mapping[str, Any]] = ()
    reward_model: Path | None = None
    result: TrainResult | None = None


class Stage(Protocol):
    """One part of a run, in a folder of its own; a resumed run goes on in the middle of the stage that was stopped.

    Attributes:
        name: name of the stage, and of its folder in the run's output folder.
    """

    name: str

    @property
    def folder(self) -> Path:
        """Folder of all that the stage makes."""
        ...

    def finished(self) -> bool:
        """Return whether the stage's product is on the disk; `run` then reads it."""
        ...

    def run(self, progress: Progress) -> Progress:
        """Do what an earlier start has left undone, and return the progress with this stage's products.

        Raises:
            StageStopped: a signal has stopped the stage.
            DataError: the stage has nothing to train on.
        """
        ...


class StageStopped(Exception):
    """A signal has stopped a stage, whose products so far are on the disk."""

    def __init__(self, result: TrainResult) -> None:
        super().__init__()
        self.result = result


@dataclass
class StageContext:
    """Facts that all stages of a run share.

    Attributes:
        config: the trainer's section.
        constitution: the principles that the judge and the critic are asked by.
        judge: compares, rates, criticises and revises completions.
        judge_is_base: whether the judge is the policy's own frozen base.
        prompts: training prompts, with room for their completions.
        tokenizer: the policy's.
        render_settings: how rows made of sampled completions become tokens.
        peft_config: the adapter of each stage that trains; None trains all weights.
        callbacks: called by every stage that trains.
        accelerator: the ranks.
        run: title of the run, and the user's name of the trainer's section.
        folder: the run's output folder.
        run_id: id of the run on rank 0; None on other ranks.
        run_name: the same id on every rank; empty where the run has none.
        questions: questions to the judge of all stages and ranks, by outcome.
    """

    config: RLAIFConfig
    constitution: Constitution
    judge: Judge
    judge_is_base: bool
    prompts: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase
    render_settings: RenderSettings
    peft_config: LoraSettings | LoraConfig | None
    callbacks: Sequence[Callback]
    accelerator: Accelerator
    run: RunDescription
    folder: Path
    run_id: str | None
    run_name: str
    questions: Counter[str] = field(default_factory=Counter)

    @property
    def is_main_rank(self) -> bool:
        """True on the rank that writes files and shows tables."""
        return self.accelerator.process_index == 0

    def judge_beside(self, policy: Any) -> Judge:
        """Return the judge; one that is the policy's base answers with this policy's adapter switched off."""
        if not self.judge_is_base:
            return self.judge
        settings = self.config.judge
        assert isinstance(self.judge, PromptedJudge) and settings.backend != "reward_model"
        return replace(self.judge, model=chat_model(settings, policy, self.tokenizer))

    def stage_config(self, config: Any, folder: Path, **changes: Any) -> Any:
        """Return a stage's section with its folder and the run's seed."""
        return config.model_copy(update={"output_dir": folder, "seed": self.config.seed, **changes})

    def train(self, trainer: TrainingLoop, section: str) -> TrainResult:
        """Train one stage, or go on with it where an earlier start has begun it.

        Args:
            trainer: the stage's trainer.
            section: name of the stage's section within the trainer's.

        Raises:
            StageStopped: a signal has stopped the training.
        """
        trainer.describe_run(
            replace(
                trainer.run, title=f"{self.run.title}: {type(trainer).__name__}", part_of=self.run_id,
                section=f"{self.run.section}.{section}",
            )
        )
        result = trainer.train(resume=holds_run(trainer.config.output_dir))
        is_last = section == "policy" or self.config.policy is None
        if result.interrupted or (result.signal and not is_last):  # a signal in a stage's last step, too
            raise StageStopped(replace(result, interrupted=True))
        return result

    def show(self, title: str, lines: Sequence[tuple[str, Any]]) -> None:
        """Show a table, on the main rank."""
        if self.is_main_rank:
            show_table(title, lines)
