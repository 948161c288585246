"""The trainer of RLAIF: a judge's feedback by a constitution, used for training in one of five ways.

Constitutional AI (arXiv:2212.08073): critique and revision, then AI preferences. RLAIF (arXiv:2309.00267): labels from
both orders of a pair, and direct RLAIF. Online AI feedback (arXiv:2402.04792). Each stage has a folder of its own, and
a resumed run goes on in the middle of the stage that was stopped:

<output_dir>/
    identity.json    settings and digests of the data, compared on resume
    before.json      held-out accuracy before the run
    revision/        see `revision.py`
    labels/          see `labels.py`
    reward/          a run
    policy/          a run
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import RLAIFConfig
from alignlab.evaluation.report import RunReport, write_report
from alignlab.evaluation.results import (
    Evaluation,
    EvaluationResult,
    evaluation_from_json,
    read_evaluation,
    write_evaluation,
)
from alignlab.loop.arguments import NamedArguments
from alignlab.loop.given_data import DatasetLike, given_held_out, given_prompts
from alignlab.loop.inputs import Model, check_lora
from alignlab.loop.preflight import Preflight
from alignlab.loop.rank_agreement import RankAgreement, of_main_rank
from alignlab.loop.rank_watchdog import Position, watched
from alignlab.loop.ranks import Ranks
from alignlab.loop.run_description import RunDescription
from alignlab.loop.training_loop import Callback, TrainResult
from alignlab.models.adapters import has_adapters
from alignlab.rollout.engine import make_engine
from alignlab.runs.folder import RunFolder
from alignlab.scoring.judges.judge import Judge
from alignlab.trainers.rlaif.inputs import read_inputs
from alignlab.trainers.rlaif.preflight import preflight_of
from alignlab.trainers.rlaif.stage import Progress, StageContext, StageStopped
from alignlab.trainers.rlaif.stages import stages_of

logger = logging.getLogger(__name__)


class RLAIFTrainer(metaclass=NamedArguments):
    """Runs the stages that the config names.

    Args:
        model: a name or path, or a live model.
        config: the trainer's section.
        train_dataset: prompts; see `OnlineTrainer`.
        eval_dataset: held-out prompts; needs `evaluation.scorer`.
        render_settings, eval_render_settings: see `OnlineTrainer`.
        tokenizer: default: the one beside the model.
        peft_config: a LoRA adapter for each stage that trains; None trains all weights.
        evaluation: how held-out accuracy is measured.
        judge: default: the judge that `config.judge` describes.
        callbacks: see `TrainingLoop`; called by every stage that trains.

    Raises:
        ConfigError: the constitution cannot be read, the judge shares a base whose weights would be trained, or there
            is held-out data and no scorer.
    """

    def __init__(
        self,
        model: Model,
        config: RLAIFConfig,
        train_dataset: DatasetLike,
        *,
        eval_dataset: DatasetLike | None = None,
        render_settings: RenderSettings | None = None,
        eval_render_settings: RenderSettings | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        peft_config: LoraSettings | LoraConfig | None = None,
        evaluation: EvaluationSettings | None = None,
        judge: Judge | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        train = given_prompts(train_dataset, render_settings)
        held_out = given_held_out(eval_dataset, eval_render_settings, train)
        check_lora(peft_config)
        self.config, self.peft_config, self.callbacks = config, peft_config, tuple(callbacks)
        self._inputs = read_inputs(
            model, config, train, held_out, tokenizer=tokenizer, peft_config=peft_config, evaluation=evaluation,
            judge=judge,
        )  # fmt: skip
        self.model, self.tokenizer = self._inputs.model, self._inputs.tokenizer
        self.prompts, self.judge, self.identity = self._inputs.prompts, self._inputs.judge, self._inputs.identity
        self.run = RunDescription(type(self).__name__, config.model_dump_json(indent=2))

    def describe_run(self, run: RunDescription) -> None:
        """Take another description of the run, such as of one from a config file; before `train`."""
        self.run = run
        self.identity.describe(run)

    def train(self, *, resume: bool = False) -> TrainResult:
        """Run the stages; SIGINT or SIGTERM stops the run, and all that it has made is kept.

        Args:
            resume: go on from where the run in `output_dir` was stopped.

        Raises:
            ConfigError, CheckpointError: see `TrainingLoop.train`.
            DataError: a stage has nothing to learn from.
            JudgeError: the judge answers nothing at all, or the last stage has used its budget up.
        """
        accelerator = self._inputs.accelerator
        rank = accelerator.process_index
        with watched(lambda: Position(phase="the stages of RLAIF"), lambda: None), ExitStack() as stack:
            with RankAgreement(accelerator)("opening the run's folder"):
                folder = stack.enter_context(
                    RunFolder(self.config.output_dir, resume=resume, config_text=self.run.config_text, rank=rank)
                )
            self.identity.keep_file(folder.path / "identity.json", resume=resume, accelerator=accelerator)
            context = self._stage_context(folder)
            before = self._accuracy_before(folder.path / "before.json")
            progress = Progress(self.model, self.run.base_model)
            try:
                for stage in stages_of(context):
                    if stage.finished():
                        logger.info("the stage %s is finished; its product is read from %s", stage.name, stage.folder)
                    progress = stage.run(progress)
            except StageStopped as stopped:
                folder.ended("interrupted", stopped.result.num_steps)
                return replace(stopped.result, before=before, folder=folder.path, run_id=folder.run_id)
            assert progress.result is not None, "the config's rules ask for a stage that trains"
            result = replace(
                progress.result, before=before, after=self._accuracy(progress.policy), folder=folder.path,
                run_id=folder.run_id,
            )  # fmt: skip
            if rank == 0:
                write_report(folder, self._report(result, progress, context))
            folder.ended("done", result.num_steps)
        return result

    def preflight(self) -> Preflight:
        """Return what the run would begin with, or raise if a stage could not end well; see `preflight_of`."""
        return preflight_of(self.config, self._inputs, self.peft_config)

    def _stage_context(self, folder: RunFolder) -> StageContext:
        inputs = self._inputs
        return StageContext(
            config=self.config,
            constitution=inputs.constitution,
            judge=self.judge,
            judge_is_base=inputs.judge_is_base,
            prompts=self.prompts,
            tokenizer=self.tokenizer,
            render_settings=inputs.render_settings,
            peft_config=self.peft_config,
            callbacks=self.callbacks,
            accelerator=inputs.accelerator,
            run=self.run,
            folder=folder.path,
            run_id=folder.run_id,
            run_name=of_main_rank(inputs.accelerator, (folder.run_id or "").encode()).decode(),
        )

    def _accuracy_before(self, path: Path) -> Evaluation | None:
        """Return held-out accuracy of the policy before the run, measured now or by an earlier start."""
        # Rank 0 decides for all: the measurement is shared out over ranks, of which some may not see its file.
        [recorded, *_] = Ranks(self._inputs.accelerator).gather_json(_recorded(path))
        if recorded is not None:
            return evaluation_from_json(recorded)
        result = self._accuracy(self.model)
        if result is not None and self._inputs.accelerator.is_main_process:
            write_evaluation(path, result)
        return result

    def _accuracy(self, policy: Any) -> EvaluationResult | None:
        if not self._inputs.held_out:
            return None
        engine = make_engine(policy, self.tokenizer, RolloutSettings())
        return self._inputs.held_out.evaluate(engine, Ranks(self._inputs.accelerator), seed=self.config.seed)

    def _report(self, result: TrainResult, progress: Progress, context: StageContext) -> RunReport:
        trains_adapter = has_adapters(progress.policy)
        return RunReport(
            title=self.run.title,
            before=result.before,
            after=result.after,
            train_seconds=result.train_seconds,
            num_steps=result.num_steps,
            adapter=result.model_path if trains_adapter else None,
            model=None if trains_adapter else result.model_path,
            base_model=progress.base_model,
            generate_options=self.run.generate_options,
            summary={"questions": dict(context.questions)} | self.identity.summary,
            verdict=result.verdict,
            run_id=result.run_id,
        )


def _recorded(path: Path) -> dict[str, Any] | None:
    """Return the result in a file as JSON; None without one."""
    result = read_evaluation(path)
    return None if result is None else result.to_json()
