"""Inputs of a run, read and checked before anything is generated or trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.config.judge import Constitution, load_constitution
from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings, SamplingSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import OnlineConfig, RLAIFConfig
from alignlab.data.dataset import digest_of
from alignlab.loop.accelerator import make_accelerator
from alignlab.loop.ending_check import check_stages
from alignlab.loop.given_data import GivenData, resolve_prompts, sampled_settings
from alignlab.loop.held_out import HeldOutProblems, held_out_problems
from alignlab.loop.inputs import Model, resolve_base
from alignlab.loop.preflight import with_room
from alignlab.loop.run_identity import RunIdentity
from alignlab.models.empty import put_on
from alignlab.rollout.engine import check_engine
from alignlab.scoring.judges.judge import Judge
from alignlab.scoring.judges.make_judge import make_judge, shares_base
from alignlab.trainers.rlaif.base import check_base
from alignlab.types import Prompt


@dataclass(frozen=True)
class RLAIFInputs:
    """The checked inputs of a run.

    Attributes:
        constitution: the principles.
        judge: compares, rates, criticises and revises completions.
        judge_is_base: whether the judge is the policy's own frozen base.
        accelerator: the ranks.
        model: the policy before the run.
        tokenizer: the policy's.
        prompts: training prompts, each with room for its completions.
        render_settings: how rows made of sampled completions become tokens.
        held_out: held-out problems and their scorer.
        identity: what a resumed run is compared by.
    """

    constitution: Constitution
    judge: Judge
    judge_is_base: bool
    accelerator: Accelerator
    model: Any
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    render_settings: RenderSettings
    held_out: HeldOutProblems
    identity: RunIdentity


def read_inputs(
    model: Model,
    config: RLAIFConfig,
    train: GivenData,
    held_out: GivenData | None,
    *,
    tokenizer: str | PreTrainedTokenizerBase | None,
    peft_config: LoraSettings | LoraConfig | None,
    evaluation: EvaluationSettings | None,
    judge: Judge | None,
) -> RLAIFInputs:
    """Read and check a run's inputs; see `RLAIFTrainer`.

    Raises:
        ConfigError, CheckpointError, DataError: the constitution, the model or the data cannot be read, or one of the
            stages could not sample from the prompts or save its product.
    """
    constitution = load_constitution(config.constitution)
    accelerator = make_accelerator(max(stage.rank_timeout_s for stage in config.stages), config.numerics)
    base, tokenizer = resolve_base(model, tokenizer, peft_config, accelerator.device)
    policy: Any = base
    put_on(policy, accelerator.device)
    check_base(config, policy, trains_adapter=peft_config is not None)
    prompts = resolve_prompts(train, tokenizer)
    for stage in config.sampling_stages:
        check_engine(stage.rollout)
        prompts = with_room(prompts, policy, stage, train.settings, tokenizer=tokenizer)
    problems = _held_out_problems(config, evaluation, is_needed=held_out is not None)
    problems = problems.read(held_out, policy, tokenizer)
    check_stages(config, policy, tokenizer, prompts)
    identity = RunIdentity(config)
    identity.add_prompts(digest_of(prompts), prompts)
    identity.add_held_out(problems.prompts, problems.settings, train, held_out)
    identity.add_constitution(constitution)
    return RLAIFInputs(
        constitution=constitution,
        judge=judge or make_judge(config.judge, constitution, policy=policy, tokenizer=tokenizer, seed=config.seed),
        judge_is_base=judge is None and shares_base(config.judge),
        accelerator=accelerator,
        model=policy,
        tokenizer=tokenizer,
        prompts=prompts,
        render_settings=sampled_settings(train.settings),
        held_out=problems,
        identity=identity,
    )


def _held_out_problems(
    config: RLAIFConfig, evaluation: EvaluationSettings | None, *, is_needed: bool
) -> HeldOutProblems:
    sampling = config.policy.sampling if isinstance(config.policy, OnlineConfig) else SamplingSettings()
    return held_out_problems(evaluation, (), sampling, RolloutSettings(), needed=is_needed)
