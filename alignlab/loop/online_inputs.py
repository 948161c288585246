"""Arguments of a trainer that learns from rollouts, resolved and checked before sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.config.model import LoraSettings
from alignlab.config.rollout import max_staleness
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import OnlineConfig
from alignlab.loop.accelerator import make_accelerator
from alignlab.loop.given_data import DatasetLike, GivenData, given_held_out, given_prompts, resolve_prompts
from alignlab.loop.held_out import HeldOutProblems, held_out_problems
from alignlab.loop.host_ranks import loading_for_training
from alignlab.loop.inputs import Model, Reward, check_shares, resolve_model, resolve_rewards
from alignlab.loop.preflight import warn_of_truncation, with_room
from alignlab.loop.reward_checks import check_rewards
from alignlab.models.shards import shard_root
from alignlab.rollout.engine_choice import chosen_engine
from alignlab.scoring.reward_model import bind_rewards, check_reward_ids
from alignlab.scoring.runner import RewardRunner
from alignlab.types import Prompt


@dataclass(frozen=True)
class OnlineInputs:
    """The resolved arguments of a trainer that learns from rollouts.

    Attributes:
        model: on the device, with its adapter.
        prompts: those that the model has room for, with their completions.
        train, eval: where the prompts and the held-out ones come from; None without held-out data.
        held_out: the problems on which accuracy is measured.
        config: with the engine that was chosen, where it names none.
    """

    accelerator: Accelerator
    model: Any
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    rewards: RewardRunner
    held_out: HeldOutProblems
    train: GivenData
    eval: GivenData | None
    config: OnlineConfig

    @property
    def render_settings(self) -> RenderSettings:
        """Return the settings that turn training rows into text and tokens."""
        return self.train.settings


def resolve_online_inputs(
    model: Model,
    reward_funcs: Reward | Sequence[Reward],
    config: OnlineConfig,
    train_dataset: DatasetLike,
    *,
    eval_dataset: DatasetLike | None,
    render_settings: RenderSettings | None,
    eval_render_settings: RenderSettings | None,
    tokenizer: str | PreTrainedTokenizerBase | None,
    peft_config: LoraSettings | LoraConfig | None,
    evaluation: EvaluationSettings | None,
) -> OnlineInputs:
    """Resolve the arguments of `OnlineTrainer`, and seed torch's generators.

    Raises:
        ConfigError, DataError: an argument cannot be used; before anything is sampled.
    """
    train = given_prompts(train_dataset, render_settings)
    eval_data = given_held_out(eval_dataset, eval_render_settings, train)
    accelerator = make_accelerator(config.rank_timeout_s, config.numerics)
    check_shares("num_prompts", config.num_prompts, accelerator.num_processes, config.num_minibatches)
    set_seed(config.seed)
    warn_of_truncation(config.sampling)
    uses_rewards = config.takes_rewards == "needed" or bool(reward_funcs)
    rewards = RewardRunner(resolve_rewards(reward_funcs) if uses_rewards else [], config.reward_limits)
    with loading_for_training(config.sharding, accelerator) as device:
        model, tokenizer = resolve_model(model, tokenizer, peft_config, device, computes_on=accelerator.device)
    engine = chosen_engine(config.rollout, model, accelerator.device)
    config = config.model_copy(update={"rollout": engine})
    prompts = with_room(resolve_prompts(train, tokenizer), model, config, train.settings, tokenizer=tokenizer)
    check_rewards(rewards, prompts, config)
    held_out = held_out_problems(
        evaluation, rewards.rewards, config.sampling, config.rollout, needed=eval_data is not None
    ).read(eval_data, model, tokenizer)
    return OnlineInputs(accelerator, model, tokenizer, prompts, rewards, held_out, train, eval_data, config)


def bind_reward_models(inputs: OnlineInputs, config: OnlineConfig) -> None:
    """Give reward models the policy's base to share, and check that they can read the prompts.

    Raises:
        ConfigError: a prompt holds a token that a reward model has no embedding for.
    """
    rewards = inputs.rewards.rewards
    # A reward model needs weights of its own where a prefetch thread scores while the policy trains, and where ranks,
    # which score different numbers of packs, would have to gather the policy's together.
    share = max_staleness(config.rollout) == 0 and shard_root(inputs.model) is None
    bind_rewards(rewards, inputs.model, inputs.tokenizer, share=share)
    check_reward_ids(rewards, inputs.prompts, inputs.tokenizer)
