"""RLAIF: a judge's feedback by a constitution, brought to the policy on one of five ways, stage by stage.

Constitutional AI (arXiv:2212.08073): critique and revision, then AI preferences. RLAIF (arXiv:2309.00267): labels from
both orders, and direct RLAIF. Online AI feedback (arXiv:2402.04792). Each stage is in a folder of its own, and a
resumed run goes on in the middle of the one that was stopped:

<output_dir>/
    identity.json, before.json (held-out accuracy)
    revision/   revisions.jsonl (prompt, completion), rank*.jsonl (all that was written), sft/ (a run), model/ (merged)
    labels/     preferences.jsonl (prompt, chosen, rejected, probability), report.json, rank*.jsonl (all judged)
    reward/     a run
    policy/     a run
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from alignlab.atomic_files import write_atomically
from alignlab.config.constitution import load_constitution
from alignlab.config.judge import ModelJudge
from alignlab.config.model import LoraSettings
from alignlab.config.render import RenderSettings
from alignlab.config.rollout import RolloutSettings, SamplingSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import (
    DPOConfig,
    GRPOConfig,
    OnlineConfig,
    OnlineDPOConfig,
    PPOConfig,
    RewardConfig,
    RLAIFConfig,
    TrainerConfig,
)
from alignlab.config.trainers.rlaif import LabelSettings, RevisionSettings
from alignlab.data.sequences import digest_of
from alignlab.errors import ConfigError, DataError
from alignlab.models.adapters import has_adapters
from alignlab.models.checkpoints import save_model
from alignlab.models.saving import published
from alignlab.rlaif.collecting import check_made_with, collect, finished, made_with, rows_of_rank
from alignlab.rlaif.judge import Judge, PromptedJudge, take_earlier
from alignlab.rlaif.judges import chat_model, make_judge
from alignlab.rlaif.labels import counts_of_rows, judge_pairs, preferences
from alignlab.rlaif.labels import report as label_report
from alignlab.rlaif.revision import Reviser, taught_rows
from alignlab.rlaif.rewards import RatingReward, WinReward, counts_of_rewards
from alignlab.rollout.engines import give_back, make_engine
from alignlab.trainers.arguments import NamedArguments
from alignlab.trainers.assemble import Model, check_lora, make_accelerator, resolve_base, resolve_model
from alignlab.trainers.base_of_stages import check_base
from alignlab.trainers.dpo import DPOTrainer
from alignlab.trainers.ending import check_stages
from alignlab.trainers.given_data import Dataset, given_held_out, given_prompts, resolve_prompts, sampled_settings
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.held_out import held_out_problems
from alignlab.trainers.loop import Callback, TrainResult
from alignlab.trainers.offline import OfflineTrainer
from alignlab.trainers.online import OnlineTrainer
from alignlab.trainers.online_dpo import OnlineDPOTrainer
from alignlab.trainers.ppo import PPOTrainer
from alignlab.trainers.preflight import with_room
from alignlab.trainers.rank_watchdog import Position, watched
from alignlab.trainers.ranks import RankAgreement, json_of_ranks, of_main_rank
from alignlab.trainers.reward import RewardTrainer
from alignlab.trainers.run_identity import RunIdentity
from alignlab.trainers.sft import SFTTrainer
from alignlab.training.evaluation import Evaluation, EvaluationResult, read_evaluation, write_evaluation
from alignlab.training.journal import write_rows
from alignlab.training.model_reward import ModelReward
from alignlab.training.report import RunReport, show_table, write_report
from alignlab.training.run_folder import RunFolder, holds_run
from alignlab.types import Prompt, Rollout, RolloutEngine

_ONLINE: dict[type[TrainerConfig], type[OnlineTrainer]] = {
    GRPOConfig: GRPOTrainer, PPOConfig: PPOTrainer, OnlineDPOConfig: OnlineDPOTrainer,
}  # fmt: skip
_BEFORE = "before.json"
_IDENTITY = "identity.json"


class Stopped(Exception):
    """A signal came in a stage: what it has made is on disk."""

    def __init__(self, result: TrainResult) -> None:
        super().__init__()
        self.result = result


class RLAIFTrainer(metaclass=NamedArguments):
    """Runs the stages that the config names.

    Args:
        model: a name or path, or a live model.
        config: the trainer's section.
        train_dataset: prompts; see `OnlineTrainer`.
        eval_dataset: the same, held out; needs `evaluation.scorer`.
        render_settings, eval_render_settings: see `OnlineTrainer`.
        tokenizer: default: the one beside the model.
        peft_config: a LoRA adapter for each stage that trains; None trains all weights.
        evaluation: how held-out accuracy is measured.
        judge: default: the one that `config.judge` describes.
        callbacks: see `TrainingLoop`; called by every stage.

    Raises:
        ConfigError: the constitution cannot be read, the judge shares a base that would be trained, or there is
            held-out data and nothing that scores it.
    """

    def __init__(
        self,
        model: Model,
        config: RLAIFConfig,
        train_dataset: Dataset,
        *,
        eval_dataset: Dataset | None = None,
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
        self.constitution = load_constitution(config.constitution)
        self.accelerator = make_accelerator(max(stage.rank_timeout_s for stage in config.stages))
        base, self.tokenizer = resolve_base(model, tokenizer, peft_config)
        self.model: Any = base.to(self.accelerator.device)
        check_base(config, self.model, adapted=peft_config is not None)
        self._stage_settings = sampled_settings(train.settings)
        self.prompts = resolve_prompts(train, self.tokenizer)
        for stage in config.sampling_stages:
            self.prompts = with_room(self.prompts, self.model, stage, train.settings, tokenizer=self.tokenizer)
        last = config.policy
        usual = last.sampling if isinstance(last, OnlineConfig) else SamplingSettings()
        how = held_out_problems(evaluation, (), usual, RolloutSettings(), needed=held_out is not None)
        self.held_out = how.read(held_out, self.model, self.tokenizer)
        check_stages(config, self.model, self.tokenizer, self.prompts)
        self._judge_is_given = judge is not None
        self.judge = judge or make_judge(
            config.judge, self.constitution, policy=self.model, tokenizer=self.tokenizer, seed=config.seed
        )
        self._trained: Any = self.model
        self.config_text = config.model_dump_json(indent=2)
        self.identity = RunIdentity(config)
        self.identity.add_prompts(digest_of(((prompt.token_ids,), ()) for prompt in self.prompts), self.prompts)
        self.identity.add_held_out(self.held_out.prompts, self.held_out.settings, train, held_out)
        self.identity.add_constitution(self.constitution)
        self.title = type(self).__name__
        self.base_model: str | None = None
        self.generate_options: tuple[str, ...] = ()
        self._run_id: str | None = None  # on rank 0, while it runs
        self._work = ""  # the run's id, on every rank
        self._questions: Counter[str] = Counter()  # of all stages and ranks, by what became of them

    def train(self, *, resume: bool = False) -> TrainResult:
        """Run the stages; SIGINT or SIGTERM ends them where they are, and everything made is kept.

        Args:
            resume: go on from where the run in `output_dir` was stopped.

        Raises:
            ConfigError, CheckpointError: see `TrainingLoop.train`.
            DataError: a stage has nothing to learn from.
            JudgeError: the judge answers nothing at all, or the last stage has used its budget up.
        """
        rank = self.accelerator.process_index
        with watched(lambda: Position(phase="the stages of RLAIF"), lambda: None), ExitStack() as stack:
            with RankAgreement(self.accelerator)("opening the run's folder"):
                folder = stack.enter_context(
                    RunFolder(self.config.output_dir, resume=resume, config_text=self.config_text, rank=rank)
                )
            self._run_id, self._questions = folder.run_id, Counter()
            self._work = of_main_rank(self.accelerator, (folder.run_id or "").encode()).decode()
            self.identity.keep_file(folder.path / _IDENTITY, resume=resume, accelerator=self.accelerator)
            before = self._before(folder.path / _BEFORE)
            try:
                result = self._run_stages(folder.path)
            except Stopped as stopped:
                folder.ended("interrupted", stopped.result.num_steps)
                return replace(stopped.result, before=before, folder=folder.path, run_id=folder.run_id)
            result = replace(
                result, before=before, after=self._evaluate(self._trained), folder=folder.path, run_id=folder.run_id
            )
            if rank == 0:
                write_report(folder, self._report(result))
            folder.ended("done", result.num_steps)
        return result

    def _run_stages(self, folder: Path) -> TrainResult:
        config, model = self.config, self.model
        if config.revision is not None:
            result = self._revise(config.revision, folder / "revision")
            model = self._trained
            if config.policy is None:
                return result
        assert config.policy is not None, "the config's rules ask for it"
        rows = [] if config.labels is None else self._label(config.labels, folder / "labels", model)
        reward = None if config.reward is None else self._train_reward(config.reward, folder / "reward", model, rows)
        return self._train_policy(config.policy, folder / "policy", model, rows, reward)

    def _revise(self, settings: RevisionSettings, folder: Path) -> TrainResult:
        """Critique and revision, and what the policy learns of it, merged into one model."""
        critic = self._judge_of(self.model)
        if not isinstance(critic, PromptedJudge):
            raise ConfigError(f"revision needs a judge that writes, and {type(critic).__name__} does not; give another")
        reviser = Reviser(
            critic.model, self.constitution, num_revisions=settings.num_revisions,
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=self.config.seed,
        )
        kept = folder / "revisions.jsonl"
        rows = self._collect(settings, kept, self.model, 1, reviser.revise, "critique and revision")
        told = taught_rows(rows)
        self._show("critique and revision", sorted(Counter(row["outcome"] for row in rows).items()))
        if not told:
            raise DataError(
                f"none of {len(rows)} answers was revised ({dict(Counter(row['outcome'] for row in rows))}); see "
                f"{folder}, and choose another judge or constitution"
            )
        self._keep(kept, told)
        trainer = SFTTrainer(
            copy.deepcopy(self.model), self._section(settings.trainer, folder / "sft"), told, tokenizer=self.tokenizer,
            peft_config=self.peft_config, callbacks=self.callbacks, render_settings=self._stage_settings,
        )
        result = self._train(trainer, "revision.trainer")
        trained = trainer.learner.model
        self._trained = trained.merge_and_unload() if isinstance(trained, PeftModel) else trained
        self._trained.eval().requires_grad_(True)
        path = folder / "model"
        if self.accelerator.is_main_process:
            with published(path, run_id=self._run_id) as unfinished:
                save_model(self._trained, unfinished)
                self.tokenizer.save_pretrained(unfinished)
        self._trained.config.name_or_path = self.base_model = str(path.resolve())
        return replace(result, model_path=path)

    def _label(self, settings: LabelSettings, folder: Path, model: Model) -> list[dict[str, Any]]:
        """Pairs of the policy's completions, as the judge prefers them."""
        judge = self._judge_of(model)
        take_earlier(judge, counts_of_rows(rows_of_rank(folder, self.accelerator.process_index)))
        kept = folder / "preferences.jsonl"
        rows = self._collect(settings, kept, model, 2, partial(judge_pairs, judge, work=self._work), "AI preferences")
        told = label_report(rows, counts_of_rows(rows), min_confidence=settings.min_confidence)
        self._questions.update(told.counts)
        self._show("AI preferences", told.lines())
        found = preferences(rows, min_confidence=settings.min_confidence)
        if not found:
            raise DataError(
                f"the judge preferred no completion of {told.num_pairs} pairs ({dict(told.outcomes)}); lower "
                "labels.min_confidence, sample at a higher temperature, or choose another judge"
            )
        self._keep(kept, found)
        if self.accelerator.is_main_process:
            write_atomically(folder / "report.json", json.dumps(told.to_json(), indent=1) + "\n")
        return found

    def _collect(
        self, settings: RevisionSettings | LabelSettings, kept: Path, model: Any, group: int,
        work: Callable[[Sequence[Rollout]], Sequence[dict[str, Any]]], title: str,
    ) -> list[dict[str, Any]]:
        """A row for each prompt: what `work` makes of the completions that the policy samples.

        Where `kept`, which is written when all is done, is there, the rows are as they were then.
        """
        folder = kept.parent
        self.accelerator.wait_for_everyone()
        told = made_with(self.config, self.constitution, model, settings)
        check_made_with(folder, told, writes=self.accelerator.is_main_process)
        prompts = self.prompts[: settings.num_prompts]
        if kept.exists():
            return finished(prompts, folder, done=kept)
        engine: list[RolloutEngine] = []
        sampling = settings.sampling.params(n=group, seed=self.config.seed)

        def one_batch(batch: Sequence[Prompt]) -> Sequence[dict[str, Any]]:
            if not engine:  # all may be done already
                engine.append(make_engine(model, self.tokenizer, settings.rollout))
            return work(engine[0].generate(batch, sampling))

        try:
            rows = collect(
                prompts, one_batch, folder, batch_size=settings.prompts_per_batch, accelerator=self.accelerator,
                title=title,
            )
        finally:
            for each in engine:
                give_back(each)
        if rows is None:
            raise Stopped(TrainResult(0, 0.0, folder, True, None, {}, None, None, folder))
        return rows

    def _train_reward(
        self, config: RewardConfig, folder: Path, model: Model, rows: Sequence[dict[str, Any]]
    ) -> Path:
        """The folder of a reward model of the labelled pairs."""
        trainer = RewardTrainer(
            copy.deepcopy(model), self._section(config, folder, probability_column="probability"), rows,
            tokenizer=self.tokenizer, peft_config=self.peft_config, callbacks=self.callbacks,
            render_settings=self._stage_settings,
        )
        return self._train(trainer, "reward").model_path

    def _train_policy(
        self, config: TrainerConfig, folder: Path, model: Model, rows: Sequence[dict[str, Any]], reward: Path | None
    ) -> TrainResult:
        """The last stage."""
        policy, _ = resolve_model(model, self.tokenizer, self.peft_config, self.accelerator.device)
        given: dict[str, Any] = {"tokenizer": self.tokenizer, "callbacks": self.callbacks}
        trainer: OfflineTrainer | OnlineTrainer
        if isinstance(config, DPOConfig):
            soft = config.loss == "sigmoid" and not config.label_smoothing  # what can take them gets soft labels
            section = self._section(config, folder, probability_column="probability" if soft else None)
            trainer = DPOTrainer(policy, section, rows, render_settings=self._stage_settings, **given)
        else:
            section = self._section(config, folder)
            trainer = _ONLINE[type(config)](policy, self._reward_of(policy, reward), section, self.prompts, **given)
        result = self._train(trainer, "policy")
        if isinstance(trainer, OnlineTrainer):
            own = counts_of_rewards([each.function for each in trainer.rewards.rewards])
            self._questions += sum(map(Counter, json_of_ranks(self.accelerator, own)), Counter())
        self._trained = trainer.learner.model
        return result

    def _reward_of(self, policy: Any, reward: Path | None) -> Any:
        """What the last stage is rewarded by."""
        if reward is not None:
            return ModelReward(str(reward))
        judge = self._judge_of(policy)
        work = self._work and f"{self._work}/policy/{self.accelerator.process_index}"
        return WinReward(judge, work=work) if self.config.path == "online_dpo" else RatingReward(judge, work=work)

    def _judge_of(self, model: Any) -> Judge:
        """The judge; one that shares the policy's base looks at it with the adapter off, as it is in this stage."""
        settings = self.config.judge
        if self._judge_is_given or not isinstance(settings, ModelJudge) or settings.name is not None:
            return self.judge
        assert isinstance(self.judge, PromptedJudge)
        return replace(self.judge, model=chat_model(settings, model, self.tokenizer))

    def _train(self, trainer: OfflineTrainer | OnlineTrainer, section: str) -> TrainResult:
        trainer.title = f"{self.title}: {type(trainer).__name__}"
        trainer.part_of = self._run_id
        trainer.identity.prefix = f"{self.identity.prefix}.{section}"
        result = trainer.train(resume=holds_run(trainer.config.output_dir))
        if result.interrupted:
            raise Stopped(result)
        return result

    def _before(self, path: Path) -> Evaluation | None:
        """Held-out accuracy of the policy that the run began with, as measured now or by an earlier start."""
        kept = read_evaluation(path)
        if kept is not None:
            return kept
        result = self._evaluate(self.model)
        if result is not None and self.accelerator.is_main_process:
            write_evaluation(path, result)
        return result

    def _evaluate(self, model: Any) -> EvaluationResult | None:
        if not self.held_out:
            return None
        return self.held_out.evaluate(make_engine(model, self.tokenizer, RolloutSettings()), seed=self.config.seed)

    def _report(self, result: TrainResult) -> RunReport:
        adapters = has_adapters(self._trained)
        return RunReport(
            title=self.title, before=result.before, after=result.after, train_seconds=result.train_seconds,
            num_steps=result.num_steps, adapter=result.model_path if adapters else None,
            model=None if adapters else result.model_path, generate_options=self.generate_options,
            base_model=self.base_model, summary={"questions": dict(self._questions)} | self.identity.summary,
            verdict=result.verdict, run_id=result.run_id,
        )  # fmt: skip

    def _keep(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        if self.accelerator.is_main_process:
            write_rows(path, rows)

    def _show(self, title: str, lines: Sequence[tuple[str, Any]]) -> None:
        if self.accelerator.is_main_process:
            show_table(title, lines)

    def _section(self, config: Any, folder: Path, **changes: Any) -> Any:
        """A stage's section, in a folder of its own, with the run's seed."""
        return config.model_copy(update={"output_dir": folder, "seed": self.config.seed, **changes})
